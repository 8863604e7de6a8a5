"""Where an attempt stands, and its control socket: a real one, with real and hostile callers."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodesite import FUZZ, short_folder

from vmgr.errors import Code, VTorqueError
from vmgr.node import control
from vmgr.node.client import AgentLink, failure
from vmgr.node.control import MAX_CLIENTS, MAX_REQUEST_BYTES, Control, Talk
from vmgr.node.state import Progress

FACTS = {"job_id": "12.host", "attempt": "1", "node": "n1", "guest": "vn1-1"}


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 20))


def test_states_stages_and_what_is_told() -> None:
    async def work() -> None:
        progress = Progress(0, FACTS)
        assert (progress.state, progress.public()["stages"], progress.public()["code"]) == ("starting", [], None)
        progress.stage("agent")
        progress.stage("spec", "staging")
        progress.private["ssh"] = {"port": 2222}
        assert progress.state == "staging" and [s["name"] for s in progress.stages] == ["agent", "spec"]
        assert "ssh" not in progress.public() and progress.full()["ssh"] == {"port": 2222}
        assert progress.public()["job_id"] == "12.host"

    run(work())


def test_how_far_a_long_step_is_until_it_is_done() -> None:
    async def work() -> None:
        progress = Progress(0, {**FACTS})
        changes = progress.changes()
        await changes.__anext__()
        progress.doing("copying 37 %")
        await changes.__anext__()
        assert progress.public()["doing"] == "copying 37 %"
        progress.stage("staged")
        assert progress.public()["doing"] is None

    run(work())


def test_the_first_failure_counts() -> None:
    async def work() -> None:
        progress = Progress(0, FACTS)
        first = VTorqueError("no room", code=Code.STAGE, hint="see it")
        first.output = "said\n"
        progress.fail(first)
        progress.fail(VTorqueError("later", code=Code.BOOT))
        progress.stage("job ended", "ending")
        told = progress.public()
        assert (told["state"], told["code"], told["reason"], told["output"]) == (
            "failed",
            "VT-STAGE",
            "no room; see it",
            "said\n",
        )
        problem = failure(told)
        assert problem is not None and str(problem) == "VT-STAGE: no room; see it"

    run(work())


def test_changes_come_at_once_and_several_as_one() -> None:
    async def work() -> None:
        progress = Progress(0, FACTS)
        changes = progress.changes()
        await changes.__anext__()
        for name in ("a", "b", "c"):
            progress.stage(name)
        await changes.__anext__()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(changes.__anext__(), 0.05)

    run(work())


async def count(talk: Talk) -> AsyncIterator[Mapping[str, Any]]:
    """An order that counts up to `to`, and cannot count beyond 3."""
    for number in range(1, talk.request["to"] + 1):
        if number > 3:
            raise VTorqueError("too far", code=Code.GUEST, hint="count less")
        yield {"number": number}


async def echo(talk: Talk) -> AsyncIterator[Mapping[str, Any]]:
    """An order that says what its caller goes on to say, and never ends by itself."""
    try:
        while True:
            yield {"said": (await talk.more())["say"]}
    finally:
        echoes_ended.append(talk.peer.uid)


echoes_ended: list[int] = []


class Served:
    """A control socket that is being served; `overs` counts the ends of the job, `joined` has who joined it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.progress = Progress(0, FACTS)
        self.overs = 0
        self.joined: list[int] = []
        self.detached: list[tuple[object, object]] = []
        self.named: list[object] = []
        self.control = Control(
            self.progress, os.getuid(), over=self.over, attached=lambda: None, joined=self.join,
            detached=lambda number, error: self.detached.append((number, error)), named=self.named.append,
            orders={"count": count, "echo": echo},
        )  # fmt: skip

    def over(self) -> None:
        self.overs += 1

    async def join(self, pid: int) -> None:
        self.joined.append(pid)

    async def talk(self, data: bytes, *, answers: int = 0) -> list[dict[str, Any]]:
        """Say something, take so many answers, leave."""
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        writer.write(data)
        got = [json.loads(await reader.readline()) for _ in range(answers)]
        writer.close()
        await asyncio.sleep(0.01)
        return got


