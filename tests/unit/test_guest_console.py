"""A guest's console for several readers, none of which is waited for, and as plain text; who types at it."""

from __future__ import annotations

import asyncio
import base64
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, short_folder

from vmgr.commands import console as console_command
from vmgr.errors import Code, VTorqueError
from vmgr.node.console import FOLLOWER_BYTES, KEEP_BYTES, Console
from vmgr.node.control import Control, Peer, Talk
from vmgr.node.orders import console as console_order
from vmgr.node.state import Progress
from vmgr.reach.plain import MAX_SEQUENCE, Plain


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


def with_console(work: Callable[[Console, socket.socket], Coroutine[Any, Any, Any]]) -> Any:
    """Work with a console that is drained, and the guest's end of it."""

    async def whole() -> Any:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        console = Console(ours, len, log_bytes=0)
        draining = asyncio.ensure_future(console.drain())
        try:
            return await work(console, theirs)
        finally:
            theirs.close()
            await draining
            ours.close()

    return run(whole())


def test_several_type_at_a_guest_that_takes_nothing_for_a_while() -> None:
    async def work(console: Console, guest: socket.socket) -> None:
        first = asyncio.ensure_future(console.type(b"a" * (1 << 20)))
        await asyncio.sleep(0.05)
        gone = asyncio.ensure_future(console.type(b"c"))
        second = asyncio.ensure_future(console.type(b"b" * 1000))
        await asyncio.sleep(0.05)
        assert not first.done() and not second.done()
        gone.cancel()
        got = b""
        while len(got) < (1 << 20) + 1000:
            got += await asyncio.get_running_loop().sock_recv(guest, 1 << 20)
        await asyncio.gather(first, second)
        assert got == b"a" * (1 << 20) + b"b" * 1000

    with_console(work)


def test_several_follow_and_one_is_slow() -> None:
    async def work(console: Console, guest: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        guest.send(b"before\n")
        await asyncio.sleep(0.05)
        with console.followed() as quick, console.followed() as slow:
            assert console.last_bytes(100) == b"before\n" and console.last_bytes(3) == b"re\n"
            assert console.last_bytes(0) == b""
            total = 2 * FOLLOWER_BYTES
            sending = asyncio.ensure_future(loop.sock_sendall(guest, bytes(total)))
            got = 0
            while got < total:
                data, lost = await quick.take(KEEP_BYTES)
                assert lost == 0
                got += len(data)
            await sending
            data, lost = await slow.take(10)
            assert (len(data), lost) == (10, total - FOLLOWER_BYTES), "the oldest is lost, and the guest never waited"
            assert (await slow.take(10))[1] == 0
            guest.shutdown(socket.SHUT_WR)
            left = 0
            while data := (await slow.take(1 << 20))[0]:
                left += len(data)
            assert left == FOLLOWER_BYTES - 20
        with console.followed() as late:
            assert await late.take(10) == (b"", 0), "the console has ended"

    with_console(work)


class OneGuest:
    """Stands for a crew of one guest that has a console."""

    def __init__(self, console: Console) -> None:
        self.members = [type("Member", (), {"rank": 0, "name": "vn1-1"})]
        self.guests = [type("Guest", (), {"console": console})]


def test_following_and_typing_over_the_agents_socket() -> None:
    async def work(console: Console, guest: socket.socket) -> None:
        order = console_order.order(lambda: OneGuest(console))  # type: ignore[arg-type, return-value]
        guest.send(b"login: ")
        await asyncio.sleep(0.05)
        talk = Talk(Peer(1, 0), {"op": "console", "rank": 0, "last": 6, "attach": True})
        answers = order(talk).__aiter__()
        assert await answers.__anext__() == {"guest": "vn1-1", "rank": 0, "data": base64.b64encode(b"ogin: ").decode()}
        await talk.hear({"op": "input", "data": base64.b64encode(b"root\r").decode()})
        assert await asyncio.get_running_loop().sock_recv(guest, 100) == b"root\r"
        guest.send(b"more")
        assert await answers.__anext__() == {"data": base64.b64encode(b"more").decode(), "lost": 0}
        await answers.aclose()  # type: ignore[attr-defined]

    with_console(work)


@pytest.mark.parametrize(
    ("request_", "sent"),
    [
        ({"last": -1}, None),
        ({"last": True}, None),
        ({"last": 1 << 30}, None),
        ({"attach": 1}, None),
        ({"rank": 3}, None),
        ({}, {"op": "input", "data": ""}),
        ({"attach": True}, {"op": "input", "data": "no base64"}),
        ({"attach": True}, {"op": "status"}),
    ],
)
def test_what_a_console_refuses(request_: dict[str, Any], sent: Any) -> None:
    async def work(console: Console, _: socket.socket) -> None:
        talk = Talk(Peer(1, 0), {"op": "console", "rank": 0, **request_})
        if sent is not None:
            await talk.hear(sent)
        with pytest.raises(VTorqueError, match="VT-VALUE"):
            async for _answer in console_order.order(lambda: OneGuest(console))(talk):  # type: ignore[arg-type, return-value]
                pass

    with_console(work)


# --- plain text


@pytest.mark.parametrize(
    ("chunks", "shown"),
    [
        ([b"plain\r\ntext\n"], "plain\ntext\n"),
        ([b"\x1b[31mred\x1b[0m"], "red"),
        ([b"\x1b[3", b"1mred"], "red"),
        ([b"\x1b", b"[2Jgone"], "gone"),
        ([b"\x1b]0;title\x07text"], "text"),
        ([b"\x1b]52;c;", b"aGk=\x1b", b"\\text"], "text"),
        ([b"\x1bP1$r\x1b\\text"], "text"),
        ([b"\x1bc\x1b(Btext"], "text"),
        ([b"\xc3", b"\xa4\xff"], "ä\ufffd"),
        ([b"a\x07\x08\x00\x7fb\tc"], "ab\tc"),
        (["\u202ereversed\u009b31m".encode()], "reversed31m"),
        ([b"50 %\r", b"100 %\r\n"], "50 %\n100 %\n"),
    ],
)
def test_what_a_terminal_is_shown(chunks: list[bytes], shown: str) -> None:
    plain = Plain()
    assert "".join(plain.text(chunk) for chunk in chunks) == shown


@FUZZ
@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"\x1b", b"\x1b[", b"\x1b]", b"0;x", b"\r", b"\n"])))
def test_nothing_reaches_the_terminal_but_text(chunks: list[bytes]) -> None:
    plain = Plain()
    text = "".join(plain.text(chunk) for chunk in chunks)
    assert all(c.isprintable() or c in "\n\t" for c in text)


