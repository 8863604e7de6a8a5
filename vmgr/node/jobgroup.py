"""The control groups that the batch system has made for a job on this node: guests belong there, and count there.

TORQUE 6.1 makes `torque/<job id>` in each hierarchy before the prologue of that node runs (`trq_cgroups.c`); older ones
with cpusets make it in the file system of cpusets, `/dev/cpuset`. It removes them after the epilogue, with all that is
still in them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from vmgr.errors import Code, VTorqueError
from vmgr.node import process
from vmgr.topology.allowed import names_a_folder

KINDS = ("cgroup", "cgroup2", "cpuset")
FOLDER = "torque"
TASKS = "tasks"
"""The list of the file system `cpuset`: of threads, not of processes."""
_OCTAL = re.compile(r"\\([0-7]{3})")


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


def find_group(job_id: str, mounts: Path = Path("/proc/self/mounts")) -> JobGroup:
    """The control groups of a job, from what is mounted; none for an id that is no name of a folder."""
    lists: list[Path] = []
    if not names_a_folder(job_id):
        return JobGroup()
    for line in mounts.read_text().splitlines():
        fields = line.split(" ")
        if len(fields) > 2 and fields[2] in KINDS:
            folder = Path(_OCTAL.sub(lambda code: chr(int(code[1], 8)), fields[1])) / FOLDER / job_id
            name = TASKS if fields[2] == "cpuset" else "cgroup.procs"
            if (folder / name).exists():
                lists.append(folder / name)
    return JobGroup(tuple(dict.fromkeys(lists)))
