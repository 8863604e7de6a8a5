"""`vmgr suspend` and `vmgr resume`, with an agent and a batch system that answer as told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Optional

import pytest
from test_vmgr_cli import Vmgr, vmgr_run
from test_vmgr_suspended import put, site

import vmgr.commands.suspend as suspend_command
from vmgr.errors import Code, VTorqueError

pytestmark = pytest.mark.script_launch_mode("inprocess")
__all__ = ["site", "vmgr_run"]

Order = Callable[[], AsyncIterator[dict[str, Any]]]
BATCH = """\
#!/bin/sh
echo "$*" >> {log}
case $1 in
    hold) {hold} ;;
    job) {job} ;;
    *) {other} ;;
esac
"""


class Batch:
    """The batch system's program: notes how it is called, and answers as told."""

    def __init__(self, program: Path) -> None:
        self._log = program.with_name("called")
        self._program = program
        self.answer()

    def answer(self, *, hold: str = "echo '{\"new\": true}'", job: str = "echo '[]'", other: str = "echo '{}'") -> None:
        self._program.write_text(BATCH.format(log=self._log, hold=hold, job=job, other=other))
        self._program.chmod(0o755)

    @property
    def called(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Signals do what they do to a command that somebody has typed, however the tests were started."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {sig: signal.signal(sig, handler) for sig, handler in usual.items()}
    yield
    for sig, handler in before.items():
        signal.signal(sig, handler)


@pytest.fixture
def batch(site: Vmgr) -> Batch:
    return Batch(Path(site.node.install.program("vtorque-batch")))


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the job's agent tells of itself and how it carries out an order."""

    def scripted(order: Order, state: str = "running", *, suspend: Optional[bool] = True) -> None:
        async def carry_out(op: str, **members: object) -> AsyncIterator[dict[str, Any]]:
            assert (op, members) == ("suspend", {})
            async for answer in order():
                yield answer

        @contextlib.asynccontextmanager
        async def agent_of(_config: object, target: object) -> AsyncIterator[object]:
            assert str(target) in ("12", "12.server")
            snapshot = {"job_id": "12.server", "state": state, "spec": {"suspend": suspend}}
            yield SimpleNamespace(link=SimpleNamespace(order=carry_out), job_id="12.server", snapshot=snapshot)

        monkeypatch.setattr("vmgr.reach.agents.agent_of", agent_of)

    return scripted


async def done() -> AsyncIterator[dict[str, Any]]:
    yield {"doing": "asking the guests to let go of their shares"}
    yield {"doing": "storing the memory of guest 0", "so_far": 5, "total": 10}


def failing(failure: BaseException, before: Callable[[], object] = lambda: None) -> Order:
    async def order() -> AsyncIterator[dict[str, Any]]:
        yield {"doing": "storing"}
        before()
        raise failure

    return order


REFUSED = VTorqueError("/home of guest 0 is in use: pid 812, /bin/bash", code=Code.SUSPEND, hint="close it")
GONE = VTorqueError("the node agent has ended before suspend was done", code=Code.AGENT)


def test_a_job_is_held_then_suspended(site: Vmgr, batch: Batch, agent: Callable[..., None]) -> None:
    agent(done)
    status, out, err = site("suspend", "12")
    assert (status, out) == (0, "job 12.server is suspended; `vmgr resume 12` lets it go on\n")
    assert "asking the guests to let go of their shares" in err and "storing the memory of guest 0" in err
    assert batch.called == ["hold 12.server"]
    status, out, err = site("suspend", "12.server", "--json")
    assert (status, json.loads(out), err) == (0, {"job": "12.server", "state": "suspended"}, "")


def test_what_stands_in_the_way_is_said_and_the_job_released(
    site: Vmgr, batch: Batch, agent: Callable[..., None]
) -> None:
    agent(failing(REFUSED))
    status, out, err = site("suspend", "12")
    assert (status, out) == (Code.SUSPEND.status, "") and err.splitlines()[-1] == str(REFUSED)
    assert batch.called == ["hold 12.server", "release 12.server"]


def test_who_had_held_the_job_before_keeps_it_held(site: Vmgr, batch: Batch, agent: Callable[..., None]) -> None:
    batch.answer(hold="echo '{\"new\": false}'")
    agent(failing(REFUSED))
    assert site("suspend", "12").status == Code.SUSPEND.status
    assert batch.called == ["hold 12.server"]


def test_a_job_that_cannot_be_released_is_told_of(site: Vmgr, batch: Batch, agent: Callable[..., None]) -> None:
    batch.answer(other="echo 'VT-ENGINE: the server is away' >&2; exit 76")
    agent(failing(REFUSED))
    status, _, err = site("suspend", "12")
    assert status == Code.SUSPEND.status
    assert err.splitlines()[-2:] == [
        "vmgr: job 12.server stays held, release it by qrls: VT-ENGINE: the server is away", str(REFUSED),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("state", "suspend", "says"),
    [
        ("running", False, "VT-SUSPEND: job 12.server was not submitted with -vm suspend=on; only such jobs can be"),
        ("booting", True, "VT-SUSPEND: job 12.server is booting; it can be suspended while it is running"),
        ("ending", None, "VT-SUSPEND: job 12.server is ending"),
    ],
)
def test_nothing_is_done_to_a_job_that_cannot_be_suspended(
    site: Vmgr, batch: Batch, agent: Callable[..., None], state: str, suspend: Optional[bool], says: str
) -> None:
    agent(done, state, suspend=suspend)
    assert site.refuses("suspend", "12").startswith(says)
    assert batch.called == []


def test_a_job_that_may_not_be_held_is_not_suspended(site: Vmgr, batch: Batch, agent: Callable[..., None]) -> None:
    batch.answer(hold="echo 'VT-ACCESS: qhold: Unauthorized Request 12.server' >&2; exit 77")
    agent(failing(AssertionError("no order may be given")))
    status, out, err = site("suspend", "12")
    assert (status, out, err) == (Code.ACCESS.status, "", "VT-ACCESS: qhold: Unauthorized Request 12.server\n")
    assert batch.called == ["hold 12.server"]


@pytest.mark.parametrize("new", ["true", "false", "null"])
@pytest.mark.parametrize("other", ["echo '{}'", "echo 'VT-ENGINE: qrls: nothing holds it' >&2; exit 2"])
def test_a_hold_whose_answer_is_lost_is_undone(
    site: Vmgr, batch: Batch, agent: Callable[..., None], new: str, other: str
) -> None:
    """Unless somebody had held the job before. It may be set later yet, which is said."""
    failing_hold = 'echo \'{"answered": false, "new": %s}\'; echo VT-ENGINE: qhold has not answered >&2; exit 2'
    batch.answer(hold=failing_hold % new, other=other)
    agent(failing(AssertionError("no order may be given")))
    status, out, err = site("suspend", "12")
    assert (status, out) == (Code.ENGINE.status, "") and err.splitlines()[-1] == "VT-ENGINE: qhold has not answered"
    assert batch.called == ["hold 12.server", *([] if new == "false" else ["release 12.server"])]
    warned = "vmgr: job 12.server may be held, or be so later: qstat tells, qrls releases it" in err.splitlines()
    assert warned is (new != "false") and "stays held" not in err


def test_a_batch_system_that_hangs_may_have_held_the_job(
    site: Vmgr, batch: Batch, agent: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmgr.reach.batch.MORE_SECONDS", -2 * site.node.config.timeouts.reach + 0.3)
    batch.answer(hold="exec sleep 60")
    agent(failing(AssertionError("no order may be given")))
    status, _, err = site("suspend", "12")
    assert status == Code.ENGINE.status and "may be held" in err
    assert batch.called == ["hold 12.server", "release 12.server"]


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_calls_everything_off(
    site: Vmgr, batch: Batch, agent: Callable[..., None], sig: signal.Signals
) -> None:
    ended: list[str] = []

    async def order() -> AsyncIterator[dict[str, Any]]:
        try:
            yield {"doing": "storing"}
            os.kill(os.getpid(), sig)
            await asyncio.sleep(60)
        finally:
            ended.append("the connection is closed")

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    agent(order)
    status, out, err = site("suspend", "12")
    assert (status, out) == (130, "") and err.splitlines()[-1] == "vmgr: interrupted"
    assert batch.called == ["hold 12.server", "release 12.server"] and ended
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_while_it_looks_what_has_become_of_the_job(
    site: Vmgr, batch: Batch, agent: Callable[..., None], sig: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agent was not heard to the end."""
    look = suspend_command._stored

    def looked(*arguments: Any) -> object:
        if batch.called:
            os.kill(os.getpid(), sig)
        return look(*arguments)

    monkeypatch.setattr(suspend_command, "_stored", looked)
    agent(failing(GONE))
    assert site("suspend", "12").status == 130
    assert batch.called == ["hold 12.server", "release 12.server"]


def test_while_the_job_is_being_held_nothing_interrupts(site: Vmgr, batch: Batch, agent: Callable[..., None]) -> None:
    """Else nobody would know whether it is."""
    batch.answer(hold="kill -INT $PPID; kill -INT $$; echo '{\"new\": true}'")

    async def order() -> AsyncIterator[dict[str, Any]]:
        await asyncio.sleep(60)
        yield {}

    agent(order)
    status, out, _ = site("suspend", "12")
    assert (status, out) == (130, "")
    assert batch.called == ["hold 12.server", "release 12.server"]


def test_an_agent_that_went_with_its_job_has_suspended_it(site: Vmgr, batch: Batch, agent: Callable[..., None]) -> None:
    agent(failing(GONE, before=lambda: put(site, "12.server")))
    assert site("suspend", "12").status == 0
    assert batch.called == ["hold 12.server"]


def test_an_agent_that_died_before_has_not(site: Vmgr, batch: Batch, agent: Callable[..., None]) -> None:
    put(site, "12.server")  # of the time before, which nobody has removed
    agent(failing(GONE, before=lambda: put(site, ".12.server.new")))
    status, _, err = site("suspend", "12")
    assert status == Code.AGENT.status and err.splitlines()[-1] == str(GONE)
    assert batch.called == ["hold 12.server", "release 12.server"]


@pytest.mark.parametrize(("nodes", "status"), [([], 0), (["n1"], Code.AGENT.status)])
def test_where_the_store_cannot_be_seen_the_batch_system_knows(
    site: Vmgr, batch: Batch, agent: Callable[..., None], monkeypatch: pytest.MonkeyPatch, nodes: list[str], status: int
) -> None:
    (site.node.base / "suspended" / "carol").rmdir()
    (site.node.base / "suspended").rmdir()
    monkeypatch.setattr("vmgr.reach.where._check_owner", lambda _job: None)
    job = {"job": "12.server", "owner": "carol", "nodes": nodes}
    batch.answer(job=f"echo '{json.dumps([job] if nodes else [])}'")
    agent(failing(GONE))
    assert site("suspend", "12").status == status
    assert batch.called[:2] == ["hold 12.server", "job 12.server"] and ("release 12.server" in batch.called) == bool(
        nodes
    )


def test_names_that_are_no_jobs(site: Vmgr, batch: Batch) -> None:
    for command in ("suspend", "resume"):
        assert "VT-VALUE: '12:0' names a guest; say 12: a job is suspended as a whole" in site.refuses(command, "12:0")
        assert "VT-VALUE" in site.refuses(command, "all")
    assert batch.called == []


def test_a_site_without_suspension(vmgr_run: Vmgr) -> None:
    for command in ("suspend", "resume"):
        assert "VT-SUSPEND: no job can be suspended on this site" in vmgr_run.refuses(command, "12")


# --- resume


def test_a_suspended_job_is_released(site: Vmgr, batch: Batch) -> None:
    put(site, "12.server")
    put(site, "120.server")
    put(site, ".12.server.new")
    status, out, err = site("resume", "12")
    assert (status, out, err) == (
        0, "job 12.server is released, and goes on as soon as there are nodes for it\n", "",
    )  # fmt: skip
    assert json.loads(site("resume", "12.server", "--json").stdout) == {"job": "12.server", "state": "released"}
    assert batch.called == ["release 12.server"] * 2


def test_jobs_that_cannot_be_resumed(site: Vmgr, batch: Batch) -> None:
    put(site, "14.server", b"{}")
    put(site, ".15.server.new")
    put(site, "16.server")
    put(site, "16.other")
    assert "VT-SUSPEND: job 13 is not suspended; `vmgr show suspended`" in site.refuses("resume", "13")
    assert "what is stored of job 14.server cannot be resumed: job.json: version" in site.refuses("resume", "14")
    assert "it is being written, or its writer died" in site.refuses("resume", "15")
    assert "VT-VALUE: 16 may be 16.other or 16.server; say which" in site.refuses("resume", "16")
    assert batch.called == []


def test_what_the_batch_system_says_is_passed_on(site: Vmgr, batch: Batch) -> None:
    put(site, "12.server")
    batch.answer(other="echo 'VT-ENGINE: qrls: nothing holds it' >&2; exit 76")
    assert site("resume", "12")[1:] == ("", "VT-ENGINE: qrls: nothing holds it\n")


def test_a_front_end_without_the_store_releases_all_the_same(site: Vmgr, batch: Batch) -> None:
    (site.node.base / "suspended" / "carol").rmdir()
    (site.node.base / "suspended").rmdir()
    status, out, err = site("resume", "12")
    assert status == 0 and out.startswith("job 12 is released") and "cannot be seen from here" in err
    assert batch.called == ["release 12"]
