"""The job wrapper where nothing of the node is needed: its event loop, faults of its own."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, cast

import pytest
from nodesite import a_user

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import SpecPath
from vmgr.node import agent, wrapper
from vmgr.node.attendance import Attendance
from vmgr.node.hookcall import OwnJob
from vmgr.node.record import Place
from vmgr.node.state import Progress


def test_events_are_made_in_the_loop_that_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # before Python 3.10 an event made outside of it cannot be awaited
    class Inside:
        def __init__(self, *_: object) -> None:
            asyncio.get_running_loop()

        async def run(self) -> int:
            return 5

    monkeypatch.setattr(wrapper, "JobWrapper", Inside)
    monkeypatch.setattr(wrapper, "load_config", lambda _: SimpleNamespace(engine="torque"))
    assert wrapper.main(["/job"]) == 5


def test_a_real_job_wrapper_and_agent_wait_in_their_loop(tmp_path: Path) -> None:
    async def wait() -> None:
        config: Any = None
        job = wrapper.JobWrapper(config, OwnJob("12.host"), str(tmp_path), {})
        asyncio.get_running_loop().call_later(0.01, job._changed.set)
        await asyncio.wait_for(job._changed.wait(), 5)
        call = agent.Call("12.host", "carol", SpecPath("/home/carol", "0" * 16, "0" * 64), 0, None)
        place = Place(tmp_path / "0000000000000001-1-abcdefgh", tmp_path / "s")
        attendance, progress, listener = Attendance(5, awaited=True), Progress(1, {}), cast("socket.socket", None)
        attempt = agent.Agent(config, tmp_path, place, call, None, a_user(), listener, progress, attendance)
        asyncio.get_running_loop().call_later(0.01, attempt.attendance.over.set)
        await asyncio.wait_for(attempt.attendance.over.wait(), 5)
        asyncio.get_running_loop().call_later(0.01, attempt.takeover.note_within_reach, "not")
        with pytest.raises(VTorqueError, match="VT-CONNECT: not"):
            await asyncio.wait_for(attempt.takeover.let_go_on(config, config), 5)

    asyncio.run(wait())


def test_a_fault_has_a_reason_and_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def full(self: object) -> int:
        raise OSError(122, "Disk quota exceeded", "/home/carol/x")

    config: Any = None
    monkeypatch.setattr(wrapper.JobWrapper, "_run", full)

    async def run() -> int:
        return await wrapper.JobWrapper(config, OwnJob("12.host"), str(tmp_path), {}).run()

    assert asyncio.run(run()) == Code.INTERNAL.status
    assert "VT-INTERNAL: " in (said := capfd.readouterr().err) and "Disk quota exceeded" in said


@pytest.mark.parametrize("last", ["suspended", "", "failed"])
def test_a_job_that_goes_back_is_not_ended(tmp_path: Path, last: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The batch system ends its wrapper, before or after the agent says so: the job directory is for the next start."""

    async def work() -> None:
        config: Any = None
        job = wrapper.JobWrapper(config, OwnJob("12.host"), f"{tmp_path}/.vtorque/{'0' * 16}/{'0' * 64}", {})
        waiting = asyncio.ensure_future(job._until("ready", "running"))

        async def say(**snapshot: object) -> None:
            job._snapshot = {**job._snapshot, **snapshot}
            job._wake()
            await asyncio.sleep(0)

        await say(state="staging")
        await say(state="returning", returned="VT-LAUNCH: another QEMU")
        assert capfd.readouterr().err.endswith("is to wait again, held: VT-LAUNCH: another QEMU\n")
        job._signal(signal.SIGTERM)
        await asyncio.sleep(0)
        assert not waiting.done()
        if last == "failed":  # the batch system does not queue it again
            await say(state=last, returned=None, code="VT-LAUNCH", reason="another QEMU")
            with pytest.raises(VTorqueError, match="VT-LAUNCH: another QEMU"):
                await waiting
            return
        await say(state=last)
        with pytest.raises(wrapper.Suspended):
            await waiting

    asyncio.run(asyncio.wait_for(work(), 5))


