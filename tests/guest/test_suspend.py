"""A real job is suspended as far as its node goes: what is refused, called off, stored, and left behind.

The test stands for the job's wrapper, and for the batch system.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from guestsetup import image_or_skip
from nodejob import Job, Jobs, account

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.node import process, record, returning, suspendable
from vmgr.node.client import AgentLink
from vmgr.node.record import newest_socket
from vmgr.node.undo import undo
from vmgr.node.user import look_up
from vmgr.suspended.store import Store

pytestmark = [pytest.mark.guest, pytest.mark.root]
PATIENCE_S = 300.0


class Batch:
    """Stands for the batch system, in the agent's process: `says` is a file with what it does when it is asked."""

    def __init__(self, base: Path) -> None:
        self.says, self.asked = base / "says", base / "asked"
        os.mkfifo(base / "go")
        self.go = base / "go"

    def requeue(self, config: Config, job_id: str) -> None:
        self.asked.write_text(job_id)
        says = self.says.read_text()
        if says == "waits":
            says = self.go.read_text()
        if says != "done":
            raise VTorqueError(says, code=Code.ENGINE)


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[Jobs, Batch]]:
    image_or_skip("micro")
    with tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp") as base, account() as owner:
        Path(base).chmod(0o755)
        folder, scratch = Path(base) / "suspended", Path(base) / "scratch"
        for made in (folder, scratch):
            made.mkdir()
            made.chmod(0o1777)
        yield (
            Jobs(
                Path(base), owner, suspended={"folder": str(folder)}, policy={"suspend": {"enabled": True}},
                workspace={"folder": f"{base}/scratch/{{job}}", "wipe": True},
            ),
            Batch(Path(base)),
        )  # fmt: skip


class Wrapper:
    """Stands for the job's wrapper: it leaves its session whenever it is told to."""

    def __init__(self, link: AgentLink, job: Job) -> None:
        self._link, self._job = link, job
        self.seen: dict[str, Any] = {}
        self.numbers: list[Optional[int]] = [None]
        self._changed = asyncio.Event()
        self.following = asyncio.ensure_future(self._follow())

    async def _follow(self) -> None:
        async for snapshot in self._link.follow("attach"):
            self.seen = snapshot
            number = snapshot.get("suspending")
            if number != self.numbers[-1]:
                self.numbers.append(number)
                if number is not None:
                    self._link.send("detached", **{"try": number})
            self._changed.set()
            self._changed = asyncio.Event()
        self.seen = {**self.seen, "state": "gone"}
        self._changed.set()

    async def until(self, *states: str) -> None:
        async def wait() -> None:
            while self.seen.get("state") not in states:
                await self._changed.wait()

        await asyncio.wait_for(wait(), PATIENCE_S)

    async def start(self) -> None:
        await self.until("ready", "failed")
        self._link.send("started")
        await self.until("running")

    def leave(self) -> None:
        self._link.close()

    def ssh(self, command: str, **options: Any) -> subprocess.Popen[str]:
        """A command in the guest."""
        known = self._job.node.base / "known_hosts"
        ssh = self.seen["ssh"]
        known.write_text(f"[127.0.0.1]:{ssh['port']} {ssh['host_key']}\n")
        words = ["ssh", "-F", "none", "-T", "-i", str(self._job.directory / "key"), "-p", str(ssh["port"])]
        for option in ("BatchMode=yes", "IdentitiesOnly=yes", f"UserKnownHostsFile={known}"):
            words += ["-o", option]
        return subprocess.Popen(
            [*words, f"{self._job.owner.pw_name}@127.0.0.1", command], text=True, stdout=subprocess.PIPE, **options
        )

    def said(self, command: str) -> str:
        out, _ = self.ssh(command, stdin=subprocess.DEVNULL).communicate(timeout=PATIENCE_S)
        return out.strip()


@asynccontextmanager
async def wrapped(job: Job) -> AsyncIterator[Wrapper]:
    """The job's wrapper, until the agent is gone."""
    path = newest_socket(job.node.config.paths, job.job_id)
    assert path is not None
    wrapper = Wrapper(await AgentLink.connect(path), job)
    try:
        await wrapper.start()
        yield wrapper
    finally:
        wrapper.leave()
        await asyncio.wait_for(wrapper.following, PATIENCE_S)


