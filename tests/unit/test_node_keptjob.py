"""The job wrapper of a job that can be suspended: a real control socket, the guest's real runner on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
from keptsite import SHELLS, Site
from nodesite import short_folder

from vmgr.node import wrapper
from vmgr.node.client import AgentLink
from vmgr.node.control import Control
from vmgr.node.hookcall import OwnJob
from vmgr.node.keptjob import DETACH_SECONDS
from vmgr.node.state import Progress

PATIENCE_S = 120
COUNTER = """#!/bin/sh
n=0
while [ ! -e {base}/enough ]; do
    n=$((n + 1))
    echo $n
    : >{base}/up
    sleep 0.02
done
exit 6
"""


class Agent:
    """The agent's side: what it says, and what it is told."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch, script: str, **hooks: str) -> None:
        self.site = site
        self.directory = site.base / ".vtorque" / ("0" * 16) / ("0" * 64)
        self.directory.mkdir(parents=True)
        self.overs = 0
        self.answers: asyncio.Queue[tuple[object, object]] = asyncio.Queue()
        self.progress = Progress(0, {"node": "n1", "attempt": "1-2-3"})
        self.progress.state = "ready"
        spec: dict[str, Any] = {
            "workdir": str(site.base), "shell": "/bin/sh", "interactive": False, "arguments": "", "suspend": True,
            "script": None, "vm_prologue": None, "vm_epilogue": None,
        }  # fmt: skip
        for name, text in {"script": script, **hooks}.items():
            path = self.directory / name
            path.write_text(text.replace("{base}", str(site.base)))
            path.chmod(0o700)
            if name != "script":
                spec[name] = "x"
        monkeypatch.setattr(wrapper.JobWrapper, "_check_file", lambda *_: None)
        ssh = {"port": 22, "host_key": "ssh-ed25519 AAAA x"}
        self.progress.private = {"spec": spec, "ssh": ssh, "guest": "vn1-1", "directory": str(self.directory)}
        self._monkeypatch = monkeypatch

    def over(self) -> None:
        self.overs += 1
        if self.progress.state != "suspended":
            self.say("ended")

    def say(self, state: str, suspending: Optional[int] = None) -> None:
        self.progress.state = state
        self.progress.facts["suspending"] = suspending
        self.progress._wake()

    @asynccontextmanager
    async def job(self) -> AsyncIterator[wrapper.JobWrapper]:
        """The agent, and a wrapper to be run."""
        with short_folder() as folder:
            path = folder / "s"
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(path))
            control = Control(
                self.progress, os.getuid(), over=self.over, attached=lambda: None,
                detached=lambda number, error: self.answers.put_nowait((number, error)),
            )  # fmt: skip
            server = await control.serve(listener)
            self._monkeypatch.setattr(AgentLink, "open", lambda *_: AgentLink.connect(path))
            config: Any = type("Config", (), {"paths": None})
            job = wrapper.JobWrapper(config, OwnJob("12.host"), str(self.directory), {})
            job._files = type("Files", (), {"leave": lambda _, status, code: self.left.append(status)})()  # type: ignore[assignment]
            self.left: list[int] = []
            try:
                yield job
            finally:
                server.close()
                await control.drain(0.1)
                await self.site.nothing_is_left()

    async def suspend(self, number: int) -> object:
        """Have the script let go of; gives the error that the wrapper answers."""
        self.say(self.progress.state, number)
        said, error = await self.answers.get()
        assert said == number
        return error


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    place = Site(tmp_path, SHELLS[0])
    place.lead_there(monkeypatch)
    yield place
    assert place.left() == []


def run(work: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(work(), PATIENCE_S))