def test_a_terminal_that_has_been_hung_up_is_no_fault() -> None:
    ours, theirs = pty.openpty()
    kept = os.dup(2)
    os.dup2(theirs, 2)
    os.close(theirs)
    os.close(ours)
    try:
        wrapper._say("nobody hears this")
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_a_result_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(122, "Disk quota exceeded")

    config: Any = None

    async def leave() -> None:
        job = wrapper.JobWrapper(config, OwnJob("12.host"), f"{tmp_path}/.vtorque/{'0' * 16}/{'0' * 64}", {})
        assert job._files is not None
        monkeypatch.setattr(job._files, "leave", full)
        job._leave(0, None)

    asyncio.run(leave())
    assert "cannot write the result: [Errno 122] Disk quota exceeded" in capfd.readouterr().err


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize(
    ("may_come_back", "signalled", "stays"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_the_directory_of_a_job_that_may_come_back_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may_come_back: bool, signalled: bool, stays: bool, runs: bool
) -> None:
    """Slurm ends a job that it queues again as it ends one that is cancelled, also while its script runs."""
    config: Any = None
    given_back: list[str] = []
    monkeypatch.setattr("vmgr.reach.batch.give_back", lambda _, job: given_back.append(job))
    session: Any = SimpleNamespace(signal=lambda sig: None)
    directory = tmp_path / ".vtorque" / ("0" * 16) / ("0" * 64)
    directory.mkdir(parents=True)

    async def leave() -> None:
        own = OwnJob("12.ref", may_come_back=may_come_back, marked="12" if may_come_back else None)
        job = wrapper.JobWrapper(config, own, str(directory), {})
        if runs:
            job._session = session
        if signalled:
            job._signal(signal.SIGTERM)
        await job._end(0, None)

    asyncio.run(leave())
    assert directory.exists() == stays
    assert given_back == ([] if stays or not may_come_back else ["12"]), "what led to it goes with it"


@pytest.mark.parametrize("problem", [None, VTorqueError("slurmctld is away", code=Code.ENGINE)])
def test_a_comment_that_cannot_be_given_back_is_no_matter_of_the_job(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    problem: Optional[VTorqueError],
) -> None:
    """It comes last, when the directory has gone."""
    directory = tmp_path / ".vtorque" / ("0" * 16) / ("0" * 64)
    directory.mkdir(parents=True)
    asked: list[str] = []

    def give_back(_: object, job: str) -> None:
        asked.append(job)
        assert not directory.exists()
        if problem is not None:
            raise problem

    async def ran(self: object) -> int:
        return 3

    config: Any = None
    monkeypatch.setattr("vmgr.reach.batch.give_back", give_back)
    monkeypatch.setattr(wrapper.JobWrapper, "_run", ran)

    async def run() -> int:
        own = OwnJob("14.ref", may_come_back=True, marked="14")
        return await wrapper.JobWrapper(config, own, str(directory), {}).run()

    assert asyncio.run(run()) == 3
    assert (asked, capfd.readouterr()) == (["14"], ("", ""))


@pytest.mark.parametrize(
    ("task", "status", "said"), [("1", 0, ""), ("0", Code.AGENT.status, "no node agent serves job 12.ref")]
)
def test_of_the_tasks_of_a_session_one_stands_for_the_job(
    task: str,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Slurm starts one on each node."""
    paths = SimpleNamespace(run=tmp_path, spool=tmp_path)
    monkeypatch.setattr(wrapper, "load_config", lambda _: SimpleNamespace(engine="slurm", paths=paths))
    monkeypatch.setattr("vmgr.reach.batch.give_back", lambda *_: None)
    for name, value in {"JOB_ID": "12", "CLUSTER_NAME": "ref", "PROCID": task}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    directory = tmp_path / ".vtorque" / ("0" * 16) / ("0" * 64)
    directory.mkdir(parents=True)
    assert wrapper.main([str(directory)]) == status
    assert said in (err := capfd.readouterr().err) and bool(err) == bool(said)


def test_a_wrapper_outside_of_a_job_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wrapper, "load_config", lambda _: SimpleNamespace(engine="slurm"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert wrapper.main([str(tmp_path)]) == Code.AGENT.status
    assert "VT-AGENT: this process belongs to no job: SLURM_JOB_ID is ''" in capfd.readouterr().err
