"""The signals that ask a program to end, and work that they must not cut in two."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def undisturbed() -> Iterator[set[int]]:
    """Put off what ends us until this is left, for this process and for those that it starts, which inherit it.

    Gives the signals that were put off before, for a program that is not to inherit more.
    """
    before: set[int] = set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    came: list[int] = []
    with ExitStack() as then:
        then.callback(_raise_first, came)
        then.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        for number in ENDING:
            handler = signal.getsignal(number)
            if handler is not None and handler != signal.SIG_IGN:
                then.callback(signal.signal, number, handler)
                # another thread of ours, whose mask is its own, may get it; this one would handle it at once
                signal.signal(number, lambda got, _: came.append(got))
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # one that has just come is handled in here
        yield before


def _raise_first(came: list[int]) -> None:
    for number in came[:1]:
        signal.raise_signal(number)
