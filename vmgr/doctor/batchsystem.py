"""The batch system's side of a node, as the one that the configuration names has it."""

from __future__ import annotations

import os
from collections.abc import Iterator

from vmgr.doctor import mom, slurm
from vmgr.doctor.finding import Check, Finding, Node

_CHECKS: dict[str, Check] = {"torque": mom.check, "local": mom.check, "slurm": slurm.check}


def check(node: Node) -> Iterator[Finding]:
    yield from _CHECKS[node.config.engine](node)


def requeues(node: Node) -> bool:
    """Whether root of this machine may have to requeue jobs: where a mom is; Slurm lets root do so on any machine."""
    if node.config.engine == "slurm":
        return os.geteuid() == 0
    return mom.place(node).is_dir()
