"""What outlives a node agent: it does its work when the agent dies, and is gone otherwise."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodesite import a_user, make_node, short_folder

from vmgr.node import process, record
from vmgr.node.survivor import Survivor
from vmgr.node.undo import undo

PATIENCE_S = 60.0


class Site:
    """An attempt on a node, whose agent is a process of its own."""

    def __init__(self, base: Path) -> None:
        self.node = make_node(base)
        self.place = self.node.place()
        self._lock, self._listener = record.create(self.place, {"job_id": "12.host"})
        self.done = base / "done"
        self.agent = 0

    def begin(self, *, dismisses: bool = False) -> process.Process:
        """Start the agent; gives what outlives it."""
        here, word = os.pipe()
        self.agent = os.fork()
        if not self.agent:
            try:
                self._live(word, dismisses=dismisses)
            finally:
                os._exit(0)
        os.close(word)
        assert os.read(here, 1) == b"."
        os.close(here)
        (step,) = [step for step in record.steps(self.place) if step.get("role") == "witness"]
        return process.recorded(step)

    def _live(self, word: int, *, dismisses: bool) -> None:
        import asyncio

        async def work() -> None:
            self.done.write_text("done")

        async def live() -> None:
            survivor = Survivor(self.node.config, a_user(uid=os.getuid()), self.place, "12.host", role="witness")
            survivor.call(work)
            if dismisses:
                survivor.dismiss()
            os.write(word, b".")
            await asyncio.sleep(PATIENCE_S)

        asyncio.run(live())

    def kill(self) -> None:
        if self.agent:
            os.kill(self.agent, signal.SIGKILL)
            os.waitpid(self.agent, 0)
            self.agent = 0

    def close(self) -> None:
        self.kill()
        os.close(self._lock)
        self._listener.close()


def gone(survivor: process.Process) -> bool:
    """Wait until a process is gone."""
    deadline = time.monotonic() + PATIENCE_S
    while process.identify(survivor.pid) == survivor:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return True


@pytest.fixture
def site() -> Iterator[Site]:
    with short_folder() as base:
        here = Site(base)
        yield here
        here.close()


def test_it_works_when_the_agent_dies(site: Site) -> None:
    survivor = site.begin()
    assert not site.done.exists()
    site.kill()
    assert gone(survivor) and site.done.exists()


def test_one_that_is_dismissed_does_nothing(site: Site) -> None:
    survivor = site.begin(dismisses=True)
    assert gone(survivor)
    site.kill()
    assert not site.done.exists()


def test_it_does_nothing_for_a_job_whose_epilogue_has_come(site: Site) -> None:
    survivor = site.begin()
    record.bury(site.node.config.paths, "12.host", site.place.start + 1)
    site.kill()
    assert gone(survivor) and not site.done.exists()


def test_it_ends_with_what_is_undone(site: Site) -> None:
    survivor = site.begin()
    os.kill(survivor.pid, signal.SIGSTOP)
    site.kill()
    assert undo(site.place) == []
    assert process.identify(survivor.pid) != survivor and not site.done.exists()
