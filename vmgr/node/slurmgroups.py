"""Where Slurm has the control groups of a job, and when they are all there.

Facts from Slurm's plugins cgroup/v1, cgroup/v2, proctrack/cgroup and task/cgroup, and from slurmstepd, of 22.05 to
26.05; version 1 has been seen at work with 22.05, 25.11 and 26.05. `N` is the node's name, `U` the user's number, `J`
the job's:

    v1  /slurm_N/uid_U/job_J/step_S, in each hierarchy by itself
    v2  /system.slice/N_slurmstepd.scope/job_J/step_S/{slurm,user/task_T}

A slurmd that is not built for several of them on one machine leaves the node's name out: `/slurm`, `slurmstepd.scope`.
From 26.05 on, v2 has the job's SLUID in the place of `job_J`, unless `CgroupJobIdPaths` is set. Bounds are set for job
and step; signals, freezing and accounting are of the steps alone. With `PrologFlags=Contain` each node of a job has the
step `extern`, which begins when the node's Prologs have ended and ends with the first TERM to the job; in 22.05 it has
a process, in 25.11 none. With the last step of a node the job's groups are removed, and left without complaint where
they are not empty. So guests have groups of their own below the job's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Optional

from vmgr.logs import LOGGER
from vmgr.node.hookcall import GroupPath

if TYPE_CHECKING:
    from vmgr.node.jobgroup import Hierarchy, JobGroup
    from vmgr.node.record import Place

CONF = "/etc/slurm/slurm.conf"
MAX_BYTES = 1 << 24
WAIT_SECONDS = 60.0
"""How long the other Prologs of a node may take after ours, and Slurm to make the groups."""
LOOK_AGAIN_SECONDS = 5.0
"""How often the groups are looked at beside the events that tell of them."""
MOUNTS = Path("/proc/self/mounts")
_CONSTRAINTS = {
    "cpuset": ("constraincores",),
    "memory": ("constrainramspace", "constrainswapspace", "constrainkmemspace"),
    "devices": ("constraindevices",),
}
"""Settings of cgroup.conf(5), in lower case, by the controller."""
_YES = ("yes", "up", "true", "1")


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
    import asyncio

    from vmgr.node.jobgroup import JobGroup
    from vmgr.node.owngroup import make_group
    from vmgr.node.waiting import within

    root = slurms_root(paths)
    bound = None if root is None else bounds(environ)
    if root is None or bound is None:
        return JobGroup()
    try:
        await within(WAIT_SECONDS, _all_there(signs(paths, root, bound)))
    except asyncio.TimeoutError:
        LOGGER.warning("Slurm has not made its control groups within %d s: guests may not be bound", WAIT_SECONDS)
    return make_group(paths, place)


def bounds(environ: Mapping[str, str]) -> Optional[frozenset[str]]:
    """The controllers by which Slurm bounds a job on each of its nodes; None where it makes no groups there.

    By the slurm.conf that `SLURM_CONF` in `environ` names, and cgroup.conf beside it.
    """
    from vmgr.deploy.slurmconf import CONTAIN, flags_of, parse_file, tracks_groups

    path = environ.get("SLURM_CONF", CONF)
    try:
        settings = parse_file(path, _read)
        if not flags_of(settings.get("prologflags", ())) & set(CONTAIN):
            return None
        if not tracks_groups(settings.get("proctracktype", ())):
            return None
        if "task/cgroup" not in flags_of(settings.get("taskplugin", ())):
            return frozenset()
        path = str(Path(path).with_name("cgroup.conf"))
        constrained = parse_file(path, _read)
    except FileNotFoundError:
        return frozenset() if path.endswith("/cgroup.conf") else None
    except (OSError, ValueError) as err:
        LOGGER.warning("%s does not tell of control groups: %s", path, err)
        return None
    return frozenset(
        controller
        for controller, names in _CONSTRAINTS.items()
        for name in names
        for value in constrained.get(name, ())
        if value.text.lower() in _YES
    )


def _read(path: str) -> str:
    with open(path, "rb") as stream:
        return stream.read(MAX_BYTES).decode("utf-8", "replace")


class Root(NamedTuple):
    """Where Slurm's groups are: the hierarchy in which it tracks processes, and the folder that slurmd makes there."""

    hierarchy: Hierarchy
    name: str


def slurms_root(paths: Sequence[GroupPath], mounts: Path = MOUNTS) -> Optional[Root]:
    """The root of the node's slurmd, which is there as long as one has run with groups; None where there is none."""
    from vmgr.node.jobgroup import hierarchies
    from vmgr.topology.allowed import is_path

    for hierarchy in hierarchies(mounts):
        if hierarchy.kind == "cgroup2" or "freezer" in hierarchy.options:
            for path in paths:
                if is_path(path.path) and (hierarchy.mount / path.root).is_dir():
                    return Root(hierarchy, path.root)
    return None


class Sign(NamedTuple):
    """What shows that Slurm has made, or bound, the groups of a job: a file of one of `folders` that is not empty, or,
    without a name, such a folder.
    """

    folders: tuple[Path, ...]
    name: str = ""

    def is_there(self) -> bool:
        return any(_text(folder / self.name).strip() if self.name else folder.is_dir() for folder in self.folders)

    def nearest(self) -> Path:
        """The folder in which the next thing on the way to it happens."""
        there = [next(each for each in (folder, *folder.parents) if each.is_dir()) for folder in self.folders]
        return max(there, key=lambda folder: len(folder.parts))


def signs(paths: Sequence[GroupPath], root: Root, bound: frozenset[str], mounts: Path = MOUNTS) -> list[Sign]:
    """What shows that the groups of a job are there, with all by which it is `bound`.

    Of version 2 a job has one group, whose bounds hold for what is in it already; where its CPUs are has to be known
    before. Of version 1 it has one in each hierarchy, of which a cpuset takes nobody before it is told both.
    """
    from vmgr.node.jobgroup import hierarchies

    def folders(hierarchy: Hierarchy) -> tuple[Path, ...]:
        return tuple(hierarchy.mount / path.path for path in paths if path.root == root.name)

    found = [Sign(folders(root.hierarchy))]
    if root.hierarchy.kind == "cgroup2":
        return found + [Sign(folders(root.hierarchy), "cpuset.cpus") for _ in bound & {"cpuset"}]
    for hierarchy in hierarchies(mounts):
        for controller in sorted(bound & hierarchy.options if hierarchy.kind == "cgroup" else ()):
            names = ("cpuset.cpus", "cpuset.mems") if controller == "cpuset" else ("",)
            found += [Sign(folders(hierarchy), name) for name in names]
    return found


async def _all_there(waited: Sequence[Sign]) -> None:
    for sign in waited:
        await _there(sign)


async def _there(sign: Sign) -> None:
    from inotify_simple import flags

    from vmgr.node.folders import changes

    while True:
        folder = sign.nearest()
        async for _ in changes(folder, flags.CREATE | flags.MODIFY, LOOK_AGAIN_SECONDS):
            if sign.is_there():
                return
            if sign.nearest() != folder:
                break


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
