"""A suspended job that goes on: until when it is stored, and who stands in for its agent meanwhile."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from nodesite import Node, a_spec, a_user, an_image, make_node, short_folder

from vmgr.errors import Code, VTorqueError
from vmgr.node import record, returning, standin
from vmgr.node.agent import workspace_to_wipe
from vmgr.node.allocation import Allocation
from vmgr.node.attendance import Attendance
from vmgr.node.guestjob import Job
from vmgr.node.state import Progress
from vmgr.node.takeover import Takeover
from vmgr.node.workspace import JobNames


def a_takeover(node: Node, *, leads: bool = True) -> Takeover:
    listener: Any = None
    progress = Progress(100, {})
    progress.state = "ready"
    return Takeover(node.config, a_user(), node.place(), "12.host", progress, listener, leads=leads)


def test_the_workspace_of_a_suspended_job_is_taken_over_with_its_entry() -> None:
    """As long as the job is stored its workspace is not this attempt's to wipe."""
    user, path = a_user(), "/scratch/12.host.old"
    removed: list[str] = []

    class Stored:
        does: object = VTorqueError("it does not go", code=Code.SUSPEND)

        async def claim(self, job_id: str) -> object:
            if isinstance(self.does, VTorqueError):
                raise self.does
            return self.does

        async def drop(self, job_id: str) -> None:
            pass

        async def remove(self, job_id: str) -> None:
            removed.append(job_id)
            raise VTorqueError("it is gone for the job all the same", code=Code.SUSPEND)

    async def work() -> None:
        node = make_node(base, workspace={"folder": "/scratch/{job}", "wipe": True})
        place = node.place()
        lock, listener = record.create(place, {"job_id": "12.host"})
        stored = Stored()
        found: Any = SimpleNamespace(stored=stored)
        names = JobNames(user.home, user.name, "12.host", path)
        alone = Allocation(("n1",), 0, "a" * 16)
        job = Job(
            "12.host", place, user, a_spec(suspend=True), an_image(base), alone, None, (), names, None, None,  # type: ignore[arg-type]
            found,
        )  # fmt: skip
        takeover = a_takeover(node)
        takeover.is_stored = True
        with pytest.raises(VTorqueError, match="it does not go"):
            await takeover.take_over(job, found)
        assert takeover.is_stored
        stored.does = False
        with pytest.raises(VTorqueError, match="has been deleted meanwhile"):
            await takeover.take_over(job, found)
        assert takeover.is_stored and "workspace" not in [step["do"] for step in record.steps(place)]
        assert workspace_to_wipe(job, is_stored=takeover.is_stored) is None
        stored.does = True
        await takeover.take_over(job, found)
        assert not takeover.is_stored and removed == ["12.host"]
        assert workspace_to_wipe(job, is_stored=takeover.is_stored) == path
        assert workspace_to_wipe(job, is_stored=None) == path
        sister = job._replace(allocation=Allocation(("n1", "n2"), 1, "a" * 16))
        assert workspace_to_wipe(sister, is_stored=False) is None
        (step,) = (step for step in record.steps(place) if step["do"] == "workspace")
        assert (step["path"], step["kept"]) == (path, False)
        os.close(lock)
        listener.close()

    with short_folder() as base:
        asyncio.run(work())


def test_what_is_stored_goes_when_the_script_is_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before: an attempt that does not come so far is one that failed."""
    taken: list[object] = []

    async def take_over(self: object, job: object, found: object) -> None:
        taken.append(found)

    monkeypatch.setattr(Takeover, "take_over", take_over)

    async def work() -> None:
        node = make_node(base)
        job: Any = object()
        found: Any = object()
        here = a_takeover(node)
        going = asyncio.ensure_future(here.let_go_on(job, found))
        await asyncio.sleep(0.05)
        assert not taken and here._progress.state == "ready" and not going.done()
        here.note_within_reach(None)
        here.note_within_reach("a second word counts for nothing")
        await asyncio.sleep(0.05)
        assert taken == [found] and here._progress.state == "running" and not going.done()
        going.cancel()
        for said in ("the connection broke", "a\nb" * 1000, {"any": "thing"}):
            here = a_takeover(node)
            here.note_within_reach(said)
            with pytest.raises(VTorqueError) as caught:
                await here.let_go_on(job, found)
            assert caught.value.code is Code.CONNECT and "\n" not in str(caught.value) and len(str(caught.value)) < 2000
        assert len(taken) == 1

    with short_folder() as base:
        asyncio.run(work())


@pytest.mark.parametrize(
    ("leads", "folder", "said", "done"),
    [
        (True, True, [True, False], ["made", "called", "dismissed"]),
        (True, True, [True, True], ["made", "called", "called"]),
        (True, True, [False], []),
        (True, False, [True, True], []),
        (False, True, [True, False], []),
    ],
)
def test_somebody_stands_in_for_the_mother_superior_while_the_job_may_be_stored(
    leads: bool, folder: bool, said: list[bool], done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []

    class StandIn:
        def __init__(self, *_: object) -> None:
            did.append("made")

        def call(self) -> None:
            did.append("called")

        def dismiss(self) -> None:
            did.append("dismissed")

    monkeypatch.setattr(standin, "StandIn", StandIn)

    async def work() -> None:
        here = a_takeover(make_node(base, suspended={"folder": "/scratch/suspended"} if folder else {}), leads=leads)
        for is_stored in said:
            here.note_stored(is_stored)
        assert (did, here.is_stored) == (done, said[-1])

    with short_folder() as base:
        asyncio.run(work())


@pytest.mark.parametrize(
    ("leads", "is_stored", "over", "failed", "asked"),
    [
        (True, True, False, False, True),
        (True, None, False, False, True),
        (True, False, False, False, False),
        (False, True, False, False, False),
        (True, True, True, False, False),
        (True, True, False, True, False),
    ],
)
def test_what_is_stored_and_has_not_failed_goes_back(
    leads: bool, is_stored: Optional[bool], over: bool, failed: bool, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    puts: list[object] = []

    async def put_back(_means: object, _progress: object, problem: object, *, is_stored: object) -> bool:
        puts.append((problem, is_stored))
        return True

    monkeypatch.setattr(returning, "put_back", put_back)
    problem = VTorqueError("it does not boot here", code=Code.BOOT)

    async def work() -> None:
        here, attendance = a_takeover(make_node(base), leads=leads), Attendance(60, awaited=leads)
        here.is_stored = is_stored
        if over:
            attendance.over.set()
        if failed:
            here._progress.fail(problem)
        assert await here.put_back(problem, attendance, None) is here.is_put_back is asked
        assert puts == ([(problem, is_stored)] if asked else [])

    with short_folder() as base:
        asyncio.run(work())
