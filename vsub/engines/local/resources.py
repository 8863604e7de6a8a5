"""The resource list of a job: `-l` items in the order of submission, times, sizes and node requests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Item = tuple[str, str]

MAX_LIST = 2048
"""Size of the buffer into which TORQUE writes the list for a hook, in bytes with its terminating NUL."""

TIMES = frozenset({"cput", "pcput", "walltime"})
SIZES = frozenset({"file", "mem", "pmem", "pvmem", "vmem"})
NUMBERS = frozenset({"ncpus", "nice", "procs"})
PATHS = frozenset({"epilogue", "prologue"})
TEXTS = frozenset(
    {
        "advres",
        "arch",
        "feature",
        "gres",
        "host",
        "naccesspolicy",
        "nodes",
        "opsys",
        "other",
        "qos",
        "software",
    }
)
NAMES = TIMES | SIZES | NUMBERS | PATHS | TEXTS

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}


class ResourceError(ValueError):
    """A resource that cannot be understood: `name` is the resource, the text says why."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def seconds(text: str) -> int:
    """`[[HH:]MM:]SS[.fraction]` as seconds, the fraction dropped. Raises ValueError."""
    match = re.fullmatch(r"(?:(?:(\d{1,9}):)?(\d{1,9}):)?(\d{1,9})(?:\.\d{0,9})?", text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a time: [[HH:]MM:]SS")
    hours, minutes, rest = (int(group or 0) for group in match.groups())
    return hours * 3600 + minutes * 60 + rest


def clock(total: float) -> str:
    """Seconds as HH:MM:SS."""
    whole = int(total)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def size_bytes(text: str) -> int:
    """`N[k|m|g|t|p][b|w]` as bytes; a word is 8 bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,15})([kmgtp]?)([bw]?)", text.lower(), re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a size: a number with b, kb, mb, gb, tb or pb")
    number, unit, word = match.groups()
    return (int(number) << _UNITS[unit]) * (8 if word == "w" else 1)


def split_list(text: str) -> list[str]:
    """The comma-separated parts of an option's value; quotes and backslashes protect commas."""
    parts, current, quote = [], [], ""
    characters = iter(text)
    for character in characters:
        if character == "\\":
            current.append(next(characters, "\\"))
        elif quote:
            if character == quote:
                quote = ""
            else:
                current.append(character)
        elif character in "\"'":
            quote = character
        elif character == ",":
            parts.append("".join(current))
            current = []
        else:
            current.append(character)
    if quote:
        raise ValueError(f"unmatched {quote}")
    return [*parts, "".join(current)]


def parse_item(name: str, value: str) -> Item:
    """One resource, checked and in the spelling that TORQUE shows. Raises ResourceError."""
    if name not in NAMES:
        raise ResourceError(name, f"Unknown resource type  Resource_List.{name}")
    try:
        if not value or any(ord(character) < 32 or ord(character) == 127 for character in value):
            raise ValueError("a value without control characters is needed")
        if name in TIMES:
            return name, clock(seconds(value))
        if name in SIZES:
            size_bytes(value)
            return name, value.lower()
        if name in NUMBERS and not re.fullmatch(r"-?\d{1,6}", value, re.ASCII):
            raise ValueError(f"{value!r} is not a number")
        if name == "nodes":
            NodeRequest.parse(value)
    except ValueError as error:
        raise ResourceError(name, str(error)) from error
    return name, value


def parse_list(text: str) -> list[Item]:
    """The items of one `-l` option. Raises ValueError for its form, ResourceError for an item."""
    items = []
    for part in split_list(text):
        name, equals, value = part.strip().partition("=")
        if not name or not equals:
            raise ValueError(f"{part!r} is not name=value")
        items.append(parse_item(name, value))
    return items


def merge(first: Iterable[Item], second: Iterable[Item]) -> list[Item]:
    """All items in their order, each name once: a name in `first` wins over one in `second`."""
    merged: dict[str, str] = {}
    for name, value in first:
        merged[name] = value
    winners = frozenset(merged)
    for name, value in second:
        if name not in winners:
            merged[name] = value
    return list(merged.items())


def bounded(items: Sequence[Item], limit: int = MAX_LIST) -> str:
    """The list as hooks get it, `name=value,…`: an item that does not fit is left out whole.

    The arithmetic is TORQUE's (resmom/prolog.c, resc_to_string): an item needs three bytes beside its text.
    """
    room = limit
    parts: list[str] = []
    for name, value in items:
        need = len(f"{name}{value}".encode("utf-8", "surrogateescape")) + 3
        if need >= room:
            continue
        room -= need + (1 if parts else 0)
        parts.append(f"{name}={value}")
    return ",".join(parts)


class NodeRequest(NamedTuple):
    """What `-l nodes=` asks for: per part how many nodes or which one, and processors on each."""

    parts: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, text: str) -> NodeRequest:
        """Read `N[:ppn=P]+name[:ppn=P]…`. Raises ValueError."""
        parts = []
        for part in text.split("+"):
            head, *properties = part.split(":")
            ppn = 1
            for item in properties:
                match = re.fullmatch(r"ppn=(\d{1,4})", item, re.ASCII)
                if match is None or int(match[1]) == 0:
                    raise ValueError(f"{item!r} in nodes={text} is not understood: only ppn=N is")
                ppn = int(match[1])
            if not re.fullmatch(r"[1-9]\d{0,5}|[A-Za-z][A-Za-z0-9._-]{0,254}", head, re.ASCII):
                raise ValueError(f"{head!r} in nodes={text} is neither a number nor a host name")
            parts.append((head, ppn))
        return cls(tuple(parts))

    @classmethod
    def of(cls, items: Iterable[Item]) -> NodeRequest:
        """What a resource list asks for; one node when it says nothing. Raises ValueError."""
        return cls.parse(dict(items).get("nodes", "1"))

    @property
    def nodes(self) -> int:
        """Number of nodes asked for by number; 0 when the first part is a name, as TORQUE counts."""
        if not self.parts[0][0].isdigit():
            return 0
        return sum(int(head) for head, _ in self.parts if head.isdigit())

    @property
    def ppn(self) -> int:
        """Processors per node, of the first part."""
        return self.parts[0][1] if self.nodes else 1
