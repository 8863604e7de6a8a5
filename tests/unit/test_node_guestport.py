"""What comes out of a guest: events and console, from a guest that is the user's and may send anything."""

from __future__ import annotations

import asyncio
import base64
import errno
import json
import socket
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.node import console as console_module
from vmgr.node.console import KEEP_BYTES, Console
from vmgr.node.guestport import (
    MAX_EVENTS,
    MAX_LINE_BYTES,
    MAX_OUTPUT_CHARS,
    MAX_STRETCHES,
    Event,
    GuestPort,
    Stretch,
    parse_event,
    parse_stretches,
)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 5))


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def line(**fields: object) -> bytes:
    return json.dumps({"v": 1, **fields}).encode() + b"\n"


@pytest.mark.parametrize(
    ("fields", "event"),
    [
        ({"event": "booted"}, Event("booted", 0, "")),
        ({"event": "ready", "ssh": 22}, Event("ready", 0, "")),
        ({"event": "booted", "uptime": 3.5}, Event("booted", 0, "", None, (Stretch("uptime", 3.5, 0.0),))),
        (
            {"event": "times", "uptime": 10, "spans": [["kernel", 0, 2.5], ["cloud-init init", 4, 99]]},
            Event(
                "times",
                0,
                "",
                None,
                (Stretch("uptime", 10.0, 0.0), Stretch("kernel", 10.0, 7.5), Stretch("cloud-init init", 6.0, 0.0)),
            ),
        ),
        *(
            ({"event": "times", "uptime": uptime, "spans": [["kernel", 0, 1]]}, Event("times", 0, ""))
            for uptime in (None, -1, "3", True, 1e300, 10**400, float("nan"), float("inf"), [1])
        ),
        *(
            (
                {"event": "times", "uptime": 5, "spans": spans},
                Event("times", 0, "", None, (Stretch("uptime", 5.0, 0.0),)),
            )
            for spans in (
                None,
                7,
                {"kernel": 1},
                ["kernel"],
                [["kernel", 1]],
                [["kernel", "0", 1]],
                [["", 0, 1]],
                [["K", 0, 1]],
                [["kernel\x1b", 0, 1]],
                [["k" * 41, 0, 1]],
                [["kernel", -1, 1]],
                [["kernel", 0, float("nan")]],
                [[["kernel"], 0, 1]],
            )
        ),
        ({"event": "ready", "address": "10.1.2.3"}, Event("ready", 0, "", "10.1.2.3")),
        ({"event": "up", "address": "192.168.7.9"}, Event("up", 0, "", "192.168.7.9")),
        *(
            ({"event": "up", "address": address}, Event("up", 0, ""))
            for address in (
                "",
                "10.1.2",
                "10.1.2.3/24",
                "010.1.2.3",
                "10.1.2.3\n",
                " 10.1.2.3",
                "::1",
                "localhost",
                "127.0.0.1",
                "0.0.0.0",
                "0.1.2.3",
                "224.0.0.1",
                "240.0.0.1",
                "255.255.255.255",
                "10.1.2.256",
                "\u0661.1.1.1",
                167772161,
                None,
                True,
                ["10.1.2.3"],
                "1" * 9000,
            )
        ),
        ({"event": "prologue", "status": 3, "output": b64("no disc\n")}, Event("prologue", 3, "no disc\n")),
        ({"event": "failed", "reason": b64("no home")}, Event("failed", 0, "no home")),
        ({"event": "epilogue", "status": 0, "output": ""}, Event("epilogue", 0, "")),
        ({"event": "epilogue", "status": True}, Event("epilogue", 255, "")),
        ({"event": "epilogue", "status": -1}, Event("epilogue", 255, "")),
        ({"event": "epilogue", "status": 256}, Event("epilogue", 255, "")),
        ({"event": "epilogue", "status": "0"}, Event("epilogue", 255, "")),
        ({"event": "epilogue", "status": 0.0}, Event("epilogue", 255, "")),
        ({"event": "x" * 100}, Event("x" * 32, 0, "")),
        ({"event": "prologue", "output": ["x"]}, Event("prologue", 0, "")),
        ({"event": "prologue", "output": b64("a" * 9000 + "b")}, Event("prologue", 0, "a" * 4095 + "b")),
    ],
)
def test_events(fields: dict[str, object], event: Event) -> None:
    assert parse_event(line(**fields)) == event


