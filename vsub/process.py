"""Starting other programs: no shell, no descriptor left open, signals as a program expects them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, Optional

from vmgr.errors import Code, VTorqueError

_DEFAULTS = (signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that Python ignores, and that a program of its own must not inherit as ignored."""


def spawn(argv: list[str], *, stdin: Optional[str] = None, stdout: Optional[int] = None) -> int:
    """Start `argv` and give its process id. `stdin` is a path, `stdout` a descriptor; otherwise they are ours."""
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = []
    if stdin is not None:
        actions.append((os.POSIX_SPAWN_OPEN, 0, stdin, os.O_RDONLY, 0))
    if stdout is not None:
        actions.append((os.POSIX_SPAWN_DUP2, stdout, 1))
    return os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsigdef=_DEFAULTS)


def run_captured(argv: list[str]) -> tuple[int, bytes]:
    """Run `argv` to its end; gives its exit status (128 + n for signal n) and what it wrote to standard output."""
    reading, writing = os.pipe()
    try:
        child = spawn(argv, stdout=writing)
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    parts = []
    with os.fdopen(reading, "rb", buffering=0) as stream:
        try:
            while part := stream.read(65536):
                parts.append(part)
        except BaseException:
            end_child(child)
            raise
    return wait_status(child), b"".join(parts)


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


def become(argv: list[str]) -> NoReturn:
    """Turn this process into `argv`. Raises VTorqueError (VT-ENGINE) if that cannot be."""
    for number in _DEFAULTS:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(argv[0], argv)
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
