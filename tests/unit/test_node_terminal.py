"""An interactive job's terminal: a real one, its size from a hostile file, what is shown on it, how it is left."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import termios
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.node import folders, terminal
from vmgr.node.terminal import Size, Terminal, parse_size, read_size


@pytest.fixture(params=["xterm", "dumb", ""])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """The two ends of a pseudo terminal; the first one shows what is written to the second."""
    monkeypatch.setenv("TERM", request.param)
    ours, theirs = pty.openpty()
    yield ours, theirs
    for fd in (ours, theirs):
        try:
            os.close(fd)
        except OSError:
            pass


def opened(fd: int) -> Terminal:
    found = Terminal.open(fd)
    assert found is not None
    return found


def shown(fd: int) -> str:
    """What has been written to the other end; the kernel takes a moment to bring it here."""
    text = b""
    while select.select([fd], [], [], 0.3)[0]:
        text += os.read(fd, 65536)
    return text.decode()


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"24 80\n", (24, 80)), (b"1 1", (1, 1)), (b"65535 65535\n", (65535, 65535)), (b"", None), (b"24", None),
        (b"0 80\n", None), (b"24 0\n", None), (b"65536 80\n", None), (b"-1 80\n", None), (b"24 80\n\n", None),
        (b"24  80\n", None), (b"24 80 1\n", None), (b" 24 80\n", None), (b"24 80\0", None), (b"x y\n", None),
        (b"24\n80\n", None), ("\u0662\u0664 80\n".encode(), None), (b"9" * 32, None),
    ],
)  # fmt: skip
def test_sizes(data: bytes, size: Optional[tuple[int, int]]) -> None:
    assert parse_size(data) == size


@FUZZ
@given(st.binary(max_size=40) | st.from_regex(rb"\A[0-9 \n]{0,32}\Z"))
def test_any_bytes_are_a_size_or_none(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "winsize"
    path.write_bytes(data)
    size = read_size(path)
    assert size == parse_size(data[: terminal.MAX_BYTES])
    assert size is None or (1 <= size.rows <= 0xFFFF and 1 <= size.columns <= 0xFFFF)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "winsize"
    assert read_size(path) is None
    os.mkfifo(path)
    assert read_size(path) is None
    path.unlink()
    path.mkdir()
    assert read_size(path) is None
    path.rmdir()
    path.symlink_to("/dev/zero")
    assert read_size(path) is None
    (tmp_path / "file").write_text("24 80\n")
    path.unlink()
    path.symlink_to("file")
    assert read_size(path) is None


def test_a_pipe_is_no_terminal() -> None:
    ends = os.pipe()
    assert Terminal.open(ends[0]) is None and Terminal.open(987) is None
    for fd in ends:
        os.close(fd)


def test_progress(ends: tuple[int, int]) -> None:
    screen = opened(ends[1])
    screen.progress({})
    for stages in ([{"name": "agent", "t": 0.04}], [{"name": "agent", "t": 0.04}], [{"name": "bo\x1bot", "t": 3.26}]):
        screen.progress({"stages": stages})
    screen.end_progress()
    screen.progress({"stages": [{"name": "ready", "t": 4}]})
    start, agent, boot = (
        f"vtorque: waiting for the guest: {what} s)" for what in ("started (0.0", "agent (0.0", "bo\\x1bot (3.3")
    )
    rewritten = f"\r\x1b[K{start}\r\x1b[K{agent}\r\x1b[K{boot}\r\x1b[K"
    lines = f"{start}\r\n{agent}\r\n{boot}\r\n"
    assert shown(ends[0]) == (rewritten if os.environ["TERM"] == "xterm" else lines)


def test_progress_stays_on_one_line(ends: tuple[int, int]) -> None:
    screen = opened(ends[1])
    screen.resize(Size(5, 20))
    assert screen.size() == (5, 20)
    screen.progress({"stages": [{"name": "x" * 200, "t": 1}]})
    assert "vtorque: waiting fo" in shown(ends[0]) and len("vtorque: waiting fo") == 19


def test_a_terminal_without_a_size(ends: tuple[int, int]) -> None:
    assert opened(ends[1]).size() == (24, 80)


def test_the_state_is_put_back(ends: tuple[int, int]) -> None:
    before = termios.tcgetattr(ends[1])
    screen = opened(ends[1])
    tty.setraw(ends[1])
    assert termios.tcgetattr(ends[1]) != before
    screen.restore()
    assert termios.tcgetattr(ends[1]) == before


def test_a_terminal_that_has_been_hung_up_is_no_error(ends: tuple[int, int]) -> None:
    screen = opened(ends[1])
    os.close(ends[0])
    screen.progress({"stages": [{"name": "agent", "t": 0}]})
    screen.end_progress()
    screen.resize(Size(10, 10))
    screen.restore()


@pytest.mark.parametrize("told", [True, False], ids=["inotify", "a look a second"])
def test_sizes_are_followed(told: bool, ends: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not told:
        monkeypatch.setattr(folders, "_watch", lambda *_: None)
        monkeypatch.setattr(terminal, "LOOK_AGAIN_SECONDS", 0.05)
    else:
        monkeypatch.setattr(terminal, "LOOK_AGAIN_SECONDS", 60.0)
    screen = opened(ends[1])
    heard: asyncio.Queue[Size]

    def write(text: str) -> None:
        (tmp_path / ".winsize").write_text(text)
        (tmp_path / ".winsize").rename(tmp_path / "winsize")

    async def work() -> None:
        nonlocal heard
        heard = asyncio.Queue()
        follower = asyncio.ensure_future(screen.follow_size(tmp_path, lambda: heard.put_nowait(screen.size())))
        await asyncio.sleep(0.02)
        write("30 100\n")
        assert await asyncio.wait_for(heard.get(), 10) == (30, 100)
        screen.resize(Size(7, 7))  # somebody else does
        for nothing in ("nonsense\n", "0 0\n", "30 100\n"):
            write(nothing)
            await asyncio.sleep(0.1)
        assert heard.empty() and screen.size() == (7, 7), "no size is applied twice"
        (tmp_path / "winsize").unlink()
        write("31 101\n")
        assert await asyncio.wait_for(heard.get(), 10) == (31, 101)
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)

    before = {fd.name for fd in Path("/proc/self/fd").iterdir()}
    asyncio.run(work())
    assert {fd.name for fd in Path("/proc/self/fd").iterdir()} <= before, "the watch is closed"


def test_a_size_that_is_there_already_is_applied(ends: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "winsize").write_text("12 34\n")
    screen = opened(ends[1])

    async def work() -> None:
        done = asyncio.Event()
        follower = asyncio.ensure_future(screen.follow_size(tmp_path, done.set))
        await asyncio.wait_for(done.wait(), 10)
        follower.cancel()

    asyncio.run(work())
    assert screen.size() == (12, 34)