def test_a_sequence_without_end_hides_no_more_than_its_bound() -> None:
    plain = Plain()
    text = "".join(plain.text(b"\x1b]0;" + b"x" * 100) for _ in range(200)) + plain.text(b"\x07seen\n")
    assert text.endswith("seen\n") and len(plain.text(b"")) <= MAX_SEQUENCE


# --- the command on a terminal


PROGRAM = """\
import asyncio, sys
from contextlib import asynccontextmanager
from pathlib import Path
from vmgr.node.client import AgentLink
from vmgr.commands import console
import vmgr.reach.agents as agents

@asynccontextmanager
async def agent_of(config, target):
    link = await AgentLink.connect(Path(sys.argv[1]))
    yield agents.Reached(link, {}, "n1", True, {"rank": 0, "name": "vn1-1"})

agents.agent_of = agent_of
console.load_config = lambda _: None
console.console.main(args=sys.argv[2:], prog_name="console", standalone_mode=True)
"""


@contextmanager
def agent(console: Console) -> Iterator[tuple[tuple[socket.socket, Path], Control]]:
    """The socket of an agent that has one guest with this console, and what serves it."""
    with short_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "sock"))
        listener.listen()
        orders = {"console": console_order.order(lambda: OneGuest(console))}  # type: ignore[arg-type, return-value]
        progress = Progress(0, {"job_id": "1.a"})
        control = Control(progress, os.getuid(), over=lambda *_: None, attached=lambda: None, orders=orders)
        yield (listener, folder / "sock"), control


@pytest.mark.parametrize("leave", ["escape", "TERM", "HUP"])
def test_a_terminal_is_as_it_was_found(leave: str, tmp_path: Path) -> None:
    """Attached over a real socket on a real pseudo terminal: keys arrive as they are, and the terminal is put back."""
    (tmp_path / "program.py").write_text(PROGRAM)

    async def work(console: Console, guest: socket.socket) -> None:
        with agent(console) as ((listener, path), control):
            server = await control.serve(listener)
            ours, theirs = pty.openpty()
            before = termios.tcgetattr(theirs)
            child = subprocess.Popen(
                [sys.executable, str(tmp_path / "program.py"), str(path), "1:0", "--attach"],
                stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
            )  # fmt: skip
            try:
                guest.send(b"\x1b[1mprompt\x1b[0m")
                seen = b""
                while b"prompt" not in seen:
                    seen += await asyncio.get_running_loop().run_in_executor(None, os.read, ours, 1000)
                assert b"\x1b[1mprompt\x1b[0m" in seen, "attached, it comes as it is"
                os.write(ours, b"ls\r\x03")
                assert await receive(guest, 4) == b"ls\r\x03", "no key is the terminal's"
                if leave == "escape":
                    os.write(ours, b"\x1d")
                else:
                    child.send_signal(getattr(signal, f"SIG{leave}"))
                status = await asyncio.get_running_loop().run_in_executor(None, child.wait, 20)
                assert status == (0 if leave == "escape" else 128 + getattr(signal, f"SIG{leave}"))
                assert termios.tcgetattr(theirs) == before
            finally:
                child.kill()
                child.wait()
                os.close(ours)
                os.close(theirs)
                server.close()
                await control.drain(5)

    with_console(work)


async def receive(guest: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        got += await asyncio.get_running_loop().sock_recv(guest, count - len(got))
    return got


@pytest.mark.parametrize("leave", ["INT", "closed"])
def test_a_follower_leaves_without_a_word(leave: str, tmp_path: Path) -> None:
    """By Ctrl-C, or when nobody reads what it prints."""
    (tmp_path / "program.py").write_text(PROGRAM)

    async def work(console: Console, guest: socket.socket) -> None:
        with agent(console) as ((listener, path), control):
            server = await control.serve(listener)
            guest.send(b"\x1b[31mbefore\x1b[0m\r\n")
            await asyncio.sleep(0.05)
            child = subprocess.Popen(
                [sys.executable, str(tmp_path / "program.py"), str(path), "1:0"],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            assert child.stdout is not None and child.stderr is not None
            loop = asyncio.get_running_loop()
            try:
                assert await loop.run_in_executor(None, child.stdout.readline) == b"before\n"
                if leave == "INT":
                    child.send_signal(signal.SIGINT)
                else:
                    child.stdout.close()
                    guest.send(b"more\n")
                assert await loop.run_in_executor(None, child.wait, 20) == 0
                assert child.stderr.read() == b""
            finally:
                child.kill()
                child.wait()
                server.close()
                await control.drain(5)

    with_console(work)


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(VTorqueError, match="--attach and --no-follow contradict") as refused:
        console_command.console.main(["1:0", "--attach", "--no-follow"], standalone_mode=False)
    assert refused.value.code is Code.USAGE
