"""The outer life of an attempt: what happens to it when, whatever its guests do."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from nodesite import Node, a_user, make_node, short_folder

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import SpecPath
from vmgr.node import agent, record
from vmgr.node.agent import Agent
from vmgr.node.allocation import Allocation
from vmgr.node.attendance import Attendance
from vmgr.node.checkedjob import Call
from vmgr.node.othernodes import OtherNodes
from vmgr.node.reporting import Reporting, names_of
from vmgr.node.state import Progress
from vmgr.node.takeover import Takeover

PROBLEM = VTorqueError("it does not boot", code=Code.BOOT)


def an_agent(node: Node, *, node_index: int = 0, listener: Any = None) -> Agent:
    call = Call("12.host", "carol", SpecPath("/home/carol", "0" * 16, "0" * 64), node_index, None)
    progress, attendance = Progress(100, names_of("n1")), Attendance(60, awaited=node_index == 0)
    user = a_user(uid=os.getuid(), gid=os.getgid(), groups=())
    return Agent(node.config, node.base, node.place(), call, None, user, listener, progress, attendance)


def test_a_script_that_goes_on_waits_until_it_is_nobody_elses() -> None:
    async def work() -> None:
        for resumption, state in ((None, "running"), (object(), "starting")):
            here = an_agent(make_node(base))
            job: Any = SimpleNamespace(resumption=resumption)
            here.job = job
            here._started(None)
            assert here.progress.state == state and here.takeover._within_reach.done() == (resumption is not None)

    with short_folder() as base:
        asyncio.run(work())


@pytest.mark.parametrize(
    ("wipes", "is_stored", "suspended", "wiped"),
    [
        (True, False, False, ["/scratch/12"]),
        (True, None, False, ["/scratch/12"]),
        (True, True, False, []),
        (True, False, True, []),
        (False, False, False, []),
    ],
)
def test_a_workspace_is_wiped_with_its_job(
    wipes: bool, is_stored: Optional[bool], suspended: bool, wiped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[str] = []

    async def wipe(_config: object, _user: object, path: str) -> None:
        paths.append(path)
        raise VTorqueError("it is not empty", code=Code.STAGE)

    monkeypatch.setattr(agent, "wipe_workspace", wipe)

    async def work() -> None:
        here = an_agent(make_node(base, workspace={"folder": "/scratch/{job}", "wipe": wipes}))
        await here._wipe()
        assert not paths  # nothing was known of the job
        job: Any = SimpleNamespace(
            allocation=SimpleNamespace(node_index=0), stands_for=SimpleNamespace(workspace="/scratch/12")
        )
        here.job, here.takeover.is_stored, here.guests.suspended = job, is_stored, suspended
        await here._wipe()
        assert paths == wiped

    with short_folder() as base:
        asyncio.run(work())


@pytest.mark.parametrize("put_back", [False, True])
def test_who_has_failed_stays_until_the_job_is_over(put_back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wrapper learns why; a job that goes back has not failed. The stand-in goes when that is decided."""
    done: list[str] = []

    async def fail(self: object) -> None:
        raise PROBLEM

    async def decide(self: object, problem: object, *_: object) -> bool:
        assert problem is PROBLEM
        done.append("decided")
        return put_back

    async def tell(self: OtherNodes) -> None:
        done.append(f"told {self._progress.state}")

    monkeypatch.setattr(Agent, "_live", fail)
    monkeypatch.setattr(Takeover, "put_back", decide)
    monkeypatch.setattr(Takeover, "stand_alone", lambda self: done.append("alone"))
    monkeypatch.setattr(OtherNodes, "tell_failure", tell)

    async def work() -> None:
        here = an_agent(make_node(base))
        living = asyncio.ensure_future(here._live_and_tell())
        await asyncio.sleep(0.05)
        assert done == ["decided", "alone", *([] if put_back else ["told failed"])] and not living.done()
        here.attendance.over.set()
        await asyncio.wait_for(living, 10)
        assert here.progress.error is (None if put_back else PROBLEM)

    with short_folder() as base:
        asyncio.run(work())


