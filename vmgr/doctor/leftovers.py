"""What the janitor would remove: many such things tell of agents that die, or epilogues that do not come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.node.reap import KINDS, find

HARMLESS = {"mark", "folder"}
"""What takes no room and is in nobody's way: every janitor finds some."""

_find = finder("leftovers")


def check(node: Node) -> Iterator[Finding]:
    things, unseen = find(node.config)
    yield from judge([thing.kind for thing in things], unseen)


def judge(kinds: Sequence[str], unseen: Sequence[str]) -> Iterator[Finding]:
    for line in unseen:
        yield _find(Level.WARNING, line, "see its reason; vmgr node reap passes it over")
    if not kinds:
        yield _find(Level.OK, "nothing is left of jobs that have gone")
        return
    shown = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds)
    level = Level.NOTE if set(kinds) <= HARMLESS else Level.WARNING
    yield _find(level, f"left of jobs that have gone: {shown}", "vmgr node reap; its timer runs it by itself")
