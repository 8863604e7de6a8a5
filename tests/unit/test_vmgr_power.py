"""`vmgr power` where the order ends the job: the agent may go before it answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from nodesite import Node, make_node, short_folder

from vmgr.commands import power
from vmgr.errors import Code, VTorqueError
from vmgr.reach.target import parse_target


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Any:
    with short_folder() as base:
        made = make_node(base)
        monkeypatch.setattr(power, "installation", lambda: made.install)
        yield made


def press(monkeypatch: pytest.MonkeyPatch, rank: int, failure: VTorqueError, *, as_json: bool = False) -> None:
    """Switch the guest of this rank off, with an agent that fails so."""

    async def order(*_words: object, **_members: object) -> AsyncIterator[dict[str, Any]]:
        raise failure
        yield {}

    @contextlib.asynccontextmanager
    async def agent_of(*_: object) -> AsyncIterator[object]:
        snapshot = {"state": "running", "nodes": ["n1"], "members": [{"rank": rank, "name": f"vn1-{rank + 1}"}]}
        link = SimpleNamespace(order=order)
        yield SimpleNamespace(snapshot=snapshot, member={"rank": rank}, job_id="12.host", link=link)

    monkeypatch.setattr("vmgr.reach.agents.agent_of", agent_of)
    asyncio.run(power._order(parse_target(f"12:{rank}"), "off", True, as_json, {}))


GONE = VTorqueError("the node agent has ended before power was done", code=Code.AGENT)


def test_the_jobs_end_is_no_failure(
    node: Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    press(monkeypatch, 0, GONE)
    assert capsys.readouterr().out == "job 12.host ends, for its script ran in this guest\n"
    press(monkeypatch, 0, GONE, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"rank": 0, "job_ends": True}


@pytest.mark.parametrize(("rank", "failure"), [(1, GONE), (0, VTorqueError("no", code=Code.GUEST))])
def test_other_failures_are(node: Node, monkeypatch: pytest.MonkeyPatch, rank: int, failure: VTorqueError) -> None:
    with pytest.raises(VTorqueError, match=failure.message):
        press(monkeypatch, rank, failure)