def test_the_end_comes_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is undone while other nodes use it; they hear that nothing is left when it is so, the user last."""
    done: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: done.append(name)

    def awaited(name: str) -> Any:
        async def do(*_: object) -> None:
            done.append(name)

        return do

    monkeypatch.setattr(OtherNodes, "hear_of_the_end", awaited("hear_of_the_end"))
    monkeypatch.setattr(OtherNodes, "dismiss_witness", note("dismiss_witness"))
    monkeypatch.setattr(Agent, "_live_and_tell", awaited("live"))
    leftovers = SimpleNamespace(join=None, end=awaited("leftovers"))
    monkeypatch.setattr(Agent, "_leftovers", lambda _: leftovers)
    monkeypatch.setattr(Agent, "_wipe", awaited("wipe"))
    monkeypatch.setattr(Takeover, "stand_alone", note("stand_alone"))
    monkeypatch.setattr(Reporting, "begin", note("begin"))
    monkeypatch.setattr(record, "note_end", note("note_end"))

    async def work() -> None:
        node = make_node(base)
        lock, listener = record.create(node.place(), {"job_id": "12.host"})
        here = an_agent(node, listener=listener)
        here.image_held = image = os.open("/dev/null", os.O_RDONLY)

        def undo(_place: object) -> list[str]:
            os.fstat(image)
            done.append("undo")
            return []

        async def tell_of_the_end(_: object) -> None:
            with pytest.raises(OSError):
                os.fstat(image)
            done.append("tell_of_the_end")

        async def end(_: object) -> None:
            done.append(here.progress.state)

        monkeypatch.setattr(agent, "undo", undo)
        monkeypatch.setattr(OtherNodes, "tell_of_the_end", tell_of_the_end)
        monkeypatch.setattr(Reporting, "end", end)
        await asyncio.wait_for(here.run(), 10)
        os.close(lock)

    with short_folder() as base:
        asyncio.run(work())
    assert done == [
        "begin", "live", "stand_alone", "hear_of_the_end", "leftovers", "wipe", "dismiss_witness", "note_end", "undo",
        "tell_of_the_end", "ended",
    ]  # fmt: skip


def test_a_sister_knows_the_mother_superior_alone() -> None:
    async def work() -> None:
        for index, known in ((0, ["n1", "n2.site"]), (1, ["n1"])):
            here = an_agent(make_node(base), node_index=index)
            here.reporting.learn_nodes(Allocation(("n1", "n2.site"), index, "a" * 16))
            assert here.reporting._learned == {
                "user": "carol", "node_index": index, "key": "a" * 16, "nodes": known,
            }  # fmt: skip
            node = f"n{index + 1}"
            assert here.progress.facts == {"node": node, "guest": f"v{node}-1", "guests": [f"v{node}-1"]}

    with short_folder() as base:
        asyncio.run(work())


def test_a_failure_ends_the_job_on_all_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the mother superior by her own word, on a sister by hers; before the nodes are known nobody is told."""
    said: list[object] = []

    async def tell(kind: str, data: dict[str, Any]) -> None:
        said.append((kind, data["reason"]))

    async def call_over() -> None:
        said.append("over")

    async def work() -> None:
        node = make_node(base)
        for leads, told in ((True, ["over"]), (False, [("failed", "it does not boot")])):
            progress = Progress(100, {})
            others = OtherNodes(node.config, a_user(), node.place(), "12.host", str(tmp_path), progress)
            progress.fail(PROBLEM)
            await others.tell_failure()
            await others.hear_of_the_end()
            await others.tell_of_the_end()
            others.dismiss_witness()
            assert said == []
            fellows: Any = SimpleNamespace(leads=leads, tell=tell, call_over=call_over)
            others.fellows = fellows
            await others.tell_failure()
            assert said == told
            said.clear()

    with short_folder() as base:
        asyncio.run(work())
