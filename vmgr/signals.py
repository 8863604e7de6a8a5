"""The signals that ask a program to end, and work that they must not cut in two."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def undisturbed() -> Iterator[set[int]]:
    """Put off what ends us until this is left, for this process and for those that it starts, which inherit it.

    Gives the signals that were put off before, for a program that is not to inherit more.
    """
    before: set[int] = set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # one that has just come is handled in here
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