async def order(job: Job, heard: Callable[[str, AgentLink], None] = lambda text, link: None) -> dict[str, Any]:
    """Have the job suspended; `heard` gets what is being done."""
    path = newest_socket(job.node.config.paths, job.job_id)
    assert path is not None
    link, answer = await AgentLink.connect(path), {}
    try:
        async for answer in link.order("suspend"):
            heard(str(answer.get("doing")), link)
    finally:
        link.close()
    return answer


async def refused(job: Job) -> str:
    with pytest.raises(VTorqueError) as caught:
        await order(job)
    return str(caught.value)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 2 * PATIENCE_S))


async def until(true: Callable[[], object]) -> None:
    while not true():
        await asyncio.sleep(0.05)


@pytest.fixture
def batch(site: tuple[Jobs, Batch], monkeypatch: pytest.MonkeyPatch) -> Batch:
    batch = site[1]
    monkeypatch.setattr(suspendable, "requeue", batch.requeue)
    batch.says.write_text("done")
    return batch


def stored(jobs: Jobs) -> list[str]:
    folder = Path(str(jobs.node.config.suspended.folder))
    return sorted(str(path.relative_to(folder / jobs.owner.pw_name)) for path in folder.glob("*/*/*"))


def epilogues(jobs: Jobs) -> int:
    """How often the logs tell of a VM epilogue by now."""
    logs = (jobs.node.base / "log").rglob("*.log")
    return sum(path.read_text(errors="replace").count("epilogue after") for path in logs)


def test_a_job_is_refused_called_off_and_suspended(site: tuple[Jobs, Batch], batch: Batch) -> None:
    jobs, _ = site
    home = Path(jobs.owner.pw_dir)

    async def work(job: Job) -> None:
        async with wrapped(job) as wrapper:
            holding = wrapper.ssh(f"cd {home} && echo there && cat", stdin=subprocess.PIPE)
            assert holding.stdout is not None and holding.stdout.readline() == "there\n"
            text = await refused(job)
            assert text.startswith("VT-SUSPEND: the guest v") and "cannot let go of its shares" in text
            holding.communicate("")
            assert wrapper.numbers == [None, 1, None] and wrapper.seen["state"] == "running"
            assert stored(jobs) == []
            wrapper.said(
                "touch $HOME/made; cd /tmp; (while sleep 0.1; do echo x >>/tmp/count; done) >/dev/null 2>&1 & echo"
            )
            batch.says.write_text("qrerun: Unauthorized Request")
            assert await refused(job) == "VT-ENGINE: qrerun: Unauthorized Request"
            before = int(wrapper.said("wc -l </tmp/count"))
            assert wrapper.said(f"ls {home}/made; until [ $(wc -l </tmp/count) -gt {before} ]; do sleep 0.1; done")
            assert wrapper.numbers == [None, 1, None, 2, None] and stored(jobs) == []

            def leave(text: str, link: AgentLink) -> None:
                if text.startswith("storing"):
                    link.close()

            batch.says.write_text("done")
            batch.asked.unlink()
            with pytest.raises(VTorqueError):
                await order(job, leave)
            while wrapper.numbers[-2:] != [3, None]:
                await asyncio.wait_for(wrapper._changed.wait(), PATIENCE_S)
            assert not batch.asked.exists() and wrapper.said(f"ls {home}/made")
            assert (await order(job)) == {"suspended": "12.host"}
            await wrapper.until("suspended")
            assert wrapper.numbers[-1] == 4 and batch.asked.read_text() == "12.host"
            await wrapper.until("gone")

    with jobs.job(jobs.submit("#!/bin/sh\n", suspend=True, mounts=("home", "workspace"))) as job:
        run(work(job))
        assert job.directory.is_dir(), "the job directory is for the next attempt"
    assert epilogues(jobs) == 0, "its guests have not been shut down"
    store = Store(jobs.node.config, look_up(jobs.owner.pw_name))
    entry, (part,) = asyncio.run(store.find("12.host")) or (None, (None,))
    assert entry is not None and part is not None
    assert (entry.user, entry.image.split("@")[0], entry.nodes) == (jobs.owner.pw_name, "micro", 1)
    assert [guest.overlay_bytes for guest in part.guests] == [None], "micro has no disk"
    assert stored(jobs) == ["12.host/0.state", "12.host/job.json", "12.host/node.0.json"]
    assert (jobs.node.base / "scratch" / f"12.host.{entry.key}").is_dir(), "the workspace is for the next attempt"
    asyncio.run(store.remove("12.host"))


