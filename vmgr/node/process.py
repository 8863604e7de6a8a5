"""Processes as they are recorded: by boot, pid and start time, and ended through a pidfd."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Process(NamedTuple):
    """One process, told apart from every other that ever had its pid.

    `start` is its start in clock ticks since the boot (field 22 of `/proc/PID/stat`, proc(5)).
    """

    boot: str
    pid: int
    start: int


def recorded(step: Mapping[str, Any]) -> Process:
    """The process in a step of a record. Raises KeyError, TypeError or ValueError for what is none."""
    return Process(str(step["boot"]), int(step["pid"]), int(step["start"]))


def boot_id() -> str:
    """The kernel's random id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identify(pid: int) -> Optional[Process]:
    """The identity of a running process, None when there is none with this pid."""
    start = start_ticks(pid)
    return None if start is None else Process(boot_id(), pid, start)


def start_ticks(pid: int) -> Optional[int]:
    """When a process started, in clock ticks since the boot; None when it is gone or only waits to be reaped."""
    state, start = _stat(pid)
    return None if state in (b"Z", b"X") else start


def started(pid: int) -> Optional[int]:
    """The same, also for one whose first thread has ended, which looks as if it only waited to be reaped."""
    return _stat(pid)[1]


def cpu_seconds(pid: int) -> Optional[float]:
    """CPU time that a process has used, with that of its threads (fields 14 and 15); None when it is gone."""
    fields = _fields(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND if fields else None


def resident_bytes(pid: int) -> int:
    """Memory that a process has, also where it is swapped out or lies in huge pages (proc(5)); 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return 0
    fields = [line.split() for line in lines if line.startswith(("VmRSS:", "VmSwap:", "HugetlbPages:"))]
    return sum(int(field[1]) << 10 for field in fields)


def _stat(pid: int) -> tuple[bytes, Optional[int]]:
    fields = _fields(pid)
    return (fields[0], int(fields[19])) if fields else (b"", None)


def _fields(pid: int) -> list[bytes]:
    """What follows the name in `/proc/PID/stat`: field 3 (proc(5)) comes first; nothing when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return []
    return stat[stat.rindex(b")") + 2 :].split()


def given_environment() -> dict[str, str]:
    """The environment that this program was started with: Python sets LC_CTYPE in the C locale (PEP 538)."""
    given = dict(os.environ)
    try:
        block = Path("/proc/self/environ").read_bytes()
    except OSError:
        return given
    given.pop("LC_CTYPE", None)
    for entry in block.split(b"\0"):
        if entry.startswith(b"LC_CTYPE="):
            given["LC_CTYPE"] = os.fsdecode(entry[len(b"LC_CTYPE=") :])
    return given


def seconds_since(start: int) -> float:
    """Seconds from a start in clock ticks to now."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start / TICKS_PER_SECOND


def end(process: Process, *, timeout_s: float, sig: int = signal.SIGKILL) -> bool:
    """Send `sig` (0: none) to exactly this process and wait until it is gone; false when it is still there at the end.

    The pidfd is opened before the identity is compared, so that the signal cannot reach a later owner of the pid.
    A process whose first thread has ended looks like a zombie and may live on in the others: only the pidfd tells.
    Raises OSError when the kernel will not say.
    """
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if process.boot != boot_id() or _stat(process.pid)[1] != process.start:
            return True
        try:
            signal.pidfd_send_signal(fd, sig)
        except ProcessLookupError:
            return True
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(fd)


def threads(pid: int) -> set[int]:
    """The ids of a process's threads. Raises OSError when it is gone."""
    return {int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()}


def pin(pid: int, cpus: Iterable[int]) -> None:
    """Bind a process, with all threads that it has and will start, to CPUs; fine when it has ended."""
    with suppress(OSError):
        for tid in threads(pid):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(tid, cpus)


def kernel_threads(name: str) -> list[int]:
    """The kernel's own threads of that name."""
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text().strip() == name and not (comm.parent / "cmdline").read_bytes():
                found.append(int(comm.parent.name))
        except OSError:
            pass  # it has ended
    return found


def dies_with(parent: int, joins: Sequence[int] = (), mask: Optional[Iterable[int]] = None) -> Callable[[], None]:
    """What a child does last before its program: ask to be killed when `parent` dies, and give up gaining privileges.

    For `preexec_fn`, which runs after the change of user that would undo the request (prctl(2)). `joins` are the opened
    lists of control groups into which it goes, as far as the kernel lets it; `mask` is what signals it blocks, where
    those that we do are not meant for it.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for fd in joins:
            with suppress(OSError):
                os.write(fd, b"0")  # the writer itself (cgroups(7))
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return prepare


def adopt_orphans() -> None:
    """Become the parent of descendants whose parents end, in place of the machine's first process (prctl(2))."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
