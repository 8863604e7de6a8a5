"""Child processes of the daemon: other identities, awaited through pidfds, ended with their session.

A child is forked and becomes a session leader, but does nothing until the daemon has recorded it: should the
daemon die in between, the child sees the end of a pipe and is gone. Only the child touches paths that a user
controls, with the user's rights; the daemon never waits for it except through its pidfd. The daemon has one
thread, which is what makes forking without exec sound.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import termios
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Callable, NamedTuple, NoReturn, Optional

from vmgr.node.process import boot_id, start_ticks

if TYPE_CHECKING:
    from vsub.engines.local.namespaces import Place

SETUP_FAILED = 254
"""Exit status of a child whose program could not be started."""

_NEVER = 1 << 62
"""The start time of a child that had ended before it was recorded: no process is that young."""


class Mark(NamedTuple):
    """A session leader that can be found again: a pid alone may belong to someone else tomorrow."""

    pid: int
    start: int
    boot: str
    uid: int


class Identity(NamedTuple):
    """Whose rights a child has."""

    uid: int
    gid: int
    groups: tuple[int, ...]


ROOT = Identity(0, 0, ())


class Streams(NamedTuple):
    """Descriptors of a child's standard input, output and error."""

    stdin: int
    stdout: int
    stderr: int


class Program(NamedTuple):
    """What a child becomes: everything that differs from the daemon."""

    path: str
    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    directory: str
    umask: int
    limits: tuple[tuple[int, int], ...] = ()
    nice: int = 0
    ignore_sigpipe: bool = True
    blocked: tuple[signal.Signals, ...] = ()
    terminal: bool = False
    """Whether standard input becomes the controlling terminal."""
    find: Optional[Callable[[], str]] = None
    """Finds the path with the child's rights, which then is the name of the program as well."""
    check: Optional[Callable[[str], Optional[int]]] = None
    """Looks at the path with the child's rights; a number ends the child with that status instead."""


def _session(pid: int) -> int:
    """The session of a process, 0 when there is none."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _members(mark: Mark) -> list[int]:
    """Living processes of the marked session.

    When the leader is gone its number stays taken as long as a member lives, so the others still count if
    they are not older than the leader and have its uid. For root, whose hooks may leave processes behind on
    purpose, the leader itself has to be there.
    """
    leader = start_ticks(mark.pid)
    if leader is not None and leader != mark.start:
        return []
    if mark.uid == 0 and leader is None:
        return []
    found = []
    for entry in os.listdir("/proc"):  # noqa: PTH208 - names, thousands of them
        if not entry.isdigit():
            continue
        pid = int(entry)
        if pid != mark.pid and _session(pid) != mark.pid:
            continue
        start = start_ticks(pid)
        if start is None or start < mark.start:
            continue
        try:
            if leader is None and os.stat(f"/proc/{pid}").st_uid not in (mark.uid, 0):
                continue
        except (FileNotFoundError, ProcessLookupError):
            continue
        found.append(pid)
    return found


def _open_members(mark: Mark) -> Iterable[int]:
    """A pidfd for each member, which the caller closes."""
    if mark.boot != boot_id():
        return
    for pid in _members(mark):
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        if pid != mark.pid and _session(pid) != mark.pid:
            os.close(pidfd)
            continue
        yield pidfd


def _send(pidfd: int, number: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True


def signal_session(mark: Mark, number: int) -> int:
    """Send a signal to every process of the session; returns how many got it."""
    count = 0
    for pidfd in _open_members(mark):
        count += _send(pidfd, number)
        os.close(pidfd)
    return count


async def readable(descriptor: int, timeout_s: Optional[float] = None) -> bool:
    """Wait until a descriptor can be read; False when time was up first."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(descriptor, event.set)
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except asyncio.TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)
    return True


async def writable(descriptor: int) -> None:
    """Wait until a descriptor can be written."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_writer(descriptor, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_writer(descriptor)


async def _gone(pidfds: Sequence[int], deadline: float) -> bool:
    """Wait for the end of some processes, whose pidfds are closed then; False when time was up first."""
    try:
        for pidfd in pidfds:
            if not await readable(pidfd, max(0.0, deadline - time.monotonic())):
                return False
        return True
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


async def session_ended(mark: Mark, patience_s: float) -> bool:
    """Wait until nothing is left in the session; False when something is, after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while pidfds := list(_open_members(mark)):
        if not await _gone(pidfds, deadline):
            return False
    return True


async def end_session(mark: Mark, patience_s: float = 5.0) -> bool:
    """Kill everything in the session and wait for it to be gone; False when something did not die in time."""
    deadline = time.monotonic() + patience_s
    while True:
        stopped, before = signal_session(mark, signal.SIGSTOP), 0
        while stopped > before:  # what is stopped cannot fork behind our back
            stopped, before = signal_session(mark, signal.SIGSTOP), stopped
        pidfds = list(_open_members(mark))
        if not pidfds:
            return True
        for pidfd in pidfds:
            _send(pidfd, signal.SIGKILL)
        if not await _gone(pidfds, deadline):
            return False


