"""The same for many nodes at once: `vmgr doctor` on each of them, reached by pdsh, bounded in time."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

from vmgr.doctor.finding import Finding, from_plain
from vmgr.errors import printable
from vmgr.pdsh import CONNECT_SECONDS, FANOUT, Heard, run


class Report(NamedTuple):
    """What one node says; `problem` is why it says nothing, else None."""

    node: str
    findings: tuple[Finding, ...] = ()
    problem: Optional[str] = None


def ask(names: Sequence[str], command: Sequence[str], *, rcmd: str, timeout_s: int) -> list[Report]:
    """Run `command`, which prints findings as JSON, on all nodes; a report for each, in their order."""
    rounds = -(-len(names) // FANOUT)
    said, complained = Heard(names), Heard(names)
    run(
        [
            "pdsh",
            "-b",
            "-R", rcmd,
            "-t", str(CONNECT_SECONDS),
            "-u", str(timeout_s),
            "-f", str(FANOUT),
            "-w", ",".join(names),
            *(command if rcmd == "exec" else [shlex.join(command)]),
        ],
        said.feed,
        complained.feed,
        limit_s=rounds * (CONNECT_SECONDS + timeout_s) + 10,
    )  # fmt: skip
    texts, complaints = said.by_node(), complained.by_node()
    return [report(name, texts[name], complaints[name]) for name in names]


def report(node: str, out: str, err: str) -> Report:
    """A node's findings, or why there are none."""
    try:
        data = json.loads(out)
        return Report(node, tuple(map(from_plain, _findings(data))))
    except (ValueError, RecursionError):
        lines = [line for line in err.splitlines() if line.strip()]
        telling = [line for line in lines if "exited with exit code" not in line] or lines or ["no answer"]
        return Report(node, problem=printable(telling[0])[:300])


def _findings(data: Any) -> list[Any]:
    found = data.get("findings") if isinstance(data, Mapping) else None
    if not isinstance(found, list):
        raise ValueError("no findings")
    return found