async def until(true: Callable[[], object]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def test_a_suspension_that_is_called_off(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def work() -> None:
        agent = Agent(site, monkeypatch, COUNTER, vm_prologue="echo pro\n", vm_epilogue="echo epi\n")
        async with agent.job() as job:
            running = asyncio.ensure_future(job.run())
            await until(lambda: (site.base / "up").exists())
            assert agent.progress.state == "running"
            assert await agent.suspend(1) is None
            assert await agent.suspend(2) is None, "it is detached already"
            (site.base / "up").unlink()
            agent.say("running")
            await until(lambda: (site.base / "up").exists())
            (site.base / "enough").touch()
            assert await running == 6
        assert agent.left == [6] and agent.overs >= 1 and agent.progress.job_status == 6

    run(work)
    said = capfd.readouterr().out.split()
    assert (said[0], said[-1]) == ("pro", "epi") and said[1:-1] == [str(n) for n in range(1, len(said) - 1)]


def test_a_suspended_job_goes_on_in_another_attempt(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def work() -> None:
        agent = Agent(site, monkeypatch, COUNTER, vm_prologue="echo pro\n", vm_epilogue="echo epi\n")
        site_left = site.nothing_is_left
        monkeypatch.setattr(site, "nothing_is_left", lambda: asyncio.sleep(0))
        async with agent.job() as job:
            running = asyncio.ensure_future(job.run())
            await until(lambda: (site.base / "up").exists())
            assert await agent.suspend(3) is None
            job._signal(signal.SIGUSR1)  # nobody is attached who could take it
            assert not running.done()
            agent.say("suspended", 3)
            assert await running == 128 + signal.SIGUSR1
            assert agent.left == [] and agent.progress.job_status is None
        monkeypatch.setattr(site, "nothing_is_left", site_left)
        agent.say("ready")
        agent.progress.facts["attempt"] = "4-5-6"
        agent.progress.private["resumed"] = True
        (site.base / "enough").touch()
        async with agent.job() as job:
            assert await job.run() == 6
        assert agent.left == [6]

    run(work)
    said = capfd.readouterr().out.split()
    assert (said[0], said.count("pro"), said[-1]) == ("pro", 1, "epi")
    assert said[1:-1] == [str(n) for n in range(1, len(said) - 1)]


@pytest.mark.parametrize("resumed", [True, False])
def test_a_job_that_is_ended_before_it_goes_on(site: Site, monkeypatch: pytest.MonkeyPatch, resumed: bool) -> None:
    """What is stored of it is as it was, and its next start needs the job directory."""

    async def work() -> None:
        agent = Agent(site, monkeypatch, COUNTER)
        agent.progress.private["resumed"] = resumed
        agent.say("booting")
        async with agent.job() as job:
            running = asyncio.ensure_future(job.run())
            await until(lambda: job._snapshot.get("state") == "booting")
            job._signal(signal.SIGTERM)
            assert await running == 128 + signal.SIGTERM
        assert agent.left == ([] if resumed else [128 + signal.SIGTERM]) and agent.overs > 0

    run(work)


def test_a_suspended_wrapper_waits_for_its_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        agent = Agent(site, monkeypatch, COUNTER)
        site_left = site.nothing_is_left
        monkeypatch.setattr(site, "nothing_is_left", lambda: asyncio.sleep(0))
        async with agent.job() as job:
            running = asyncio.ensure_future(job.run())
            await until(lambda: (site.base / "up").exists())
            assert await agent.suspend(1) is None
            agent.say("suspended", 1)
            await until(lambda: job._suspended)
            job._signal(signal.SIGCONT)
            await asyncio.sleep(0.1)
            assert not running.done()
            job._signal(signal.SIGTERM)
            assert await running == 128 + signal.SIGTERM and agent.left == []
        for process in (*site.processes("--keep"), *site.processes("session/script")):
            process.kill()
        for path in site.session.iterdir():
            path.unlink()
        for path in site.base.glob("place.*"):
            path.rmdir()
        await site_left()

    run(work)


def test_what_cannot_be_let_go_of(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def hook(name: str) -> str:
        return f"touch {{base}}/{name}; while [ ! -e {{base}}/on-{name} ]; do sleep 0.05; done\n"

    async def work() -> None:
        agent = Agent(site, monkeypatch, "exit 3\n", vm_prologue=hook("pro"), vm_epilogue=hook("epi"))
        async with agent.job() as job:
            running = asyncio.ensure_future(job.run())
            await until(lambda: (site.base / "pro").exists())
            early = await agent.suspend(1)
            agent.say("ready")
            (site.base / "on-pro").touch()
            await until(lambda: (site.base / "epi").exists())
            late = await agent.suspend(2)
            agent.say("running")
            (site.base / "on-epi").touch()
            assert await running == 3
        assert early == "its script has not started yet" and late == "its script has ended"
        assert DETACH_SECONDS < 60, "the agent's patience"

    run(work)
    capfd.readouterr()
