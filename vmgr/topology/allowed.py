"""Which CPUs and NUMA nodes of a machine a job, or a process, may use.

Facts are from cpuset(7), cgroups(7) and the kernel's Documentation/admin-guide/cgroup-v2.rst. Where below the mount
the cpuset of a job is, the batch system's own module knows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.topology.cpulist import parse_cpus, show_cpus
from vmgr.topology.model import Allowed, Topology
from vmgr.topology.tree import Tree

NODE = "the node"
"""The source of what is bounded by the machine alone."""

_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\[\]-]{0,254}", re.ASCII)


def allowed_for(
    topology: Topology,
    *,
    groups: Sequence[str] = (),
    assigned: Optional[frozenset[int]] = None,
    root: Path = Path("/"),
) -> Allowed:
    """What a job may use of `topology`, the machine at `root`.

    That is the cpuset that the batch system made for the job, in one of its `groups` (see `job_cpuset`); where it made
    none, the CPUs that it `assigned`; else what a process of the machine may use. Raises VTorqueError (VT-NODE) when
    no CPU of it is online.
    """
    found = job_cpuset(topology, groups, root)
    if found is None:
        found = read_allowed(topology, root)
        if assigned is not None:
            found = Allowed(assigned & _online(topology), found.nodes, "the batch system")
            if not found.cpus:
                raise VTorqueError(
                    f"none of the CPUs that the batch system assigned is online: {show_cpus(assigned)}",
                    code=Code.NODE,
                    hint=f"this node has {show_cpus(_online(topology))}",
                )
    if not found.cpus:
        raise VTorqueError(
            f"{found.source} has no CPU that is online",
            code=Code.NODE,
            hint=f"this node has {show_cpus(_online(topology))}",
        )
    return found


def read_allowed(topology: Topology, root: Path = Path("/")) -> Allowed:
    """What a process of the machine at `root` may use: its cpuset, and for `/` the affinity of this very process.

    A machine or recorded tree without cpusets allows all that it has.
    """
    tree = Tree(root)
    found = Allowed(_online(topology), _nodes(topology), NODE)
    path = _own_path(tree)
    for folder in () if path is None else _own_folders(tree, path):
        known = cpuset_at(topology, folder.path, root, f"the cpuset {folder.name}")
        if known is not None:
            found = known
            break
    if not tree.is_live:
        return found
    status = re.search(r"^Mems_allowed_list:\s*(\S+)$", tree.text("proc/self/status") or "", re.MULTILINE)
    mems = None if status is None else parse_cpus(status[1])
    bound = Allowed(
        _online(topology) & os.sched_getaffinity(0),
        found.nodes if mems is None else _nodes(topology) & mems,
        "the affinity of this process",
    )
    return found if found[:2] == bound[:2] else bound


def job_cpuset(topology: Topology, groups: Sequence[str], root: Path = Path("/")) -> Optional[Allowed]:
    """What the batch system's own cpuset of a job allows; None where it has made none.

    `groups` are the paths below the mount that it may have, the first that is there counts; what is no path is none.
    """
    paths = [path for path in groups if is_path(path)]
    for mount in _mounts(Tree(root)):
        for path in paths:
            found = cpuset_at(topology, f"{mount}/{path}", root, f"the cpuset /{path}")
            if found is not None:
                return found
    return None


def is_path(path: str) -> bool:
    """Whether each part of a path is the name of a folder."""
    return all(map(names_a_folder, path.split("/")))


def names_a_folder(job_id: str) -> bool:
    """Whether a job id is the name of a folder of its own, wherever folders are named after jobs."""
    return _COMPONENT.fullmatch(job_id) is not None and ".." not in job_id


def cpuset_at(topology: Topology, path: str, root: Path = Path("/"), source: Optional[str] = None) -> Optional[Allowed]:
    """What the cpuset in the folder `path` (below `root`) allows of `topology`; None when it is no cpuset.

    The files are those of cgroup v2, of v1, and of v1 without prefix and the file system `cpuset`, which came before
    cgroups. A cpuset of v1 whose files are empty allows nothing.
    """
    tree = Tree(root)
    for cpus_file, mems_file in (
        ("cpuset.cpus.effective", "cpuset.mems.effective"),
        ("cpuset.cpus", "cpuset.mems"),
        ("cpus", "mems"),
    ):
        cpus = tree.cpus(f"{path}/{cpus_file}")
        if cpus is None:
            continue
        mems = tree.cpus(f"{path}/{mems_file}")
        nodes = _nodes(topology)
        allowed = Allowed(cpus & _online(topology), nodes if mems is None else nodes & mems, source or f"/{path}")
        return allowed._replace(source=NODE) if allowed[:2] == (_online(topology), nodes) else allowed
    return None


class _Folder(NamedTuple):
    """A folder of a hierarchy of cpusets: where it is below the root, and its name in the hierarchy."""

    path: str
    name: str


def _mounts(tree: Tree) -> Iterator[str]:
    """The hierarchies that may have cpusets, the one that has if there are several first: v1 cpusets, then v2."""
    unified = []
    for line in (tree.text("proc/mounts") or "").splitlines():
        fields = line.split()
        if len(fields) < 4:
            continue
        path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[1]).strip("/")
        if ".." in path.split("/"):
            continue
        if fields[2] == "cpuset" or (fields[2] == "cgroup" and "cpuset" in fields[3].split(",")):
            yield path
        elif fields[2] == "cgroup2":
            unified.append(path)
    yield from unified


def _own_path(tree: Tree) -> Optional[str]:
    """The path of a process of this tree in the hierarchy that has cpusets; None where nothing is said."""
    path = tree.text("proc/self/cpuset")
    if path is None:
        lines = [line.split(":", 2) for line in (tree.text("proc/self/cgroup") or "").splitlines()]
        paths = [fields[2] for fields in lines if len(fields) == 3 and "cpuset" in fields[1].split(",")]
        paths += [fields[2] for fields in lines if len(fields) == 3 and fields[:2] == ["0", ""]]
        path = paths[0] if paths else None
    return path if path and path.startswith("/") else None


def _own_folders(tree: Tree, path: str) -> Iterator[_Folder]:
    """The folders in which the cpuset of that path may be, the likeliest first.

    A folder of v2 without files has the cpuset of the next one above that has them. In a container the path may be of
    the host's hierarchy, of which only the container's own part is mounted: then it is the mount itself.
    """
    names = [name for name in path.split("/") if name]
    if ".." in names:
        names = []
    for mount in _mounts(tree):
        for length in range(len(names), -1, -1):
            inner = "/".join(names[:length])
            yield _Folder(f"{mount}/{inner}".rstrip("/"), f"/{inner}")


def _online(topology: Topology) -> frozenset[int]:
    return frozenset(cpu.number for cpu in topology.cpus)


def _nodes(topology: Topology) -> frozenset[int]:
    return frozenset(node.number for node in topology.nodes)
