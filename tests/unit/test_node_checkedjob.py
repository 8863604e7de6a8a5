"""Whose policy the agent holds a specification against, and what it refuses after that."""

from __future__ import annotations

import asyncio
import grp
from typing import Any, Optional

import pytest
from nodesite import a_spec, a_user, an_image, make_node, short_folder

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import Spec, SpecPath, dump_spec, spec_hash
from vmgr.node import checkedjob
from vmgr.node.allocation import Allocation
from vmgr.node.user import primary_group
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
