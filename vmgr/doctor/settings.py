"""Whether the configuration holds what nodes can do, and is compiled."""

from __future__ import annotations

from collections.abc import Iterator

from vmgr.config import is_compiled, read_tree
from vmgr.consistency import contradictions
from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.errors import VTorqueError
from vmgr.node.abilities import beyond_nodes, provided_by

_find = finder("configuration")


def check(node: Node) -> Iterator[Finding]:
    source = node.install.config_file
    try:
        tree, _ = read_tree(source)
    except VTorqueError as err:
        yield _find(Level.FAILURE, err.message, err.hint or "vmgr config check")
        return
    provided = provided_by(tree)
    notes = beyond_nodes(tree["policy"], tree["components"], provided)
    for note in notes:
        yield _find(Level.WARNING, note, f"change it in {source}")
    for line in contradictions(tree["policy"], node.config.policy_for, lambda user: None):
        yield _find(Level.WARNING, line, "vmgr config check --user NAME --queue NAME shows whom it concerns")
    if not is_compiled(source):
        yield _find(
            Level.NOTE, f"{source} has no current compiled copy: each submission reads YAML", "vmgr config compile"
        )
    if not notes:
        yield _find(Level.OK, f"{source} is in order")
