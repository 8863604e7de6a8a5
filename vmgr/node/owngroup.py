"""Control groups of the guests' own, below those that the batch system has made for their job.

What the batch system bounds for the job holds in them too, and it neither signals nor counts what is there. A batch
system that finds one of them when it takes its own groups away leaves those that are above it: they are removed with
ours, under the lock that it takes for that itself.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vmgr.errors import Code, VTorqueError
from vmgr.node import process, record
from vmgr.node.hookcall import GroupPath
from vmgr.node.jobgroup import MOUNTS, Group, JobGroup, find_groups

NAME = "vtorque"
_OF_CPUSETS = ("cpuset.mems", "cpuset.cpus")
"""What a new cpuset of cgroup v1 has to be told before it takes a process (cpuset(7))."""


def make_group(paths: Sequence[GroupPath], place: record.Place, mounts: Path = MOUNTS) -> JobGroup:
    """Make a group below each of the job's, and write it to the attempt's record before.

    Raises VTorqueError (VT-LAUNCH) when the kernel refuses.
    """
    lists = []
    for group in find_groups(paths, mounts):
        own = group.folder / NAME
        record.append(place, {"do": "group", "path": str(own), "root": str(_root(group)), "lock": str(_lock(group))})
        try:
            own.mkdir(mode=0o755, exist_ok=True)
            _open_cpuset(own)
        except FileNotFoundError:
            continue  # the job is over
        except OSError as err:
            raise VTorqueError(f"no control group {own} can be made: {err.strerror}", code=Code.LAUNCH) from err
        lists.append(own / group.hierarchy.list_name)
    return JobGroup(tuple(lists))


def _root(group: Group) -> Path:
    return group.hierarchy.mount / group.path.root


def _lock(group: Group) -> Path:
    """What Slurm locks (flock(2)) while it makes or removes groups: v1 the whole hierarchy, v2 its own root in it."""
    return _root(group) if group.hierarchy.kind == "cgroup2" else group.hierarchy.mount


def _open_cpuset(own: Path) -> None:
    """Give a new cpuset of cgroup v1 what the one above has; elsewhere there are no such files, or they say it."""
    if (own / "cpuset.cpus.effective").exists():
        return
    for name in _OF_CPUSETS:
        with suppress(FileNotFoundError):
            (own / name).write_text((own.parent / name).read_text())


def undo_group(step: Mapping[str, Any], patience_s: float) -> None:
    """Remove a group with what is still in it, and those above that the batch system had to leave for it.

    Raises OSError, KeyError.
    """
    own, root, lock = (Path(str(step[key])) for key in ("path", "root", "lock"))
    deadline = time.monotonic() + patience_s
    _empty(own, deadline)
    with suppress(FileNotFoundError):
        own.rmdir()
    if any(entry.is_dir() for entry in _entries(own.parent)):
        return  # the job goes on: the batch system comes for it
    with _locked(lock, deadline):
        for folder in own.parents:
            if folder == root or root not in folder.parents:
                break
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass  # by the batch system, or an undoing that was cut short
            except OSError:
                break  # there are other groups, or processes, in it


def _empty(own: Path, deadline: float) -> None:
    """End what is in a group: guests' processes, which have been ended already, and what they have left."""
    found = [each for each in map(process.identify, _pids(own)) if each is not None]
    still = _pids(own)  # a number that has a new owner is not there any more
    for each in found:
        if each.pid in still:
            process.end(each, timeout_s=max(0.0, deadline - time.monotonic()), sig=signal.SIGKILL)


def _pids(own: Path) -> list[int]:
    try:
        return [int(pid) for pid in (own / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


@contextmanager
def _locked(folder: Path, deadline: float) -> Iterator[None]:
    """Hold the lock of a folder, which every user can take too and keep: OSError when it is not free in time."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield  # the hierarchy is gone
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting = threading.Thread(target=_wait_for_lock, args=(fd,), daemon=True)
            waiting.start()
            waiting.join(max(0.0, deadline - time.monotonic()))
            if waiting.is_alive():
                raise OSError(f"{folder} is locked by another process") from None
        yield
    finally:
        os.close(fd)


def _wait_for_lock(fd: int) -> None:
    with suppress(OSError):  # nobody waits any more, and it is closed
        fcntl.flock(fd, fcntl.LOCK_EX)
