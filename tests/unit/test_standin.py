"""What stands in for an agent that dies while its job is stored: in processes of their own, without guests or store."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
from nodesite import a_user, make_node, short_folder

from vmgr.errors import Code, VTorqueError
from vmgr.node import record, standin
from vmgr.node.client import AgentLink
from vmgr.node.process import identify
from vmgr.node.returning import Means
from vmgr.node.standin import StandIn
from vmgr.suspended.entry import Entry

ENTRY = Entry("12.host", "carol", "0" * 64, "micro@1", "k", 1, 1, 1000, 5)
PATIENCE_S = 60.0


class Site:
    """A node with an attempt, whose agent is a process of its own; store and batch system write down what they do."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.node = make_node(base, suspended={"folder": str(base / "suspended")})
        self.place = self.node.place()
        self.lock, self.listener = record.create(self.place, {"job_id": "12.host"})
        self.told = base / "told"
        self.told.touch()
        self.entry: Optional[Entry] = ENTRY
        self.refuses: Optional[str] = None
        self.agent = 0
        monkeypatch.setattr(standin, "means_of", self._means)
        monkeypatch.setattr(standin, "LAST_ANSWER_SECONDS", 0.5)  # for who follows, and does not leave

    def _means(self, _config: object, _user: object, job_id: str, attached: Any, over: Any, fellows: object) -> Means:
        assert fellows is None

        class Notes:
            @staticmethod
            async def find(_: str) -> Optional[tuple[Entry, tuple[()]]]:
                return None if self.entry is None else (self.entry, ())

            @staticmethod
            async def note(_: str, text: str) -> None:
                self.note(f"note {text}")

        async def call_over() -> None:
            self.note("over")

        def asks(what: str) -> Callable[[str], object]:
            def ask(job: str) -> None:
                self.note(f"{what} {job}")
                if self.refuses == what:
                    raise VTorqueError(f"{what} is refused", code=Code.ENGINE)

            return ask

        return Means(job_id, Notes, attached, over, PATIENCE_S, asks("hold"), asks("requeue"), call_over)

    def note(self, text: str) -> None:
        with open(self.told, "a") as told:
            told.write(f"{text} [{os.getpid()}]\n")

    def done(self) -> list[str]:
        """What has been done, by another process than the agent."""
        lines = [line.rpartition(" [") for line in self.told.read_text().splitlines()]
        assert all(int(pid.rstrip("]")) not in (self.agent, os.getpid()) for _, _, pid in lines)
        return [text for text, _, _ in lines]

    def begin(self, calls: Callable[[StandIn], None]) -> None:
        """Start the agent, which has told what stands in for it."""
        here, word = os.pipe()
        self.agent = os.fork()
        if not self.agent:
            try:

                async def live() -> None:
                    calls(StandIn(self.node.config, a_user(uid=os.getuid()), self.place, "12.host", self.listener))
                    os.write(word, b".")
                    await asyncio.sleep(PATIENCE_S)

                asyncio.run(live())
            finally:
                os._exit(0)
        os.close(word)
        assert os.read(here, 1) == b"."
        os.close(here)
        os.close(self.lock)
        self.listener.close()

    def kill(self) -> None:
        os.kill(self.agent, signal.SIGKILL)
        os.waitpid(self.agent, 0)

    def serves(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.place.socket))
            except OSError:
                return False
        return True

    def until_gone(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.serves():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with short_folder() as base:
        yield Site(base, monkeypatch)


def follow(site: Site) -> list[dict[str, Any]]:
    """What the job's wrapper is told, until nobody is there any more."""

    async def work() -> list[dict[str, Any]]:
        link = await AgentLink.connect(site.place.socket)
        said = [snapshot async for snapshot in link.follow("attach")]
        link.close()
        return said

    return asyncio.run(asyncio.wait_for(work(), PATIENCE_S))


HELD = ["note VT-AGENT: the node agent has died; the node's log may say more", "hold 12.host", "over"]


@pytest.mark.parametrize("entry", [ENTRY, None], ids=["suspended", "going on"])
def test_the_job_of_an_agent_that_dies_waits_again(site: Site, entry: Optional[Entry]) -> None:
    site.begin(lambda stand_in: stand_in.call(entry))
    assert site.done() == []
    site.kill()
    said = follow(site)
    assert [one["state"] for one in said][-1] == "suspended" and said[-1]["returned"].startswith("VT-AGENT: ")
    assert said[-1]["code"] is None
    site.until_gone()
    assert site.done() == [*HELD, "requeue 12.host"]
    words = [step.get("word") for step in record.steps(site.place) if step["do"] == "entry"]
    assert words == (["settled"] if entry else []), "what undoes the attempt is not to say otherwise"


@pytest.mark.parametrize("refused", ["hold", "requeue"])
def test_what_the_batch_system_refuses_fails_the_job(site: Site, refused: str) -> None:
    site.refuses = refused
    site.begin(lambda stand_in: stand_in.call())
    site.kill()
    if refused == "requeue":  # it has been waited for until then
        said = follow(site)
        assert (said[-1]["state"], said[-1]["code"]) == ("failed", "VT-AGENT")
    site.until_gone()
    assert site.done() == (HELD[:2] if refused == "hold" else [*HELD, "requeue 12.host"])


def nothing(site: Site) -> None:
    site.entry = None


def another(site: Site) -> None:
    site.entry = ENTRY._replace(when=999)


def buried(site: Site) -> None:
    record.bury(site.node.config.paths, "12.host", site.place.start + 1)


@pytest.mark.parametrize("why", [nothing, another, buried])
def test_where_there_is_nothing_to_be_done(site: Site, why: Callable[[Site], None]) -> None:
    """Nothing is stored, or what is there is older, or the job's epilogue has ended the agent."""
    why(site)
    site.begin(lambda stand_in: stand_in.call(ENTRY))
    site.kill()
    site.until_gone()
    assert site.done() == []


def test_one_that_is_not_needed_any_more_ends(site: Site) -> None:
    def calls(stand_in: StandIn) -> None:
        stand_in.dismiss()
        stand_in.call()
        stand_in.call(ENTRY)
        stand_in.dismiss()
        stand_in.dismiss()

    site.begin(calls)
    site.kill()
    site.until_gone()
    assert site.done() == []


def test_one_that_was_ended_is_no_fault(site: Site) -> None:
    def calls(stand_in: StandIn) -> None:
        pids: list[int] = []
        fork = os.fork
        os.fork = lambda: pids.append(fork()) or pids[-1]  # type: ignore[func-returns-value]
        stand_in.call()
        if pids[0]:
            os.kill(pids[0], signal.SIGKILL)
            while identify(pids[0]) is not None:
                time.sleep(0.01)
        stand_in.dismiss()

    site.begin(calls)
    site.kill()
    site.until_gone()
    assert site.done() == []
