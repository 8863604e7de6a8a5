"""What vsub says to the user: everything but the job's id goes to standard error, one line at a time."""

from __future__ import annotations

import errno
import os
import sys

from vmgr.errors import printable

_debugging = False


def set_debugging(on: bool) -> None:
    """Whether `debug` prints."""
    global _debugging
    _debugging = on


def say(text: str) -> None:
    """One line to the user, whatever `text` holds; a closed standard error stops nothing."""
    if sys.stderr is None:  # closed when we began: print would take standard output instead
        return
    try:
        print(f"vsub: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:
        pass


def put(data: bytes) -> None:
    """Write to standard output, whole. Raises OSError when it is full or was closed when we began."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    try:
        sys.stdout.write(os.fsdecode(data))
        sys.stdout.flush()
    except OSError:
        sys.stdout = None  # else the interpreter tries again at its end, and fails with it
        raise


def debug(text: str) -> None:
    """One line for `--debug`."""
    if _debugging:
        say(f"debug: {text}")
