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

from vmgr.errors import Code, VTorqueError
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
        self.reached: asyncio.Queue[object] = asyncio.Queue()
        self.started: Optional[Callable[[object], None]] = None
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
                detached=lambda number, error: self.answers.put_nowait((number, error)), started=self.started,
            )  # fmt: skip
            server = await control.serve(listener)

            async def connect(*_: object) -> AgentLink:
                try:
                    return await AgentLink.connect(path)
                except OSError:
                    raise VTorqueError("there is none", code=Code.AGENT) from None

            self._monkeypatch.setattr(AgentLink, "open", connect)
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
    try:
        yield place
        assert place.left() == []
    finally:
        place.end()


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


class Suspended:
    """A job that has been suspended, its session still there, and what its next attempt is told."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
        self.site = site
        self.agent = Agent(site, monkeypatch, script)
        self._left = site.nothing_is_left
        monkeypatch.setattr(site, "nothing_is_left", lambda: asyncio.sleep(0))

    async def begin(self) -> None:
        agent = self.agent
        async with agent.job() as job:
            running = asyncio.ensure_future(job.run())
            await until(lambda: (self.site.base / "up").exists())
            assert await agent.suspend(1) is None
            agent.say("suspended", 1)
            await until(lambda: job._suspended)
            job._signal(signal.SIGTERM)
            await running
        (self.site.base / "up").unlink()
        agent.started = agent.reached.put_nowait
        agent.progress.private["resumed"] = True
        agent.say("ready")

    async def end(self) -> None:
        """End what is left, which nobody has let go on."""
        assert not (self.site.base / "up").exists() and not (self.site.base / "ended").exists()
        self.site.end()
        await until(lambda: not self.site.processes(""))
        for path in self.site.session.iterdir():
            path.unlink()
        for path in self.site.base.glob("place.*"):
            path.rmdir()


TRAPPING = COUNTER.replace("n=0", "trap ': >{base}/ended' HUP TERM\nn=0")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_goes_on_when_the_agent_lets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], shell: str
) -> None:
    """What is stored of the job is not taken away before the script is within reach, and it does not go on before."""
    site = Site(tmp_path, shell)
    site.lead_there(monkeypatch)

    async def work() -> None:
        job_before = Suspended(site, monkeypatch, COUNTER)
        await job_before.begin()
        agent = job_before.agent
        async with agent.job() as job:
            running = asyncio.ensure_future(job.run())
            assert await agent.reached.get() is None
            await asyncio.sleep(0.2)
            assert not (site.base / "up").exists() and agent.progress.state == "ready"
            job._signal(signal.SIGUSR2)  # for the script, which ends by it
            agent.say("running")
            assert await running == 128 + signal.SIGUSR2
        assert agent.left == [128 + signal.SIGUSR2] and agent.reached.empty()

    run(work)
    assert site.left() == []
    said = capfd.readouterr().out.split()
    assert said == [str(n) for n in range(1, len(said) + 1)]


@pytest.mark.parametrize("failed", [False, True])
def test_a_script_that_is_not_within_reach(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], failed: bool
) -> None:
    """The agent is told why, and the job goes back to where it was, or fails."""

    async def work() -> None:
        job_before = Suspended(site, monkeypatch, TRAPPING)
        await job_before.begin()
        agent = job_before.agent
        site.write("bin/ssh", "#!/bin/sh\necho 'no route' >&2\nexit 255\n")
        async with agent.job() as job:
            running = asyncio.ensure_future(job.run())
            error = await agent.reached.get()
            assert str(error).startswith("the connection to the guest vn1-1 failed or broke")
            assert not running.done()
            if failed:
                agent.progress.fail(VTorqueError("the batch system refuses", code=Code.LAUNCH))
                assert await running == Code.LAUNCH.status
                assert agent.left == [Code.LAUNCH.status]
            else:
                agent.progress.facts["returned"] = "VT-CONNECT: no route"
                agent.say("returning")
                agent.say("suspended")
                await until(lambda: job._suspended)
                job._signal(signal.SIGTERM)
                assert await running == 128 + signal.SIGTERM and agent.left == []
        await job_before.end()

    run(work)
    said = capfd.readouterr().err
    assert ("is to wait again, held: VT-CONNECT: no route" in said) is not failed and "Traceback" not in said


@pytest.mark.parametrize("how", ["told to end", "sent back", "the connection breaks"])
def test_a_script_that_is_within_reach_and_does_not_go_on(
    site: Site, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It does nothing more, not even what it would do at its end: it is to go on elsewhere, from where it was."""

    async def work() -> None:
        job_before = Suspended(site, monkeypatch, TRAPPING)
        await job_before.begin()
        agent = job_before.agent
        async with agent.job() as job:
            running = asyncio.ensure_future(job.run())
            assert await agent.reached.get() is None
            if how == "told to end":
                job._signal(signal.SIGTERM)
            elif how == "sent back":
                agent.progress.facts["returned"] = "VT-SUSPEND: deleted meanwhile"
                agent.say("suspended")
            else:
                for process in site.processes("bin/ssh"):
                    process.kill()
                assert "failed or broke" in str(await agent.reached.get())
                agent.progress.facts["returned"] = "VT-CONNECT: it broke"
                agent.say("suspended")
            if how != "told to end":
                await until(lambda: job._suspended)
                job._signal(signal.SIGTERM)
            assert await running == 128 + signal.SIGTERM and agent.left == []
        await until(lambda: not site.processes("run -a") and not site.processes("sh -c"))
        await asyncio.sleep(0.5)
        await job_before.end()

    run(work)


def test_an_agent_that_dies_and_what_stands_in_for_it(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The wrapper follows that, which says what becomes of the job."""

    async def work() -> None:
        job_before = Suspended(site, monkeypatch, TRAPPING)
        agent = job_before.agent
        links: list[AgentLink] = []
        connect = AgentLink.connect

        async def connected(path: Path) -> AgentLink:
            links.append(await connect(path))
            return links[-1]

        monkeypatch.setattr(AgentLink, "connect", connected)
        async with agent.job() as job:
            running = asyncio.ensure_future(job.run())
            await until(lambda: (site.base / "up").exists())
            assert await agent.suspend(1) is None
            (site.base / "up").unlink()
            spec, agent.progress.private = agent.progress.private, {}
            agent.progress.facts.clear()
            agent.progress.state = "starting"
            links[0]._writer.transport.abort()
            await until(lambda: len(links) == 2)
            agent.progress.facts["returned"] = "VT-AGENT: the node agent has died"
            agent.progress.turn("returning")
            agent.progress.turn("suspended")
            await until(lambda: job._suspended)
            job._signal(signal.SIGTERM)
            assert await running == 128 + signal.SIGTERM and agent.left == []
            assert spec
        await job_before.end()

    run(work)
    assert "is to wait again, held: VT-AGENT: the node agent has died" in capfd.readouterr().err


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
        site.end()
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
