"""The control groups that the batch system has made for a job on this node: guests belong there, and count there.

Where they are is the batch system's own, and known to its module: `HookCall.groups`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from vmgr.errors import Code, VTorqueError
from vmgr.node import process
from vmgr.node.hookcall import GroupPath
from vmgr.topology.allowed import is_path

KINDS = ("cgroup", "cgroup2", "cpuset")
MOUNTS = Path("/proc/self/mounts")
TASKS = "tasks"
"""The list of the file system `cpuset`: of threads, not of processes."""
_OOM_KILLS = re.compile(r"^oom_kill [1-9]", re.MULTILINE)
_OCTAL = re.compile(r"\\([0-7]{3})")


class Hierarchy(NamedTuple):
    """A hierarchy of control groups that is mounted: its file system, and the options, which name its controllers."""

    kind: str
    mount: Path
    options: frozenset[str] = frozenset()

    @property
    def list_name(self) -> str:
        """The file of a group that lists its processes."""
        return TASKS if self.kind == "cpuset" else "cgroup.procs"


class Group(NamedTuple):
    """A control group that is there: `path`, in `hierarchy`."""

    hierarchy: Hierarchy
    path: GroupPath

    @property
    def folder(self) -> Path:
        return self.hierarchy.mount / self.path.path


class JobGroup(NamedTuple):
    """The lists of processes of a job's control groups, one for each hierarchy; none where the job has no group."""

    lists: tuple[Path, ...] = ()

    @contextmanager
    def opened(self) -> Iterator[list[int]]:
        """The lists, opened for writing: a child that writes there before its program starts is in from the start."""
        fds: list[int] = []
        try:
            for path in self.lists:
                with suppress(FileNotFoundError):  # the job is over
                    fds.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
            yield fds
        finally:
            for fd in fds:
                os.close(fd)

    def has_run_out(self) -> bool:
        """Whether the kernel has ended a process in them because their bound on memory was reached (v2, v1)."""
        for path in self.lists:
            for name in ("memory.events", "memory.oom_control"):
                with suppress(OSError):
                    if _OOM_KILLS.search((path.parent / name).read_text()):
                        return True
        return False

    def add(self, pid: int) -> None:
        """Put a process in, with all its threads. Raises VTorqueError (VT-LAUNCH) when the kernel refuses."""
        for path in self.lists:
            try:
                for each in process.threads(pid) if path.name == TASKS else (pid,):
                    path.write_text(str(each))
            except (ProcessLookupError, FileNotFoundError):
                pass  # it has ended, or the job has
            except OSError as err:
                raise _refused(path, err) from err


def _refused(path: Path, err: OSError) -> VTorqueError:
    return VTorqueError(f"a guest cannot go into the job's control group {path}: {err.strerror}", code=Code.LAUNCH)


def hierarchies(mounts: Path = MOUNTS) -> list[Hierarchy]:
    """What is mounted, each hierarchy once."""
    found = []
    for line in mounts.read_text().splitlines():
        fields = line.split(" ")
        if len(fields) > 3 and fields[2] in KINDS:
            mount = Path(_OCTAL.sub(lambda code: chr(int(code[1], 8)), fields[1]))
            found.append(Hierarchy(fields[2], mount, frozenset(fields[3].split(","))))
    return list({each.mount: each for each in found}.values())


def find_groups(paths: Sequence[GroupPath], mounts: Path = MOUNTS) -> list[Group]:
    """The groups of a job: in each hierarchy the first of `paths` that is there; what is no path is nowhere."""
    found = []
    for hierarchy in hierarchies(mounts):
        groups = (Group(hierarchy, path) for path in paths if is_path(path.path))
        there = next((group for group in groups if (group.folder / hierarchy.list_name).exists()), None)
        if there is not None:
            found.append(there)
    return found


def find_group(paths: Sequence[GroupPath], mounts: Path = MOUNTS) -> JobGroup:
    """The groups of a job as what its guests go into."""
    groups = find_groups(paths, mounts)
    return JobGroup(tuple(group.folder / group.hierarchy.list_name for group in groups))
