"""How nodes meet in a job directory: with and without inotify, whatever lies there, and nothing is left running."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, a_user
from settled import run

from vmgr.errors import Code, VTorqueError
from vmgr.node import meeting
from vmgr.node.allocation import Allocation
from vmgr.node.fellows import Fellows
from vmgr.node.meeting import (
    HOSTS,
    OVER,
    SAVE,
    SAVED,
    STOP,
    STOPPED,
    Barrier,
    Calls,
    Watch,
    call,
    job_folder,
    nodes_folder,
    of_try,
    parse_failure,
    parse_report,
    report,
)
from vmgr.node.user import User

KEY, OLDER = "0123456789abcdef", "fedcba9876543210"
PATIENCE_S = 30.0

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives up root's rights for a user's")


@pytest.fixture
def user() -> User:
    return a_user(uid=65534, gid=65534, groups=())


@pytest.fixture
def directory(user: User) -> Iterator[str]:
    home = Path(tempfile.mkdtemp(prefix="vt-meeting-"))
    os.chown(home, user.uid, user.gid)
    before = set(psutil.Process().children(recursive=True))
    yield str(home)
    shutil.rmtree(home)
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=5)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE], "a watching child is left"


async def say(user: User, directory: str, kind: str, node: int, key: str = KEY, **data: Any) -> None:
    await report(user, directory, key, kind, node, data, timeout_s=10)


@pytest.mark.parametrize("inotify", [True, False])
def test_forty_nodes_meet(directory: str, user: User, inotify: bool) -> None:
    async def work() -> float:
        barrier = Barrier(directory, KEY, user=user, nodes=[f"n{n}" for n in range(40)], inotify=inotify)
        try:
            await say(user, directory, "ready", 0, key=OLDER)
            for node in range(39):
                await say(user, directory, "ready", node)
            waiting = asyncio.ensure_future(barrier.all_ready())
            await asyncio.sleep(0.7)
            assert not waiting.done()
            begun = time.monotonic()
            await say(user, directory, "ready", 39)
            await waiting
            return time.monotonic() - begun
        finally:
            await barrier.close()

    assert run(work()) <= 1.0, "slack after the last node"


def test_a_failure_ends_the_waiting_at_once(directory: str, user: User) -> None:
    async def work() -> None:
        barrier = Barrier(directory, KEY, user=user, nodes=["n1", "n2", "n3"])
        try:
            waiting = [asyncio.ensure_future(wait()) for wait in (barrier.all_ready, barrier.failure)]
            await say(user, directory, "ready", 0)
            await say(user, directory, "failed", 2, code="VT-HOOK", reason="it ended with 3", output="said\n")
            for one in waiting:
                with pytest.raises(VTorqueError, match="VT-HOOK: n3: it ended with 3") as caught:
                    await one
                assert caught.value.output == "said\n"
        finally:
            await barrier.close()

    run(work())


def test_the_end_of_all_nodes_is_awaited_within_a_bound(directory: str, user: User) -> None:
    async def work() -> None:
        barrier = Barrier(directory, KEY, user=user, nodes=["n1", "n2", "n3"])
        try:
            await say(user, directory, "gone", 1)
            begun = time.monotonic()
            assert await barrier.all_gone(0.3) == []
            assert 0.3 <= time.monotonic() - begun < 5
            await say(user, directory, "gone", 2, code="VT-HOOK", reason="epilogue", output="")
            (problem,) = await barrier.all_gone(PATIENCE_S)
            assert problem.code is Code.HOOK and "n3: epilogue" in str(problem)
        finally:
            await barrier.close()

    run(work())


@pytest.mark.parametrize("turns", range(8))
def test_who_stops_listening_at_once_leaves_no_child(directory: str, user: User, turns: int) -> None:
    async def work() -> None:
        barrier = Barrier(directory, KEY, user=user, nodes=["n1", "n2"])
        for _ in range(turns):
            await asyncio.sleep(0)
        await barrier.close()

    run(work())


@pytest.mark.parametrize("inotify", [True, False])
def test_the_job_is_called_over(directory: str, user: User, inotify: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "SISTER_LOOKS_AGAIN_SECONDS", 0.2)

    async def work() -> None:
        calls = Calls(directory, KEY, user=user, inotify=inotify)
        try:
            waiting = asyncio.ensure_future(calls.first(OVER))
            await call(user, directory, OLDER, OVER, timeout_s=10)
            await asyncio.sleep(0.5)
            assert not waiting.done()
            await call(user, directory, KEY, OVER, timeout_s=10)
            assert await waiting == OVER
        finally:
            await calls.close()

    run(work())


def fellows(directory: str, user: User, node: int) -> Fellows:
    return Fellows(directory, Allocation(("n1", "n2", "n3"), node, KEY), user, timeout_s=10)


def test_a_suspension_is_led(directory: str, user: User) -> None:
    """What is said of another try counts for nothing; the first sister that cannot says why."""

    async def work() -> None:
        leader, *sisters = (fellows(directory, user, node) for node in range(3))
        try:
            await say(user, directory, of_try(STOPPED, 1), 1)
            leader.begin_try(1)
            leading = asyncio.ensure_future(leader.lead(STOP, 1, STOPPED))
            assert [await sister.first_call(of_try(SAVE, 1), of_try(STOP, 1)) for sister in sisters] == ["stop-1"] * 2
            await sisters[1].tell(of_try(STOPPED, 1), {"reason": "/home is in use"})
            with pytest.raises(VTorqueError, match="VT-SUSPEND: n3: /home is in use"):
                await leading
            leader.begin_try(2)
            await say(user, directory, of_try(SAVED, 1), 1)
            leading = asyncio.ensure_future(leader.lead(STOP, 2, STOPPED))
            assert [await sister.first_call(of_try(STOP, 2)) for sister in sisters] == ["stop-2"] * 2
            await sisters[0].tell(of_try(STOPPED, 2), {})
            await asyncio.sleep(0.5)
            assert not leading.done()
            await sisters[1].tell(of_try(STOPPED, 2), {})
            await leading
            with pytest.raises(VTorqueError, match="VT-SUSPEND: the job could not be suspended 16 times"):
                leader.begin_try(17)
            assert not any(sister.ended_as_usual for sister in sisters)
            await leader.call_over(suspended=True)
            await sisters[0].over()
            assert not sisters[0].ended_as_usual
        finally:
            for each in (leader, *sisters):
                await each.close()

    run(work())


def test_nodes_tell_each_other_where_their_guests_are(directory: str, user: User) -> None:
    async def work() -> list[list[str]]:
        nodes = [fellows(directory, user, node) for node in range(3)]
        try:
            told = [[f"10.1.{node}.{guest}" for guest in (1, 2)] for node in range(3)]
            return await asyncio.gather(*(each.exchange(own) for each, own in zip(nodes, told)))
        finally:
            for each in nodes:
                await each.close()

    everybody = [f"10.1.{node}.{guest}" for node in range(3) for guest in (1, 2)]
    assert run(work()) == [everybody] * 3


@pytest.mark.parametrize(
    "addresses",
    [None, "10.1.1.1", [], ["10.1.1.1"], ["10.1.1.1", "127.0.0.1"], ["10.1.1.1", 7], ["10.1.1.1", "10.1.1.2"] * 2],
)
def test_addresses_that_are_none_are_refused(directory: str, user: User, addresses: Any) -> None:
    async def work() -> None:
        leader = fellows(directory, user, 0)
        try:
            await say(user, directory, "up", 1, addresses=["10.1.2.1", "10.1.2.2"])
            await say(user, directory, "up", 2, addresses=addresses)
            with pytest.raises(
                VTorqueError, match="the addresses of the guests of another node are not known"
            ) as caught:
                await leader.exchange(["10.1.3.1", "10.1.3.2"])
            assert caught.value.code is Code.BOOT
        finally:
            await leader.close()

    run(work())
    assert not Path(job_folder(directory, KEY), HOSTS).exists()


def test_whatever_a_user_leaves_there_is_passed_over(directory: str, user: User, tmp_path: Path) -> None:
    folder = Path(nodes_folder(directory, KEY))
    folder.mkdir()
    os.chown(folder, user.uid, user.gid)
    (tmp_path / "secret").write_text('{"v": 1}')
    (tmp_path / "secret").chmod(0o600)
    os.mkfifo(folder / "ready.0", 0o666)
    (folder / "ready.1").symlink_to(tmp_path / "secret")
    (folder / "failed.2").mkdir(mode=0o755)
    for name, data in {
        "ready.7": b"{}", "ready.99999999": b"{}", "ready.-1": b"{}", "other.1": b"{}", "failed.1": b"[1]",
        "gone.1": b"[" * 60_000, "gone.2": b'{"code": "VT-USAGE", "reason": ["x"], "output": 7}', "\udcff": b"",
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)
    for made in folder.iterdir():
        os.chown(made, user.uid, user.gid, follow_symlinks=False)

    async def work() -> None:
        barrier = Barrier(directory, KEY, user=user, nodes=["n1", "n2", "n3"])
        try:
            waiting = asyncio.ensure_future(barrier.all_ready())
            await asyncio.sleep(0.5)
            assert not waiting.done()
            waiting.cancel()
            (problem,) = await barrier.all_gone(0.1)
            assert problem.code is Code.INTERNAL and problem.output == ""
        finally:
            await barrier.close()

    run(work())


@FUZZ
@given(
    st.text(max_size=20) | st.from_regex(r"(up|ready|failed|gone|stopped-[0-9]{1,3})\.[0-9]{1,7}", fullmatch=True),
    st.binary(max_size=200),
)
def test_any_file(name: str, data: bytes) -> None:
    found = parse_report(name, data)
    assert found is None or (found.kind in meeting.KINDS and found.node >= 0 and isinstance(found.data, dict))


@FUZZ
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_failure(value: Any) -> None:
    for data in ({"code": value}, {"code": "VT-HOOK", "reason": value, "output": value}):
        problem = parse_failure(data, "n1")
        assert problem is None or problem.code is Code.SUSPEND or 70 <= problem.code.status <= 79
        assert problem is None or "\n" not in str(problem)
        assert problem is None or len(problem.output) <= meeting.MAX_OUTPUT_CHARS


def test_what_a_sister_cannot_resume_is_told_as_it_is() -> None:
    for told, code in (("VT-SUSPEND", Code.SUSPEND), ("VT-POLICY", Code.INTERNAL), ("VT-STAGE", Code.STAGE)):
        problem = parse_failure({"code": told, "reason": "0.state has 7 bytes, not 8"}, "n2")
        assert problem is not None and problem.code is code and problem.message == "n2: 0.state has 7 bytes, not 8"


@FUZZ
@given(
    st.fixed_dictionaries(
        {},
        optional={
            word: st.none() | st.text() | st.lists(st.text() | st.lists(st.integers())) | st.just(["x" * 9000] * 7)
            for word in ("code", "reason", "output", "addresses", "ssh_ports", "resumed", "image", "other")
        },
    )
)
def test_any_report_takes_little_room(data: dict[str, Any]) -> None:
    found = meeting.kept({**data, "long": "x" * 60_000, "deep": [[]] * 20_000})
    assert len(json.dumps(found)) <= meeting.MAX_REPORT_BYTES / 2
    for word in ("code", "reason", "output"):
        assert (word in found) == isinstance(data.get(word), str)


def test_the_longest_report_is_heard(directory: str, user: User) -> None:
    async def work() -> None:
        barrier = Barrier(directory, KEY, user=user, nodes=["n1", "n2"])
        try:
            await say(
                user, directory, "failed", 1, code="VT-HOOK", reason="\0" * 9000, output="\udcff\0" * 90_000 + "end"
            )
            with pytest.raises(VTorqueError, match="VT-HOOK: n2: ") as caught:
                await barrier.failure()
            assert caught.value.output.endswith("end") and len(caught.value.output) == meeting.MAX_OUTPUT_CHARS
        finally:
            await barrier.close()

    run(work())


def test_nesting_that_is_too_deep_to_show_is_no_fault() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    problem = parse_failure(meeting.kept({"code": "VT-HOOK", "reason": deep, "output": deep}), "n1")
    assert problem is not None and problem.code is Code.HOOK


def test_a_folder_full_of_files_is_looked_at_no_further_than_bounded(tmp_path: Path) -> None:
    folder = tmp_path / "nodes"
    folder.mkdir()
    for number in range(200):
        (folder / f"ready.{number}").write_text("{}")
    read, write = os.pipe()
    Watch(str(folder), 100, 1.0, 50, False).tell_new(set(), write)
    os.close(write)
    with open(read, "rb") as stream:
        assert stream.read().count(json.dumps({}).encode()) == 50
