"""What a check has found, and the node that it looks at."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from vmgr.config import Config
from vmgr.errors import printable
from vmgr.paths import Installation
from vmgr.topology.tree import Tree


class Level(enum.IntEnum):
    """How bad a finding is. A failure keeps guests from running, a warning keeps some, or only some of the time."""

    OK = 0
    NOTE = 1
    WARNING = 2
    FAILURE = 3

    @property
    def text(self) -> str:
        return self.name.lower()


class Finding(NamedTuple):
    """One line of the doctor's: its subject, what is so, and what to do about it (None where nothing is to be done)."""

    subject: str
    level: Level
    what: str
    remedy: Optional[str] = None

    def as_plain(self) -> dict[str, Any]:
        return {**self._asdict(), "level": self.level.text}


class Node(NamedTuple):
    """The node that is looked at. `tree` is where /proc, /sys and /dev are read, another machine's in tests."""

    install: Installation
    config: Config
    tree: Tree = Tree(Path("/"))


Check = Callable[[Node], Iterator[Finding]]


def finder(subject: str) -> Callable[..., Finding]:
    """Makes the findings of one subject: `find(level, what, remedy)`."""

    def find(level: Level, what: str, remedy: Optional[str] = None) -> Finding:
        return Finding(subject, level, printable(what), remedy)

    return find


def from_plain(data: Any) -> Finding:
    """The finding in plain data, such as another node has sent. Raises ValueError for what is none."""
    try:
        remedy = data["remedy"]
        return Finding(
            printable(str(data["subject"])),
            Level[str(data["level"]).upper()],
            printable(str(data["what"])),
            None if remedy is None else printable(str(remedy)),
        )
    except (KeyError, TypeError) as err:
        raise ValueError(f"no finding: {err}") from err


def worst(findings: Iterable[Finding]) -> Level:
    """The worst of the levels; OK for none."""
    return max((finding.level for finding in findings), default=Level.OK)
