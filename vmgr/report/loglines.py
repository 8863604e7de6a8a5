"""Lines of a job's log or of a guest's console, made fit to be shown, and followed while they are written."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from inotify_simple import flags

from vmgr.config import Paths
from vmgr.errors import Code, VTorqueError, printable
from vmgr.node.client import AgentLink
from vmgr.node.folders import changes

LOOK_AGAIN_SECONDS = 5.0
"""How often a followed file is looked at beside the events that tell of it."""
MAX_LINE_BYTES = 64 << 10
_CHUNK = 64 << 10
_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_=>])")
"""What a console says to its terminal: colours, positions, titles (ECMA-48)."""
_RECORD = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ([A-Z]+) (.*)", re.DOTALL)


class Record(NamedTuple):
    """A line of a log. What was logged over several lines has no time of its own but that of its first one."""

    node: str
    time: str
    level: Optional[str]
    text: str
    line: str


def shown(line: bytes) -> str:
    """A line as it may be shown: without what is for a terminal, control characters escaped, tabs as blanks."""
    text = _SEQUENCE.sub("", line.decode("utf-8", "replace").rstrip("\r\n"))
    return printable(text.rpartition("\r")[2].expandtabs())


def records(node: str, lines: Iterable[str]) -> Iterator[Record]:
    """The lines of a node's log."""
    time = ""
    for line in lines:
        match = _RECORD.fullmatch(line)
        if match:
            time = match[1]
            yield Record(node, time, match[2], match[3], line)
        else:
            yield Record(node, time, None, line, line)


def merged(logs: Iterable[Iterable[Record]]) -> list[Record]:
    """The lines of several nodes in the order of their times; those of one node and one time stay together."""
    return sorted((record for log in logs for record in log), key=lambda record: (record.time, record.node))


class Lines:
    """Cuts what is read into lines, of a bounded length."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            self._tell(shown(line))
        if len(self._rest) > MAX_LINE_BYTES:
            self.end()

    def end(self) -> None:
        """What is left is a line too."""
        if self._rest:
            self._tell(shown(self._rest))
        self._rest = b""


def read(fd: int, tell: Callable[[str], None]) -> None:
    """Tell every line of the file `fd`."""
    lines = Lines(tell)
    _read_on(fd, lines)
    lines.end()


def follow(fd: int, path: Path, paths: Paths, job_id: str, tell: Callable[[str], None]) -> None:
    """Tell every line of the file `fd`, which lies at `path`, and those that come until the job's agent has gone."""
    asyncio.run(_follow(fd, path, paths, job_id, Lines(tell)))


async def _follow(fd: int, path: Path, paths: Paths, job_id: str, lines: Lines) -> None:
    ending = asyncio.ensure_future(_until_gone(paths, job_id))
    watching = asyncio.ensure_future(_watch(fd, path, lines))
    try:
        await asyncio.wait([ending, watching], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (ending, watching):
            task.cancel()
        told = await asyncio.gather(watching, ending, return_exceptions=True)
    _read_on(fd, lines)
    lines.end()
    for outcome in told:
        if isinstance(outcome, Exception):
            raise outcome


async def _watch(fd: int, path: Path, lines: Lines) -> None:
    async for _ in changes(path, flags.MODIFY, LOOK_AGAIN_SECONDS):
        _read_on(fd, lines)


async def _until_gone(paths: Paths, job_id: str) -> None:
    """Return when no agent serves the job on this node, any more or at all. Raises VTorqueError when it refuses us."""
    try:
        link = await AgentLink.open(paths, job_id)
    except VTorqueError as err:
        if err.code is Code.AGENT:
            return
        raise
    try:
        async for _ in link.follow():
            pass
    finally:
        link.close()


def _read_on(fd: int, lines: Lines) -> None:
    while data := os.read(fd, _CHUNK):
        lines.feed(data)
