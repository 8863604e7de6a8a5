"""Starting other programs: no shell, no descriptor left open, signals as a program expects them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn, Optional

from vmgr.errors import Code, VTorqueError

_DEFAULTS = (signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that Python ignores, and that a program of its own must not inherit as ignored."""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAST_WORD_SECONDS = 10.0
"""What a program that was told to end, and what it has started, may take to say whether it has done its work."""


def restore_locale() -> None:
    """Take back what Python set in the environment, or what it changed there, before any of it could run (PEP 538).

    A job would inherit it from `qsub -V`. The kernel keeps the environment with which the process began.
    """
    if "LC_CTYPE" not in os.environ:
        return
    try:
        with open("/proc/self/environ", "rb") as stream:
            found = [item for item in stream.read().split(b"\0") if item.startswith(b"LC_CTYPE=")]
    except OSError:
        return
    if found:
        os.environb[b"LC_CTYPE"] = found[-1].partition(b"=")[2]
    else:
        del os.environ["LC_CTYPE"]


def spawn(
    argv: list[str],
    *,
    stdin: Optional[str] = None,
    stdout: Optional[int] = None,
    mask: Optional[Iterable[int]] = None,
    environment: Optional[dict[str, str]] = None,
) -> int:
    """Start `argv` and give its process id. `stdin` is a path, `stdout` a descriptor, `mask` its blocked signals.

    What is not given is ours.
    """
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = []
    if stdin is not None:
        actions.append((os.POSIX_SPAWN_OPEN, 0, stdin, os.O_RDONLY, 0))
    if stdout is not None:
        actions.append((os.POSIX_SPAWN_DUP2, stdout, 1))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) if mask is None else mask
    surroundings = os.environ if environment is None else environment
    return os.posix_spawn(argv[0], argv, surroundings, file_actions=actions, setsigmask=blocked, setsigdef=_DEFAULTS)


class Ended(NamedTuple):
    """How a program ended: its exit status, what it wrote to standard output, and whether a signal to us ended it."""

    status: int
    output: bytes
    interrupted: bool


def run_captured(argv: list[str], environment: Optional[dict[str, str]] = None) -> Ended:
    """Run `argv` to its end, in our environment or another; the exit status is 128 + n for signal n.

    A signal that ends us ends it too, after `LAST_WORD_SECONDS` at the latest; what it said until then is told, for it
    may have done its work. From its end on INT, TERM and HUP are held back, so that what follows from it is done: until
    `let_signals_in`. Raises OSError.
    """
    reading, writing = os.pipe()
    parts: list[bytes] = []
    interrupted = False
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        try:
            child = spawn(argv, stdout=writing, mask=held, environment=environment)
        except BaseException:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            raise
        finally:
            os.close(writing)
        try:
            while _read(reading, parts, held):
                pass
        except KeyboardInterrupt:
            signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
            interrupted = True
            os.kill(child, signal.SIGTERM)
            if not _read_within(reading, parts, LAST_WORD_SECONDS):
                os.kill(child, signal.SIGKILL)
        except BaseException:
            end_child(child)
            raise
        return Ended(wait_status(child), b"".join(parts), interrupted)
    finally:
        os.close(reading)


def let_signals_in() -> None:
    """End what `run_captured` began: signals that came meanwhile have their effect now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


def _read(descriptor: int, parts: list[bytes], held: Iterable[int]) -> bool:
    """Read the next part; false at the end. Signals are let through, to the mask `held`, only while it waits for one:
    what was read is not lost.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, held)
    _is_readable(descriptor, None)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    return _take(descriptor, parts)


def _read_within(descriptor: int, parts: list[bytes], limit_s: float) -> bool:
    """Read to the end, which may take so many seconds; whether that has come."""
    deadline = time.monotonic() + limit_s
    while _is_readable(descriptor, max(0.0, deadline - time.monotonic())):
        if not _take(descriptor, parts):
            return True
    return False


def _is_readable(descriptor: int, limit_s: Optional[float]) -> bool:
    import select  # a job that goes to qsub at once does without

    ready = select.poll()
    ready.register(descriptor, select.POLLIN)
    return bool(ready.poll(None if limit_s is None else limit_s * 1000))


def _take(descriptor: int, parts: list[bytes]) -> bool:
    part = os.read(descriptor, 65536)
    parts.append(part)
    return bool(part)


def wait_status(child: int) -> int:
    """Wait for a child; gives its exit status, 128 + n for signal n."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 128 - code if code < 0 else code


def end_child(child: int) -> None:
    """End a child that nobody needs any more, and wait for it."""
    try:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def feed_standard_input(data: bytes) -> None:
    """Make `data` the standard input of this process, and so of what it starts or becomes."""
    descriptor = os.memfd_create("standard input", 0)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.dup2(descriptor, 0)
    os.close(descriptor)


def become(argv: list[str], environment: Optional[dict[str, str]] = None) -> NoReturn:
    """Turn this process into `argv`, in our environment or another.

    Raises VTorqueError (VT-ENGINE) if that cannot be.
    """
    for number in _DEFAULTS:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(argv[0], argv, os.environ if environment is None else environment)
    except (OSError, ValueError) as err:
        raise VTorqueError(f"cannot run {argv[0]}: {err}", code=Code.ENGINE) from err


@contextmanager
def ending_by_exception() -> Iterator[None]:
    """While this lasts, TERM and HUP end the program as Ctrl-C does, so that what it began is undone."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    held = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    changed = {number: handler for number, handler in held.items() if handler == signal.SIG_DFL}
    for number in changed:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)
