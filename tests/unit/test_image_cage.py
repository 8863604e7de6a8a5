"""The program that runs a step of an image build: what a signal does to it, and to nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from vmgr.images import cage


@pytest.fixture
def term() -> Iterator[None]:
    """SIGTERM is blocked, as where a cage begins to wait; afterwards it is as before, and none is pending."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGTERM, handler)


def child(status: int) -> int:
    pid = os.fork()
    if pid == 0:
        if not status:
            signal.pause()
        os._exit(status)
    return pid


def test_a_process_that_was_waited_for_is_not_killed(term: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id may be another's by then."""
    killed: list[int] = []
    waitpid = os.waitpid

    def reaped(pid: int, options: int) -> tuple[int, int]:
        found = waitpid(pid, options)
        signal.raise_signal(signal.SIGTERM)  # to this thread: a cage has no other, a test runner has
        return found

    monkeypatch.setattr(os, "waitpid", reaped)
    monkeypatch.setattr(os, "kill", lambda pid, _number: killed.append(pid))
    assert cage._ended(child(3)) == 3
    assert killed == []


def test_one_that_runs_is_killed(term: None) -> None:
    pid = child(0)
    signal.raise_signal(signal.SIGTERM)
    assert cage._ended(pid) == 128 + signal.SIGKILL
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