@pytest.mark.parametrize("phase", ["storing", "waits"])
def test_a_job_is_deleted_meanwhile(site: tuple[Jobs, Batch], batch: Batch, phase: str) -> None:
    """Its end is as usual, with the VM epilogue, and nothing is stored: also when the requeue is refused after it."""
    jobs, _ = site
    batch.says.write_text("waits" if phase == "waits" else "done")
    before = epilogues(jobs)

    async def work(job: Job) -> str:
        async with wrapped(job) as wrapper:

            def delete(text: str, link: AgentLink) -> None:
                if text.startswith(phase) or (phase == "waits" and text == "having the job requeued"):
                    wrapper.leave()
                    if phase == "waits":
                        asyncio.get_running_loop().run_in_executor(None, batch.go.write_text, "no such job")

            with pytest.raises(VTorqueError) as caught:
                await order(job, delete)
            return str(caught.value)

    with jobs.job(jobs.submit("#!/bin/sh\n", suspend=True, mounts=("home", "workspace"))) as job:
        said = run(work(job))
        assert ("the job has ended meanwhile" if phase == "storing" else "no such job") in said
    assert stored(jobs) == [] and not list((jobs.node.base / "scratch").iterdir())
    assert epilogues(jobs) > before


def test_an_agent_that_is_killed_leaves_nothing(site: tuple[Jobs, Batch], batch: Batch) -> None:
    jobs, _ = site

    async def work(job: Job) -> None:
        async with wrapped(job) as wrapper:

            def kill(text: str, link: AgentLink) -> None:
                if text.startswith("storing the memory"):
                    os.kill(job.agent, signal.SIGKILL)

            with pytest.raises(VTorqueError, match="the node agent has ended"):
                await order(job, kill)
            await wrapper.until("gone")

    with jobs.job(jobs.submit("#!/bin/sh\n", suspend=True, mounts=("home", "workspace"))) as job:
        run(work(job))
        (place,) = record.places(jobs.node.config.paths)
        guests = [process.recorded(step) for step in record.steps(place) if step.get("role") == "qemu"]
        assert len(guests) == 1 and process.end(guests[0], timeout_s=10, sig=0), "it dies with its agent"
        assert stored(jobs) != [], "what was being written"
        assert undo(place) == [] and stored(jobs) == []


