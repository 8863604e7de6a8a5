"""Work that signals must not cut in two."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest
from interrupting import Told

from vmgr.signals import ENDING, undisturbed

pytestmark = pytest.mark.usefixtures("told")


def _put_off() -> set[Any]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_signals_come_when_the_work_is_done() -> None:
    done = False
    with pytest.raises(Told), undisturbed():
        signal.raise_signal(signal.SIGTERM)
        assert set(ENDING) <= _put_off()
        done = True
    assert done and not set(ENDING) & _put_off()


def test_other_threads_take_none_for_us() -> None:
    """The kernel gives a signal to any thread that has not put it off; Python handles it in the main one."""
    done, over = False, threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    try:
        with pytest.raises(Told), undisturbed():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            done = True
    finally:
        over.set()
        other.join()
    assert done and signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_what_was_put_off_before_is_told_and_stays() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    before = _put_off()
    with undisturbed() as told:
        assert told == before
    assert _put_off() == before and signal.SIGHUP in before


def test_a_signal_that_comes_just_before_leaves_none_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python calls the handler of one that has come by then when pthread_sigmask has changed the mask, and is in it."""
    change = signal.pthread_sigmask

    def changed(how: int, mask: Iterable[int]) -> set[Any]:
        found = change(how, mask)
        if how == signal.SIG_BLOCK and tuple(mask):
            raise Told
        return found

    before = _put_off()
    with monkeypatch.context() as patched, pytest.raises(Told):
        patched.setattr(signal, "pthread_sigmask", changed)
        with undisturbed():
            raise AssertionError("not reached")
    assert _put_off() == before