@contextmanager
def listening() -> Iterator[tuple[Path, socket.socket]]:
    with short_folder() as folder:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(folder / "s"))
        listener.listen(128)
        yield folder / "s", listener


def served(work: Callable[[Served], Coroutine[Any, Any, None]]) -> list[dict[str, Any]]:
    """Run `work` against a served socket; gives what asyncio found unhandled."""
    unhandled: list[dict[str, Any]] = []

    async def serve() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        with listening() as (path, listener):
            place = Served(path)
            server = await place.control.serve(listener)
            await work(place)
            server.close()
            await place.control.drain(1)

    run(serve())
    return unhandled


def test_a_wrapper_may_say_which_member_of_an_array_it_is() -> None:
    async def work(place: Served) -> None:
        await place.talk(b'{"op":"attach","member":"16_3"}\n', answers=1)
        await place.talk(b'{"op":"follow","member":"16_4"}\n{"op":"status","member":"16_5"}\n', answers=2)
        assert place.named == ["16_3"]
        link = await AgentLink.connect(place.path)
        async for _ in link.follow("attach", member="16_6"):
            break
        link.close()
        assert place.named == ["16_3", "16_6"]

    assert served(work) == []


def test_status_follow_and_the_link() -> None:
    async def work(place: Served) -> None:
        (answer,) = await place.talk(b'{"op":"status"}\n', answers=1)
        assert answer["state"] == "starting"
        link = await AgentLink.connect(place.path)
        states = []
        async for snapshot in link.follow():
            states.append(snapshot["state"])
            if snapshot["state"] == "ready":
                break
            place.progress.stage("x", {"starting": "staging", "staging": "ready"}[snapshot["state"]])
        link.close()
        await asyncio.sleep(0.01)
        assert states == ["starting", "staging", "ready"] and place.overs == 0, "who only follows may leave"

    assert served(work) == []


def test_the_job_is_over_when_its_wrapper_says_so_or_breaks() -> None:
    async def work(place: Served) -> None:
        await place.talk(b'{"op":"end"}\n')
        assert place.overs == 1
        await place.talk(b'{"op":"attach"}\n', answers=1)
        assert place.overs == 2
        await place.talk(b'{"op":"follow"}\n{"op":"attach"}\n', answers=2)
        assert place.overs == 2, "one role a connection"

    assert served(work) == []


def test_the_wrapper_says_how_the_script_ended() -> None:
    async def work(place: Served) -> None:
        for status, noted in ((b"null", None), (b'"0"', None), (b"256", None), (b"4", 4), (b"5", 4)):
            await place.talk(b'{"op":"end","status":' + status + b"}\n")
            assert place.progress.job_status == noted

    assert served(work) == []


def test_the_wrapper_says_that_it_has_left_its_session() -> None:
    async def work(place: Served) -> None:
        await place.talk(b'{"op":"detached","try":1}\n{"op":"detached","try":[],"error":{}}\n{"op":"detached"}\n')
        assert place.detached == [(1, None), ([], {}), (None, None)] and place.overs == 0

    assert served(work) == []


def test_only_the_wrapper_and_who_says_so_are_the_jobs() -> None:
    async def work(place: Served) -> None:
        (answer,) = await place.talk(b'{"op":"join"}\n', answers=1)
        assert answer["state"] == "starting" and place.joined == [os.getpid()]
        await place.talk(b'{"op":"status"}\n{"op":"follow"}\n{"op":"started"}\n{"op":"end"}\n', answers=2)
        assert len(place.joined) == 1, "whoever else asks may have come from anywhere"
        await place.talk(b'{"op":"attach"}\n', answers=1)
        assert place.joined == [os.getpid()] * 2

    assert served(work) == []


def test_root_is_not_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_peer", lambda _: control.Peer(1, 0))

    async def work(place: Served) -> None:
        place.control._owner = 1000
        await place.talk(b'{"op":"join"}\n{"op":"attach"}\n', answers=2)
        assert place.joined == []

    assert served(work) == []