class Ended(NamedTuple):
    """How a child ended: exit status (128 + n for signal n, as shells say), the signal or 0, its usage."""

    status: int
    signal: int
    cpu_s: float
    memory_kib: int


class Child:
    """A started child. Its end is awaited with `wait`, as often as wanted."""

    def __init__(self, pid: int, pidfd: int, mark: Mark) -> None:
        self.mark = mark
        self._pid = pid
        self._pidfd = pidfd
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Ended] = loop.create_future()
        loop.add_reader(pidfd, self._reap)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        _, raw, usage = os.wait4(self._pid, 0)
        number = os.WTERMSIG(raw) if os.WIFSIGNALED(raw) else 0
        status = 128 + number if number else os.WEXITSTATUS(raw)
        if not self._ended.done():
            self._ended.set_result(Ended(status, number, usage.ru_utime + usage.ru_stime, usage.ru_maxrss))

    @property
    def ended(self) -> bool:
        """Whether the child is gone."""
        return self._ended.done()

    async def wait(self, timeout_s: Optional[float] = None) -> Optional[Ended]:
        """How it ended, or None when it still runs after `timeout_s`."""
        await asyncio.wait({self._ended}, timeout=timeout_s)
        return self._ended.result() if self._ended.done() else None


def start(
    body: Callable[[], int],
    *,
    identity: Identity,
    streams: Streams,
    record: Callable[[Mark], None],
    keep: Sequence[int] = (),
    place: Optional[Place] = None,
) -> Child:
    """Fork a child that runs `body` (which may exec) in a session of its own with the rights of `identity`.

    `record` gets the child's mark before the child does anything. Descriptors beyond the standard three are
    closed in the child, except those in `keep`. In a simulated node, `place`, the child has the pid that we see
    and another one that it sees itself. Raises OSError when there can be no child; what `record`
    raises passes on.
    """
    go_read, go_write = os.pipe()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork() if place is None else place.fork()
        if pid == 0:
            _run_child(body, identity, streams, go_read, go_write, keep, place)
    except OSError:
        os.close(go_write)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(go_read)
    pidfd = os.pidfd_open(pid)
    begun = start_ticks(pid)
    child = Child(pid, pidfd, Mark(pid, _NEVER if begun is None else begun, boot_id(), identity.uid))
    try:
        record(child.mark)
        os.write(go_write, b"g")
    except BrokenPipeError:
        pass  # killed already: its end is reported as any other
    finally:
        os.close(go_write)
    return child


def _run_child(
    body: Callable[[], int],
    identity: Identity,
    streams: Streams,
    go_read: int,
    go_write: int,
    keep: Sequence[int],
    place: Optional[Place],
) -> NoReturn:
    """Everything between fork and exec; never returns."""
    status = SETUP_FAILED
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}:
            signal.signal(number, signal.SIG_DFL)
        os.close(go_write)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if os.read(go_read, 1) == b"g":
            set_streams(streams, keep if place is None else (*keep, *place.descriptors))
            if place is not None:
                place.enter()
            os.setgroups(identity.groups)
            os.setresgid(identity.gid, identity.gid, identity.gid)
            os.setresuid(identity.uid, identity.uid, identity.uid)
            status = body()
    except BaseException as error:
        complain(f"PBS: {error}\n")
    os._exit(status)


def complain(text: str) -> None:
    """Say something on a child's standard error, past all buffers."""
    try:
        os.write(2, text.encode("utf-8", "backslashreplace"))
    except OSError:
        pass


def set_streams(streams: Streams, keep: Sequence[int]) -> None:
    """Make the three standard descriptors, close all others but `keep`."""
    saved = [os.dup(descriptor) for descriptor in streams]
    for target, descriptor in enumerate(saved):
        os.dup2(descriptor, target)
    wanted = {0, 1, 2, *keep}
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if int(entry) not in wanted:
            try:
                os.close(int(entry))
            except OSError:
                pass  # the descriptor of the listing itself


def become(program: Program) -> Callable[[], int]:
    """A body for `start` that turns the child into a program. What fails is said on its standard error."""

    def body() -> int:
        os.umask(program.umask)
        try:
            os.chdir(program.directory)
        except OSError as error:
            complain(f"PBS: chdir to {program.directory} failed: {error.strerror}\n")
            return SETUP_FAILED
        path, argv = program.path, program.argv
        if program.find is not None:
            path = program.find()
            argv = (path, *argv[1:])
        if program.check is not None:
            verdict = program.check(path)
            if verdict is not None:
                return verdict
        if program.nice:
            try:
                os.nice(program.nice)
            except OSError:
                pass
        if not program.ignore_sigpipe:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, program.blocked)
        for which, amount in program.limits:
            _, hard = resource.getrlimit(which)
            value = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
            resource.setrlimit(which, (value, value))
        try:
            if program.terminal:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            os.execve(path, argv, dict(program.environment))
        except OSError as error:
            complain(f"PBS: cannot start {path}: {error.strerror}\n")
        return SETUP_FAILED

    return body
