"""The lives of a node's guests, without any: what ends them, what is done at their end, what makes them ready."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from nodesite import Node, a_spec, an_image, make_node, short_folder

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import SpecPath
from vmgr.node import guestlives
from vmgr.node.attendance import Attendance
from vmgr.node.checkedjob import Call
from vmgr.node.consolelogs import console_logs
from vmgr.node.guestlives import GuestLives
from vmgr.node.readiness import checked_ports, said_of
from vmgr.node.state import Progress
from vmgr.node.takeover import Takeover


async def forever(*_: object) -> None:
    await asyncio.Event().wait()


def some_lives(node: Node, *, node_index: int, is_stored: bool) -> GuestLives:
    call = Call("12.host", "carol", SpecPath("/home/carol", "0" * 16, "0" * 64), node_index, None)
    nothing: Any = None
    progress, attendance = Progress(100, {}), Attendance(60, awaited=node_index == 0)
    takeover = Takeover(node.config, nothing, node.place(), "12.host", progress, nothing, leads=node_index == 0)
    takeover.is_stored = is_stored
    return GuestLives(node.config, node.base, call, progress, attendance, takeover)


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
    node_index: int, there: Optional[str], stored: bool, shut_down: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its guests would do at their end is not to change what those of the next start find on their shares."""
    done: list[str] = []

    def doing(name: str) -> Any:
        async def do(*_: object, **__: object) -> None:
            done.append(name)

        return do

    async def find(_job_id: str) -> Any:
        if there == "unreadable":
            raise VTorqueError("it does not answer", code=Code.SUSPEND)
        return None if there is None else (there, ())

    async def work() -> None:
        found = SimpleNamespace(stored=SimpleNamespace(find=find), entry="this")
        job: Any = SimpleNamespace(
            job_id="12.host", spec=a_spec(), resumption=found, network=SimpleNamespace(kind="user"),
            allocation=SimpleNamespace(node_index=node_index, nodes=("n1", "n2")),
        )  # fmt: skip
        guest = SimpleNamespace(ready=forever, shut_down=doing("shut down"))
        crew = SimpleNamespace(guests=[guest], kill=doing("killed"))
        fellows: Any = SimpleNamespace(failure=forever, call_over=doing("over"))

        async def boot(*_: object) -> Any:
            return crew

        monkeypatch.setattr(guestlives, "boot", boot)
        lives = some_lives(make_node(base), node_index=node_index, is_stored=stored)
        lives._attendance.over.set()
        await asyncio.wait_for(lives.live(job, fellows, lambda _: None), 10)
        assert done == ["over", *(["shut down"] if shut_down else []), "killed"]
        assert lives.crew is None and not lives.suspended

    with short_folder() as base:
        asyncio.run(work())


@pytest.mark.parametrize(("stored", "told"), [(False, True), (True, False)])
def test_a_guest_that_fails_fails_the_job_unless_that_may_go_back(
    stored: bool, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guests are there, and are killed, after the failure is told."""
    states: list[str] = []

    async def fail(*_: object) -> None:
        raise VTorqueError("it does not boot", code=Code.BOOT)

    async def work() -> None:
        lives = some_lives(make_node(base), node_index=0, is_stored=stored)

        async def kill() -> None:
            states.append(lives._progress.state)

        async def boot(*_: object) -> Any:
            return SimpleNamespace(guests=[SimpleNamespace(ready=fail)], kill=kill)

        monkeypatch.setattr(guestlives, "boot", boot)
        job: Any = SimpleNamespace(spec=a_spec(), network=SimpleNamespace(kind="user"))
        fellows: Any = SimpleNamespace(failure=forever)
        with pytest.raises(VTorqueError, match="it does not boot"):
            await asyncio.wait_for(lives.live(job, fellows, lambda _: None), 10)
        assert states == ["failed" if told else "starting"] and lives.crew is None

    with short_folder() as base:
        asyncio.run(work())


def test_a_job_that_is_over_before_its_guests_run_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    async def boot(*_: object) -> None:
        try:
            await forever()
        finally:
            ended.append("boot")

    async def work() -> None:
        monkeypatch.setattr(guestlives, "boot", boot)
        lives = some_lives(make_node(base), node_index=0, is_stored=False)
        asyncio.get_running_loop().call_later(0.02, lives._attendance.over.set)
        nothing: Any = None
        await asyncio.wait_for(lives.live(nothing, nothing, lambda _: None), 10)
        assert ended == ["boot"] and lives.crew is None

    with short_folder() as base:
        asyncio.run(work())


def test_ports_are_those_of_nodes_whose_guests_are_of_one_job(tmp_path: Path) -> None:
    entry = SimpleNamespace(key="a" * 16, when=7)
    job: Any = SimpleNamespace(
        image=an_image(tmp_path), resumption=SimpleNamespace(entry=entry), own=["first", "second"],
        allocation=SimpleNamespace(nodes=("n1", "n2")), names=["a", "b", "c", "d"],
    )  # fmt: skip
    crew: Any = SimpleNamespace(ssh_ports=lambda: {"c": 50001, "d": 50002, "a": 1})
    said = said_of(job, crew)
    assert checked_ports(job, 1, said) == {"c": 50001, "d": 50002}
    for wrong, code in (({"image": "micro@2"}, Code.IMAGE), ({"resumed": None}, Code.SUSPEND)):
        with pytest.raises(VTorqueError, match="n2") as caught:
            checked_ports(job, 1, {**said, **wrong})
        assert caught.value.code is code


@pytest.mark.parametrize(
    ("awaited", "attached", "ends"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_guests_no_job_comes_for_are_ended_where_one_is_to_come(awaited: bool, attached: bool, ends: bool) -> None:
    async def work() -> None:
        attendance = Attendance(0.01, awaited=awaited)
        if attached:
            attendance.attached.set()
        waiting = asyncio.ensure_future(attendance.unattended())
        await asyncio.wait([waiting], timeout=10 if ends else 0.1)
        assert waiting.done() == ends
        if ends:
            with pytest.raises(VTorqueError, match=r"no job has come for the guest within 0\.01 s"):
                waiting.result()
        waiting.cancel()

    asyncio.run(work())


def test_consoles_are_logged_beside_the_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with console_logs(None, 0) as open_log:
        assert open_log("vn1-1") is None
    (tmp_path / "12.host.3.console").mkdir()
    with console_logs(tmp_path / "12.host.log", os.getuid()) as open_log:
        streams = [open_log(f"vn1-{number}") for number in (1, 2, 3)]
        for stream in streams[:2]:
            assert stream is not None
            stream.write(b"booting\n")
        assert streams[2] is None
    assert all(stream.closed for stream in streams if stream)
    for name in ("12.host.console", "12.host.2.console"):
        assert (tmp_path / name).read_bytes() == b"booting\n"