def test_the_script_starts_once_and_only_in_a_ready_guest() -> None:
    async def work(place: Served) -> None:
        await place.talk(b'{"op":"started"}\n')
        assert place.progress.state == "starting"
        place.progress.stage("ready", "ready")
        await place.talk(b'{"op":"started"}\n' * 5000)
        assert place.progress.state == "running" and len(place.progress.stages) == 2
        place.progress.fail(VTorqueError("dead", code=Code.GUEST))
        await place.talk(b'{"op":"started"}\n')
        assert place.progress.state == "failed"

    assert served(work) == []


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"[]",
        b"null",
        b'{"op":null}',
        b'{"op":["follow"]}',
        b'{"op":{}}',
        b'{"op":"STATUS"}',
        b'{"op":"over"}',
        b'"end"',
    ],
)
def test_other_operations_are_answered(line: bytes) -> None:
    async def work(place: Served) -> None:
        first, second = await place.talk(line + b'\n{"op":"status"}\n', answers=2)
        assert "operations are" in first["error"] and second["state"] == "starting"

    assert served(work) == []


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"x",
        b"\xff\xfe",
        b"[" * (MAX_REQUEST_BYTES - 10),
        b'{"op":"status"' + b" " * (8 * MAX_REQUEST_BYTES),
        b"\0" * 99,
    ],
    ids=["empty", "word", "bytes", "deep", "long", "zeros"],
)
def test_noise_ends_that_connection_and_no_other(line: bytes) -> None:
    async def work(place: Served) -> None:
        kept_reader, kept = await asyncio.open_unix_connection(str(place.path))
        reader, writer = await asyncio.open_unix_connection(str(place.path))
        writer.write(line + b"\n" + b'{"op":"end"}\n')
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            pass  # closed while we still wrote
        writer.close()
        kept.write(b'{"op":"status"}\n')
        assert json.loads(await kept_reader.readline())["state"] == "starting"
        kept.close()
        assert place.overs == 0

    assert served(work) == []


@settings(FUZZ, max_examples=20)
@given(
    lines=st.lists(
        st.binary(max_size=60) | st.dictionaries(st.just("op"), st.text()).map(lambda d: json.dumps(d).encode())
    )
)
def test_arbitrary_requests_leave_the_agent_serving(lines: list[bytes]) -> None:
    async def work(place: Served) -> None:
        await place.talk(b"\n".join(lines) + b"\n")
        assert (await place.talk(b'{"op":"status"}\n', answers=1))[0]["state"] == "starting"
        assert place.progress.stages == []

    assert served(work) == []


def test_too_many_callers_are_turned_away_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_peer", lambda _: control.Peer(1, 1000))  # root would always be served
    monkeypatch.setattr(os, "getuid", lambda: 1000)

    async def work(place: Served) -> None:
        held = [await asyncio.open_unix_connection(str(place.path)) for _ in range(MAX_CLIENTS)]
        for reader, writer in held:
            writer.write(b'{"op":"follow"}\n')
            await reader.readline()
        link = await AgentLink.connect(place.path)
        with pytest.raises(VTorqueError, match=r"^VT-ACCESS: .*64 callers") as caught:
            await link.snapshot()
        assert str(caught.value).count("VT-ACCESS") == 1
        link.close()
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.02)
        assert len(await place.talk(b'{"op":"status"}\n', answers=1)) == 1

    assert served(work) == []


def test_strangers_are_told_so_even_if_they_talk_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_peer", lambda _: control.Peer(1, 4711))
    monkeypatch.setattr(control, "REFUSAL_SECONDS", 0.2)

    async def work(place: Served) -> None:
        for _ in range(20):
            link = await AgentLink.connect(place.path)
            link.send("status")
            with pytest.raises(VTorqueError, match=r"^VT-ACCESS: this job belongs to uid .*, you are uid 4711"):
                await link.snapshot()
            link.close()
        reader, writer = await asyncio.open_unix_connection(str(place.path))
        assert b"4711" in await reader.readline()
        assert await reader.read() == b"", "who says nothing is not waited for"
        writer.close()

    assert served(work) == []


