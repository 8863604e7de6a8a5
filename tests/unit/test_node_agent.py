"""Whose policy the agent holds a specification against, and what it refuses after that."""

from __future__ import annotations

import asyncio
import grp
import os
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from nodesite import a_spec, a_user, an_image, make_node, short_folder

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import Spec, SpecPath, dump_spec, spec_hash
from vmgr.node import checkedjob, record
from vmgr.node.agent import Agent
from vmgr.node.allocation import Allocation
from vmgr.node.guestjob import Job
from vmgr.node.user import primary_group
from vmgr.node.workspace import JobNames
from vmgr.policy import Subject

ALONE = Allocation(("n1",), 0, "a" * 16)


def specification(
    spec: Spec, monkeypatch: pytest.MonkeyPatch, *, allocation: Allocation = ALONE, policy: Any = None, **call: Any
) -> list[Subject]:
    """Let an agent read `spec`; gives the subjects whose policy it asked for."""
    subjects = []
    data = dump_spec(spec)

    async def read_file(*_: object, **__: object) -> bytes:
        return data

    monkeypatch.setattr(checkedjob, "read_file", read_file)
    monkeypatch.setattr(
        checkedjob, "check_spec", lambda _spec, _config, subject, _source, **_: subjects.append(subject)
    )
    monkeypatch.setattr(checkedjob.Pool, "hold", lambda _pool, choose: (choose() or an_image(base), None))
    facts = {"job_id": "12.host", "user": "carol", "node_index": 0, "queue": None, **call}

    async def work() -> None:
        found = checkedjob.Call(directory=SpecPath("/home/carol", "0" * 16, spec_hash(data)), **facts)
        node = make_node(base, policy=policy or {})
        await checkedjob.checked_job(found, node.config, node.place(), a_user(), allocation)

    with short_folder() as base:
        asyncio.run(work())
    return subjects


def named(name: Optional[str]) -> Any:
    def look(gid: int) -> grp.struct_group:
        if name is None:
            raise KeyError(gid)
        return grp.struct_group((name, "x", gid, []))

    return look


@pytest.mark.parametrize("group", ["chem", "domain users", None])
def test_the_subject_is_the_user_with_the_group_of_the_password_database(
    group: Optional[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grp, "getgrgid", named(group))
    assert primary_group(a_user()) == group
    assert specification(a_spec(), monkeypatch, queue="fast") == [Subject("carol", group, "fast")]
    assert specification(a_spec(), monkeypatch) == [Subject("carol", group, None)]


def test_what_nodes_cannot_do_is_refused_after_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VTorqueError) as caught:
        specification(a_spec(vrdma=True), monkeypatch)
    assert caught.value.code is Code.NODE and "yet" in str(caught.value)


def test_the_workspace_of_a_suspended_job_is_taken_over_with_its_entry(tmp_path: Path) -> None:
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
        call = checkedjob.Call("12.host", user.name, SpecPath("/home/carol", "0" * 16, "0" * 64), 0, None)
        attempt = Agent(node.config, tmp_path, place, call, None)
        stored = Stored()
        found: Any = SimpleNamespace(stored=stored)
        names = JobNames(user.home, user.name, "12.host", path)
        attempt.job = job = Job(
            "12.host", place, user, a_spec(suspend=True), an_image(base), ALONE, None, (), names, None, None,  # type: ignore[arg-type]
            found,
        )  # fmt: skip
        attempt.is_stored = True
        with pytest.raises(VTorqueError, match="it does not go"):
            await attempt._take_over(job, found)
        assert attempt.is_stored
        stored.does = False
        with pytest.raises(VTorqueError, match="has been deleted meanwhile"):
            await attempt._take_over(job, found)
        assert attempt.is_stored and "workspace" not in [step["do"] for step in record.steps(place)]
        await attempt._wipe()  # which would have failed: there is no such user
        stored.does = True
        await attempt._take_over(job, found)
        assert not attempt.is_stored and removed == ["12.host"]
        (step,) = (step for step in record.steps(place) if step["do"] == "workspace")
        assert (step["path"], step["kept"]) == (path, False)
        os.close(lock)
        listener.close()

    with short_folder() as base:
        asyncio.run(work())


