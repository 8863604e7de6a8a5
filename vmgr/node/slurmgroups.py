"""Where Slurm has the control groups of a job, and when they are all there.

Facts from Slurm's plugins cgroup/v1, cgroup/v2, proctrack/cgroup and task/cgroup, and from slurmstepd, of 22.05 to
26.05; version 1 has been seen at work with 22.05. `N` is the node's name, `U` the user's number, `J` the job's:

    v1  /slurm_N/uid_U/job_J/step_S, in each hierarchy by itself
    v2  /system.slice/N_slurmstepd.scope/job_J/step_S/{slurm,user/task_T}

A slurmd that is not built for several of them on one machine leaves the node's name out: `/slurm`, `slurmstepd.scope`.
From 26.05 on, v2 has the job's SLUID in the place of `job_J`, unless `CgroupJobIdPaths` is set. Bounds are set for job
and step; signals, freezing and accounting are of the steps alone. With `PrologFlags=Contain` each node of a job has the
step `extern`: it begins when the node's Prologs have ended, gets its first process once all bounds are set, and ends
with the first TERM to the job. With the last step of a node the job's groups are removed, and left without complaint
where they are not empty. So guests have groups of their own below the job's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from vmgr.logs import LOGGER
from vmgr.node.hookcall import GroupPath

if TYPE_CHECKING:
    from vmgr.node.jobgroup import Group, JobGroup
    from vmgr.node.record import Place

CONF = "/etc/slurm/slurm.conf"
MAX_BYTES = 1 << 24
WAIT_SECONDS = 60.0
"""How long the other Prologs of a node may take after ours, and Slurm to make the groups."""
LOOK_AGAIN_SECONDS = 5.0
"""How often the groups are looked at beside the events that tell of them."""


def group_paths(node: str, uid: int, number: int, sluid: Optional[str]) -> tuple[GroupPath, ...]:
    """Where the groups of a job may be on a node, those of the node's own slurmd first."""
    names = [f"job_{number}", *([sluid] if sluid else [])]
    return tuple(
        GroupPath(root, name)
        for root, inner in (
            (f"slurm_{node}", [f"uid_{uid}/job_{number}"]),
            (f"system.slice/{node}_slurmstepd.scope", names),
            ("slurm", [f"uid_{uid}/job_{number}"]),
            ("system.slice/slurmstepd.scope", names),
        )
        for name in inner
    )


async def guests_group(paths: Sequence[GroupPath], place: Place, environ: Mapping[str, str]) -> JobGroup:
    """Make the guests' groups, below the job's, once Slurm has made those. Raises VTorqueError (VT-LAUNCH).

    A Slurm without groups, or without `Contain`, is not waited for: then there are none.
    """
    from vmgr.node.jobgroup import JobGroup
    from vmgr.node.owngroup import make_group
    from vmgr.node.waiting import within

    groups = awaited(paths)
    if not groups or not makes_groups(environ):
        return JobGroup()
    import asyncio

    try:
        await within(WAIT_SECONDS, _begun(groups))
    except asyncio.TimeoutError:
        LOGGER.warning("Slurm has made no control groups within %d s: its bounds do not hold for guests", WAIT_SECONDS)
    return make_group(paths, place)


def makes_groups(environ: Mapping[str, str]) -> bool:
    """Whether Slurm makes groups for a job on each node, by the slurm.conf that `SLURM_CONF` in `environ` names."""
    from vmgr.deploy.slurmconf import CONTAIN, flags_of, parse_file, tracks_groups

    path = environ.get("SLURM_CONF", CONF)
    try:
        settings = parse_file(path, _read)
    except (OSError, ValueError) as err:
        LOGGER.warning("%s does not tell whether there are control groups: %s", path, err)
        return False
    contains = bool(flags_of(settings.get("prologflags", ())) & set(CONTAIN))
    return contains and tracks_groups(settings.get("proctracktype", ()))


def _read(path: str) -> str:
    with open(path, "rb") as stream:
        return stream.read(MAX_BYTES).decode("utf-8", "replace")


def awaited(paths: Sequence[GroupPath], mounts: Path = Path("/proc/self/mounts")) -> list[Group]:
    """The groups of a job in which Slurm tracks its processes, whether they are there or not yet.

    Slurm's root is there as long as slurmd has run with such groups: in the hierarchy `freezer`, and in that of v2.
    """
    from vmgr.node.jobgroup import Group, hierarchies
    from vmgr.topology.allowed import is_path

    found = []
    for hierarchy in hierarchies(mounts):
        if hierarchy.kind == "cgroup2" or "freezer" in hierarchy.options:
            groups = [Group(hierarchy, path) for path in paths if is_path(path.path)]
            there = [group for group in groups if (hierarchy.mount / group.path.root).is_dir()]
            found += [group for group in there if group.path.root == there[0].path.root]
    return found


async def _begun(groups: Sequence[Group]) -> None:
    """Return when the step `extern` has a process."""
    from inotify_simple import flags

    from vmgr.node.folders import changes

    while True:
        folder = deepest(groups)
        async for _ in changes(folder, flags.CREATE | flags.MODIFY, LOOK_AGAIN_SECONDS):
            if has_begun(groups):
                return
            if deepest(groups) != folder:
                break


def has_begun(groups: Sequence[Group]) -> bool:
    """Whether the step `extern` of a job has a process."""
    return any(_text(tasks / "cgroup.procs").strip() for group in groups for tasks in _tasks(group))


def _tasks(group: Group) -> list[Path]:
    """The folders in which a process of the step `extern` may be: v1 its own, v2 those of its tasks."""
    step = group.folder / "step_extern"
    return [step, *sorted((step / "user").glob("task_*"))]


def deepest(groups: Sequence[Group]) -> Path:
    """The folder in which the next thing on the way to a process of the step `extern` happens."""
    found = []
    for group in groups:
        on_the_way = [*reversed(group.folder.relative_to(group.hierarchy.mount / group.path.root).parents)]
        root = group.hierarchy.mount / group.path.root
        way = [root / each for each in on_the_way]
        way += [group.folder, group.folder / "step_extern", group.folder / "step_extern" / "user", *_tasks(group)[1:2]]
        there = [(number, folder) for number, folder in enumerate(way) if folder.is_dir()]
        found.append(there[-1] if there else (0, root))
    return max(found, key=lambda each: each[0])[1]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