def test_strangers_do_not_take_the_agents_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody on the node may connect; who floods is turned away at once, and the owner is served meanwhile."""
    strangers = True

    def peer(_: object) -> control.Peer:
        return control.Peer(1, 4711 if strangers else os.getuid())

    monkeypatch.setattr(control, "_peer", peer)

    async def work(place: Served) -> None:
        nonlocal strangers
        came = [await asyncio.open_unix_connection(str(place.path)) for _ in range(100)]
        await asyncio.sleep(0.05)
        told = [reader for reader, _ in came if not reader.at_eof() and await reader.readline()]
        assert len(told) == control.MAX_REFUSALS, "the others are gone already"
        strangers = False
        assert (await place.talk(b'{"op":"status"}\n', answers=1))[0]["state"] == "starting"
        await asyncio.sleep(control.REFUSAL_SECONDS)
        assert place.control._refusals == 0
        for _, writer in came:
            writer.close()

    assert served(work) == []


def test_who_has_left_without_taking_its_answers_keeps_no_descriptor() -> None:
    async def work(place: Served) -> None:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        kept = []
        for _ in range(5):
            caller = socket.socket(socket.AF_UNIX)
            caller.connect(str(place.path))
            caller.setblocking(False)
            kept.append(caller)
            place.progress.facts["doing"] = "x" * 30_000
            await asyncio.get_running_loop().sock_sendall(caller, b'{"op":"status"}\n' * 8)
            await asyncio.sleep(0.05)
            caller.shutdown(socket.SHUT_WR)
        await asyncio.sleep(0.1)
        assert len(os.listdir("/proc/self/fd")) == before + 5, "the callers' own"  # noqa: PTH208
        for caller in kept:
            caller.close()

    assert served(work) == []


def test_a_caller_that_never_reads_holds_up_nobody() -> None:
    async def work(place: Served) -> None:
        _, writer = await asyncio.open_unix_connection(str(place.path))
        writer.write(b'{"op":"follow"}\n' + b'{"op":"status"}\n' * 20_000)
        for n in range(200):
            place.progress.stage(f"stage {n}")
            await asyncio.sleep(0)
        assert len(await place.talk(b'{"op":"status"}\n', answers=1)) == 1
        writer.transport.abort()

    assert served(work) == []


def test_a_link_to_an_agent_that_is_gone() -> None:
    async def work(place: Served) -> None:
        link = await AgentLink.connect(place.path)
        link.send("follow")
        assert await link.snapshot() is not None
        await place.control.drain(0)
        assert await link.snapshot() is None
        link.close()

    assert served(work) == []


def test_an_order_answers_until_it_is_done_or_fails() -> None:
    async def work(place: Served) -> None:
        link = await AgentLink.connect(place.path)
        assert [answer async for answer in link.order("count", to=2)] == [{"number": 1}, {"number": 2}]
        assert [answer async for answer in link.order("count", to=0)] == []
        with pytest.raises(VTorqueError, match="too far") as caught:
            async for answer in link.order("count", to=9):
                assert answer["number"] <= 3
        assert caught.value.code is Code.GUEST
        with pytest.raises(VTorqueError, match=r"the operations are status, .*, count, echo"):
            async for _ in link.order("dance"):
                pass
        link.close()

    assert served(work) == []


def test_an_order_hears_its_caller_and_ends_with_it() -> None:
    async def work(place: Served) -> None:
        echoes_ended.clear()
        link = await AgentLink.connect(place.path)
        answers = link.order("echo")
        said = asyncio.ensure_future(answers.__anext__())
        await asyncio.sleep(0)
        for word in ("a", "b"):
            link.send("more", say=word)
            assert (await said)["said"] == word
            said = asyncio.ensure_future(answers.__anext__())
        link.close()
        with pytest.raises(VTorqueError) as caught:
            await said
        assert caught.value.code is Code.AGENT
        await asyncio.sleep(0.05)
        assert echoes_ended == [os.getuid()] and place.overs == 0
        await place.talk(b'{"op":"echo"}\n[]\n')
        assert len(echoes_ended) == 2, "what is no request ends the connection, and the order with it"

    assert served(work) == []
