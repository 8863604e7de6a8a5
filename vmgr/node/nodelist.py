"""Slurm's lists of nodes, `n[1-3,07],login`: read strictly, in their order.

The syntax is that of hostlist expressions in slurm.conf(5): names with ranges of numbers in brackets, as wide as the
first number of a range is written, and any number of brackets in a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

from vmgr.node.allocation import MAX_NODES, is_node

MAX_TEXT = 1 << 20
_NAMES = re.compile(r"(?:[A-Za-z0-9._-]|\[[0-9,-]*\])+")
_PARTS = re.compile(r"([A-Za-z0-9._-]+)|\[([0-9,-]*)\]")
_RANGE = re.compile(r"([0-9]{1,10})(?:-([0-9]{1,10}))?")


def expand(text: str) -> tuple[str, ...]:
    """The nodes of a list. Raises ValueError for what is none, has a node twice, or more than MAX_NODES."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"a list of nodes of {len(text)} characters is too long")
    found: dict[str, None] = {}
    end = -1
    for match in _NAMES.finditer(text):
        if match.start() != end + 1 or text[end : end + 1] not in (",", ""):
            break
        end = match.end()
        for name in _expand_name(match[0], MAX_NODES - len(found)):
            if name in found or not is_node(name):
                raise ValueError(f"{name[:80]!r} in a list of nodes is {'there twice' if name in found else 'no node'}")
            found[name] = None
    if end != len(text):
        raise ValueError(f"{text[:80]!r} is no list of nodes")
    return tuple(found)


def _expand_name(text: str, most: int) -> Iterator[str]:
    """The names that one name with brackets stands for, at most so many. Raises ValueError."""
    parts: list[list[str]] = []
    count = 1
    for plain, ranges in _PARTS.findall(text):
        parts.append([plain] if plain else _numbers(ranges, most))
        count *= len(parts[-1])
        if count > most:
            raise ValueError(f"a list of more than {MAX_NODES} nodes")
    return ("".join(pieces) for pieces in product(*parts))


def _numbers(text: str, most: int) -> list[str]:
    """The numbers in brackets, as they are written there. Raises ValueError."""
    found: list[str] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(first) > int(last):
            raise ValueError(f"[{text[:80]}] in a list of nodes has no ranges of numbers")
        if int(last) - int(first) + len(found) >= most:
            raise ValueError(f"a list of more than {MAX_NODES} nodes")
        found += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return found
