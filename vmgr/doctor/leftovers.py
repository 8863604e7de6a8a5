"""What the janitor would remove: many such things tell of agents that die, or epilogues that do not come."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from vmgr.deploy.hookfiles import JANITOR_TIMER
from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.doctor.mom import place
from vmgr.node.reap import KINDS, find
from vmgr.topology.tree import Tree

HARMLESS = {"mark", "folder"}
"""What takes no room and is in nobody's way: every janitor finds some."""

_BOOTED = "run/systemd/system"
_UNITS = ("etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")

_find = finder("leftovers")


def check(node: Node) -> Iterator[Finding]:
    things, unseen = find(node.config)
    yield from judge([thing.kind for thing in things], unseen)
    if place(node).is_dir():  # not a front end
        yield from judge_timer(node.tree)


def judge_timer(tree: Tree) -> Iterator[Finding]:
    """Whether systemd runs the janitor: without it a node that gets no further guest jobs keeps what one has left.

    Facts: sd_booted(3), systemctl(1) (`enable` makes a link below the unit that wants the enabled one).
    """
    if not tree.at(_BOOTED).is_dir():
        yield _find(
            Level.NOTE, "systemd does not run here", "let another service run vmgr node reap every five minutes"
        )
    elif not any(os.path.lexists(tree.at(f"{folder}/timers.target.wants/{JANITOR_TIMER}")) for folder in _UNITS):
        yield _find(
            Level.WARNING, f"{JANITOR_TIMER} is not enabled: what has no epilogue stays until the next guest job",
            f"install it from share/vtorque/contrib/systemd, then systemctl enable --now {JANITOR_TIMER}",
        )  # fmt: skip
    else:
        yield _find(Level.OK, f"{JANITOR_TIMER} is enabled")


def judge(kinds: Sequence[str], unseen: Sequence[str]) -> Iterator[Finding]:
    for line in unseen:
        yield _find(Level.WARNING, line, "see its reason; vmgr node reap passes it over")
    if not kinds:
        yield _find(Level.OK, "nothing is left of jobs that have gone")
        return
    shown = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds)
    level = Level.NOTE if set(kinds) <= HARMLESS else Level.WARNING
    yield _find(level, f"left of jobs that have gone: {shown}", "vmgr node reap; its timer runs it by itself")