def test_what_is_stored_goes_when_the_script_is_within_reach(tmp_path: Path) -> None:
    """Not before: an attempt that does not come so far is one that failed."""
    taken: list[object] = []

    async def work() -> None:
        node = make_node(base)
        call = checkedjob.Call("12.host", "carol", SpecPath("/home/carol", "0" * 16, "0" * 64), 0, None)

        def attempt(resumption: object) -> Agent:
            made = Agent(node.config, tmp_path, node.place(), call, None)
            made.job = SimpleNamespace(resumption=resumption)  # type: ignore[assignment]
            made.progress.state = "ready"
            return made

        async def take_over(job: object, found: object) -> None:
            taken.append(found)

        found: Any = object()
        here = attempt(found)
        going: Any = asyncio.ensure_future(here._let_go_on(here.job, found))  # type: ignore[arg-type]
        here._take_over = take_over  # type: ignore[method-assign]
        await asyncio.sleep(0.05)
        assert not taken and here.progress.state == "ready" and not going.done()
        here._started(None)
        here._started("a second word counts for nothing")
        await asyncio.sleep(0.05)
        assert taken == [found] and here.progress.state == "running" and not going.done()
        going.cancel()
        for said in ("the connection broke", "a\nb" * 1000, {"any": "thing"}):
            here = attempt(found)
            here._take_over = take_over  # type: ignore[method-assign]
            here._started(said)
            with pytest.raises(VTorqueError) as caught:
                await here._let_go_on(here.job, found)  # type: ignore[arg-type]
            assert caught.value.code is Code.CONNECT and "\n" not in str(caught.value) and len(str(caught.value)) < 2000
        assert len(taken) == 1
        here = attempt(None)
        here._started(None)
        assert here.progress.state == "running"

    with short_folder() as base:
        asyncio.run(work())


@pytest.mark.parametrize(
    ("node_index", "there", "stored", "shut_down"),
    [
        (0, None, True, False),
        (0, None, False, True),
        (1, "this", True, False),
        (1, "another", True, True),
        (1, None, True, True),
        (1, "unreadable", True, True),
    ],
)
def test_a_job_that_ends_while_it_is_stored_is_not_shut_down(
    node_index: int, there: Optional[str], stored: bool, shut_down: bool, tmp_path: Path
) -> None:
    """What its guests would do at their end is not to change what those of the next start find on their shares."""
    done: list[str] = []

    async def forever(*_: object) -> None:
        await asyncio.Event().wait()

    def doing(name: str) -> Any:
        async def do(*_: object, **__: object) -> None:
            done.append(name)

        return do

    async def find(_job_id: str) -> Any:
        if there == "unreadable":
            raise VTorqueError("it does not answer", code=Code.SUSPEND)
        return None if there is None else (there, ())

    async def work() -> None:
        node = make_node(base)
        call = checkedjob.Call("12.host", "carol", SpecPath("/home/carol", "0" * 16, "0" * 64), node_index, None)
        attempt = Agent(node.config, tmp_path, node.place(), call, None)
        attempt.is_stored = stored
        found = SimpleNamespace(stored=SimpleNamespace(find=find), entry="this")
        job: Any = SimpleNamespace(
            job_id="12.host", spec=a_spec(), resumption=found, network=SimpleNamespace(kind="user"),
            allocation=SimpleNamespace(node_index=node_index, nodes=("n1", "n2")),
        )  # fmt: skip
        guest = SimpleNamespace(ready=forever, shut_down=doing("shut down"))
        crew: Any = SimpleNamespace(guests=[guest], kill=doing("killed"))
        fellows: Any = SimpleNamespace(failure=forever, call_over=doing("over"))

        async def boot(*_: object) -> Any:
            return crew

        attempt._boot = boot  # type: ignore[method-assign]
        attempt.job_over.set()
        with ExitStack() as logs:
            await asyncio.wait_for(attempt._live_with(job, fellows, logs), 10)
        assert done == ["over", *(["shut down"] if shut_down else []), "killed"]

    with short_folder() as base:
        asyncio.run(work())


@pytest.mark.parametrize(
    ("suspend", "folder", "there", "told"),
    [
        (False, True, None, [False]),
        (True, True, "nothing", [True, False]),
        (True, True, "unreadable", [True]),
        (True, True, "another's", [True]),
        (True, False, "nothing", [True, True]),
    ],
)
def test_what_may_be_stored_is_told_before_it_is_looked_for(
    suspend: bool, folder: bool, there: Optional[str], told: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails after `True` does not end a job that was suspended."""
    from vmgr.node import restoring

    said: list[bool] = []
    data = dump_spec(a_spec(suspend=suspend))

    async def read_file(*_: object, **__: object) -> bytes:
        return data

    async def find(*_: object) -> None:
        if there != "nothing":
            raise VTorqueError(f"what is there is {there}", code=Code.SUSPEND)

    def refuse(*_: object, **__: object) -> None:
        raise VTorqueError("not here", code=Code.POLICY)

    monkeypatch.setattr(checkedjob, "read_file", read_file)
    monkeypatch.setattr(restoring, "find", find)
    monkeypatch.setattr(restoring, "Store", lambda *_: None, raising=False)
    monkeypatch.setattr(checkedjob, "check_spec", refuse)

    async def work() -> None:
        node = make_node(base, suspended={"folder": "/scratch/suspended"} if folder else {})
        call = checkedjob.Call("12.host", "carol", SpecPath("/home/carol", "0" * 16, spec_hash(data)), 0, None)
        with pytest.raises(VTorqueError):
            await checkedjob.checked_job(call, node.config, node.place(), a_user(), ALONE, stored=said.append)
        assert said == told

    with short_folder() as base:
        asyncio.run(work())