@pytest.mark.parametrize(
    "noise",
    [
        b"", b"\n", b"{", b"[]", b"null", b"1", b"\xff\xfe", line(event=1), line(event=None), line(),
        line(v=2, event="ready"),
        line(v="1", event="ready"), line(event="prologue", output="%"), line(event="prologue", output="é"),
        b"[" * 5000, b'{"v":1,"event":"ready","status":' + b"1" * 5000 + b"}", b'{"v":NaN,"event":"ready"}',
    ],
)  # fmt: skip
def test_noise_is_no_event(noise: bytes) -> None:
    assert parse_event(noise) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_EVENTS = st.fixed_dictionaries(
    {}, optional={key: _JSON | st.just(1) for key in ("v", "event", "status", "output", "reason", "ssh", "address")}
)


@FUZZ
@given(st.binary(max_size=300) | (_JSON | _EVENTS).map(lambda value: json.dumps(value).encode()))
@example(b'{"v":1,"event":"failed","reason":"\\ud800"}')
def test_anything_is_an_event_within_bounds_or_none(data: bytes) -> None:
    event = parse_event(data)
    if event is not None:
        assert len(event.name) <= 32 and 0 <= event.status <= 255 and len(event.text) <= MAX_OUTPUT_CHARS


async def collect(data: bytes, *, eof: bool = True) -> list[str]:
    """The names of the events that a real port gives when a guest sends `data`."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    port = await GuestPort.open(ours)

    async def guest() -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(theirs, data)
        except OSError:
            pass
        if eof:
            theirs.close()

    sending = asyncio.ensure_future(guest())
    names = [event.name async for event in port.events()]
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    port.close()
    theirs.close()
    return names


def test_events_up_to_the_end_of_the_guest() -> None:
    data = line(event="booted") + b"noise\n" + line(event="ready") + b'{"v":1,"event":"cut'
    assert run(collect(data)) == ["booted", "ready"]


def test_a_flood_ends_after_what_a_guest_may_have_to_say() -> None:
    assert len(run(collect(line(event="booted") * (3 * MAX_EVENTS), eof=False))) == MAX_EVENTS
    assert run(collect(b"\n" * (3 * MAX_EVENTS) + line(event="ready"), eof=False)) == []


def test_a_guest_that_gets_orders_for_long_answers_all_of_them() -> None:
    async def work() -> int:
        ours, theirs = socket.socketpair()
        port = await GuestPort.open(ours)
        events, heard = port.events(), 0
        for _ in range(2 * MAX_EVENTS):
            port.send("thaw")
            theirs.recv(4096)
            theirs.sendall(line(event="thaw", status=0))
            heard += (await events.__anext__()).name == "thaw"
        for _ in range(3 * MAX_EVENTS // 20):
            theirs.sendall(line(event="booted") * 20)
            for _ in range(20):
                try:
                    heard += (await events.__anext__()).name == "booted"
                except StopAsyncIteration:
                    break
        port.close()
        theirs.close()
        return heard

    assert run(work()) == 3 * MAX_EVENTS - 1, "and no more beside that"


def test_a_line_that_is_too_long_ends_the_conversation() -> None:
    data = line(event="booted") + b"x" * (4 * MAX_LINE_BYTES) + b"\n" + line(event="ready")
    assert run(collect(data, eof=False)) == ["booted"]


def test_what_the_node_says_and_a_dead_guest() -> None:
    async def talk() -> bytes:
        ours, theirs = socket.socketpair()
        port = await GuestPort.open(ours)
        port.send("shutdown")
        await asyncio.sleep(0)
        said = theirs.recv(100)
        theirs.close()
        for _ in range(10):
            port.send("identify")
            await asyncio.sleep(0)
        port.close()
        return said

    assert run(talk()) == b'{"v": 1, "op": "shutdown"}\n'


def test_the_hosts_of_a_job_are_one_order() -> None:
    async def talk() -> bytes:
        ours, theirs = socket.socketpair()
        port = await GuestPort.open(ours)
        port.send_hosts([("10.1.0.1", "vn1-1"), ("10.1.0.2", "vn2-1")])
        await asyncio.sleep(0)
        said = theirs.recv(1000)
        port.close()
        theirs.close()
        return said

    said = run(talk())
    assert said.endswith(b"\n") and said.count(b"\n") == 1
    order = json.loads(said)
    assert base64.b64decode(order.pop("hosts")) == b"10.1.0.1 vn1-1\n10.1.0.2 vn2-1\n"
    assert order == {"v": 1, "op": "hosts"}


# console


def drained(data: bytes, *, log_bytes: int = 1 << 20) -> tuple[Console, bytes]:
    logged = bytearray()

    async def work() -> Console:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        console = Console(ours, logged.extend, log_bytes=log_bytes)
        draining = asyncio.ensure_future(console.drain())
        await asyncio.get_running_loop().sock_sendall(theirs, data)
        theirs.close()
        await draining
        ours.close()
        return console

    return run(work()), bytes(logged)


def test_a_console_is_logged_and_its_last_lines_are_known() -> None:
    console, logged = drained(b"one\r\ntwo\r\n\r\n  \r\nthree")
    assert logged == b"one\r\ntwo\r\n\r\n  \r\nthree"
    assert console.last_lines(2) == ["two", "three"] and console.last_lines(9) == ["one", "two", "three"]


def test_a_flood_is_bounded_in_log_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "PAUSE_SECONDS", 0)
    data = b"".join(b"%07d\n" % n for n in range(200_000))
    console, logged = drained(data, log_bytes=100_000)
    assert logged == data[:100_000]
    assert console.last_lines(1) == ["0199999"] and len(console.last_lines(10**6)) <= KEEP_BYTES // 8 + 1


def test_last_lines_cannot_move_a_terminals_cursor() -> None:
    text = "\x1b[2J\x1b]0;owned\x07 panic \x00\x7f\x9b\u202e\u2028done\n".encode() + b"\xff\xfe tail" + b"x" * 999
    lines = drained(text)[0].last_lines(5)
    assert all(line.isprintable() and len(line) <= 200 for line in lines)
    assert "panic" in lines[0] and "tail" in lines[1]


def test_a_log_that_cannot_be_written_does_not_stop_the_guest() -> None:
    def full(data: bytes) -> object:
        raise OSError(errno.ENOSPC, "no space")

    async def work() -> Console:
        ours, theirs = socket.socketpair()
        console = Console(ours, full, log_bytes=1 << 20)
        draining = asyncio.ensure_future(console.drain())
        theirs.sendall(b"one\n")
        await asyncio.sleep(0.05)
        theirs.sendall(b"two\n")
        theirs.close()
        await draining
        ours.close()
        return console

    assert run(work()).last_lines(2) == ["one", "two"]


@FUZZ
@given(uptime=st.integers() | st.floats() | st.text(), spans=st.lists(st.lists(st.floats() | st.text(), max_size=4)))
def test_what_a_guest_says_of_its_boot_has_order(uptime: object, spans: list[object]) -> None:
    for stretch in parse_stretches(uptime, spans):
        assert stretch.start_ago >= stretch.end_ago >= 0 and stretch.name.isprintable()


def test_a_guest_names_no_end_of_stretches() -> None:
    assert len(parse_stretches(9, [["a", 0, 1]] * 1000)) == MAX_STRETCHES + 1
