"""What vsub says to the user: everything but the job's id goes to standard error, one line at a time."""

from __future__ import annotations

import sys

from vmgr.errors import printable

_debugging = False


def set_debugging(on: bool) -> None:
    """Whether `debug` prints."""
    global _debugging
    _debugging = on


def say(text: str) -> None:
    """One line to the user, whatever `text` holds; a closed standard error stops nothing."""
    try:
        print(f"vsub: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:
        pass


def debug(text: str) -> None:
    """One line for `--debug`."""
    if _debugging:
        say(f"debug: {text}")