@pytest.mark.slow
def test_an_agent_that_is_killed_while_its_job_is_stored(
    site: tuple[Jobs, Batch], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job waits again, held: before its requeue was asked for, and before its script was within reach again."""
    jobs, _ = site
    asked = jobs.node.base / "asked-after"
    asked.unlink(missing_ok=True)

    def ask(what: str) -> Callable[[Config, str], object]:
        def note(_config: Config, job_id: str) -> None:
            with open(asked, "a") as lines:
                lines.write(f"{what} {job_id}\n")

        return note

    monkeypatch.setattr(returning, "batch", SimpleNamespace(hold=ask("hold"), requeue=ask("requeue")))
    store = Store(jobs.node.config, look_up(jobs.owner.pw_name))

    async def is_put_back(job: Job) -> None:
        """Where the wrapper looks for who stands in for the agent."""
        path = newest_socket(jobs.node.config.paths, job.job_id)
        assert path is not None
        link = await AgentLink.connect(path)
        said = [snapshot async for snapshot in link.follow("attach")]
        link.close()
        assert said[-1]["state"] == "suspended" and "VT-AGENT" in said[-1]["returned"]

    async def killed_at_requeue(job: Job) -> None:
        async with wrapped(job) as wrapper:

            def kill(text: str, link: AgentLink) -> None:
                if text == "having the job requeued":
                    os.kill(job.agent, signal.SIGKILL)

            with pytest.raises(VTorqueError, match="the node agent has ended"):
                await order(job, kill)
            await wrapper.until("gone")
            await is_put_back(job)

    async def killed_when_ready(job: Job) -> None:
        async for snapshot in (await AgentLink.open(jobs.node.config.paths, job.job_id)).follow("attach"):
            if snapshot["state"] == "ready":
                assert await store.find(job.job_id) is not None
                os.kill(job.agent, signal.SIGKILL)
        await is_put_back(job)

    batch.says.write_text("waits")
    path = jobs.submit("#!/bin/sh\n", suspend=True, mounts=("home", "workspace"))
    with jobs.job(path) as job:
        run(killed_at_requeue(job))
        (place,) = record.places(jobs.node.config.paths)
        assert undo(place) == []
    found = asyncio.run(store.find("12.host"))
    assert found is not None and (jobs.node.base / "scratch" / f"12.host.{found[0].key}").is_dir()
    monkeypatch.setattr(record, "new_place", lambda _, job_id: jobs.node.place(job_id, record.hook_start() + 1))
    with jobs.job(path) as job:
        run(killed_when_ready(job))
        (place,) = record.places(jobs.node.config.paths)
        assert undo(place) == []
    assert asyncio.run(store.find("12.host")) == found
    assert asked.read_text() == 2 * "hold 12.host\nrequeue 12.host\n"
    assert "12.host/reason" in stored(jobs)
    asyncio.run(store.remove("12.host"))
    shutil.rmtree(jobs.node.base / "scratch" / f"12.host.{found[0].key}")


COUNTS = "cd /tmp; (while sleep 0.1; do echo x >>/tmp/count; done) >/dev/null 2>&1 & echo kept >/workspace/kept; echo"
GOES_ON = (
    "before=$(wc -l </tmp/count); until [ $(wc -l </tmp/count) -gt $before ]; do sleep 0.1; done; cat /workspace/kept"
)


def test_a_job_goes_on_as_often_as_it_is_suspended(
    site: tuple[Jobs, Batch], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a start that came to nothing. Its workspace is the same all the time, and gone at its end."""
    jobs, _ = site
    later = itertools.count(1)
    monkeypatch.setattr(
        record, "new_place", lambda _, job_id: jobs.node.place(job_id, record.hook_start() + next(later))
    )
    path = jobs.submit("#!/bin/sh\n", suspend=True, mounts=("home", "workspace"))
    store = Store(jobs.node.config, look_up(jobs.owner.pw_name))
    scratch = jobs.node.base / "scratch"

    async def suspended_after(job: Job, command: str) -> str:
        async with wrapped(job) as wrapper:
            said = wrapper.said(command)
            assert await order(job) == {"suspended": "12.host"}
            await wrapper.until("suspended")
        return said

    with jobs.job(path) as job:
        run(suspended_after(job, COUNTS))
    entry, parts = asyncio.run(store.find("12.host")) or (None, None)
    assert entry is not None and [folder.name for folder in scratch.iterdir()] == [f"12.host.{entry.key}"]

    async def killed(job: Job, stage: str) -> None:
        socket = newest_socket(job.node.config.paths, job.job_id)
        assert socket is not None
        link = await AgentLink.connect(socket)
        async for snapshot in link.follow("follow"):
            if any(each["name"] == stage for each in snapshot["stages"]):
                os.kill(job.agent, signal.SIGKILL)
        link.close()

    asked = jobs.node.base / "held"

    def hold(_config: Config, job_id: str) -> None:
        asked.write_text(job_id)
        raise VTorqueError("it is refused", code=Code.ENGINE)

    monkeypatch.setattr(returning, "batch", SimpleNamespace(hold=hold, requeue=hold))
    for stage in ("spec", "launched"):
        asked.unlink(missing_ok=True)
        with jobs.job(path) as job:
            run(killed(job, stage))
            run(until(asked.exists))
            (place,) = record.places(jobs.node.config.paths)
            guests = [process.recorded(step) for step in record.steps(place) if step.get("role") == "qemu"]
            assert all(process.end(guest, timeout_s=10, sig=0) for guest in guests)
            assert undo(place) == []
        assert asyncio.run(store.find("12.host")) == (entry, parts) and (scratch / f"12.host.{entry.key}").is_dir()

    with jobs.job(path) as job:
        assert run(suspended_after(job, GOES_ON)) == "kept"
    again, _ = asyncio.run(store.find("12.host")) or (None, None)
    assert again is not None and again.key == entry.key and again.when >= entry.when

    async def to_the_end(job: Job) -> str:
        async with wrapped(job) as wrapper:
            assert wrapper.seen["resumed"] and stored(jobs) == []
            return wrapper.said(GOES_ON)

    before = epilogues(jobs)
    with jobs.job(path) as job:
        assert run(to_the_end(job)) == "kept"
    assert epilogues(jobs) > before and not list(scratch.iterdir())
