"""Undoing an attempt from its record, backwards: done by the agent at its end, the epilogue after it, the janitor.

Every inverse is idempotent, and a failing one does not stop the others.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vmgr.config import Paths
from vmgr.errors import VTorqueError
from vmgr.node import process, record

KILL_SECONDS = 5.0
"""How long killed processes may take to be gone: one that waits for a file system of the user's may never be."""


def undo(place: record.Place, *, patience_s: float = KILL_SECONDS) -> list[str]:
    """Undo an attempt and remove its place. Gives a line for each inverse that failed; empty when nothing is left.

    The agent goes first: as long as it lives it may add to the record. The calling process may be the agent itself
    and is spared. Processes are waited for no longer than `patience_s`, all together, so all are killed before.
    """
    deadline = time.monotonic() + patience_s
    agents = [step for step in record.steps(place) if step.get("role") == "agent"]
    failures = _undo_steps(agents, deadline)
    others = [step for step in record.steps(place) if step.get("role") != "agent"]
    gone = {step.get("path") for step in others if step.get("gone")}
    others = [step for step in others if step.get("path") not in gone or step.get("do") != "partial"]
    last = {(step.get("do"), step.get("path")): step for step in others}
    others = [step for step in others if step.get("do") != "entry" or last["entry", None] is step]
    others = [
        step for step in others
        if step.get("do") != "workspace"
        or (last["workspace", step.get("path")] is step and step.get("kept") is not True)
    ]  # fmt: skip
    _undo_steps((step for step in others if step.get("do") == "process"), 0.0)
    if not any(step.get("pid") == os.getpid() for step in agents):  # which has ended them, and spared the job wrapper
        failures += _kill_leftovers([step for step in others if step.get("do") == "leftover"])
    failures += _undo_steps(reversed(others), deadline)
    if not failures:
        shutil.rmtree(place.folder, ignore_errors=True)
        for folder in (place.folder.parent, place.socket.parent):
            try:
                folder.rmdir()
            except OSError:
                pass  # another attempt of the job is there
    return failures


def undo_older(paths: Paths, job_id: str, place: record.Place) -> list[str]:
    """Undo what earlier attempts of the job left, their epilogue lost or late: a requeued job keeps its id.

    Gives a line for each inverse that failed.
    """
    failures = []
    for other in record.places(paths, job_id):
        if other.attempt < place.attempt or not other.is_of_this_boot:
            failures += undo(other)
    return failures


def _undo_steps(steps: Iterable[dict[str, Any]], deadline: float) -> list[str]:
    failures = []
    for step in steps:
        try:
            _undo_step(step, max(0.0, deadline - time.monotonic()))
        except (VTorqueError, OSError, ValueError, KeyError, TypeError, OverflowError) as err:
            failures.append(f"{step.get('do')}: {err}")
    return failures


def _kill_leftovers(steps: Sequence[dict[str, Any]]) -> list[str]:
    if not steps:
        return []
    from vmgr.node.leftovers import kill  # few jobs have such steps, and psutil takes its time

    try:
        kill(map(process.recorded, steps), int(steps[0]["uid"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as err:
        return [f"leftover: {err}"]
    return []


def _undo_step(step: dict[str, Any], patience_s: float) -> None:
    kind = step["do"]
    if kind == "process":
        found = process.recorded(step)
        if found.pid != os.getpid() and not process.end(found, timeout_s=patience_s):
            raise OSError(f"pid {found.pid} ({step.get('role')}) does not end")
    elif kind in ("overlay", "socket"):
        Path(str(step["path"])).unlink(missing_ok=True)
    elif kind == "network":
        from vmgr.node.network.undo import undo_network  # few jobs have such a step

        undo_network(step)
    elif kind == "group":
        from vmgr.node.owngroup import undo_group  # as above

        undo_group(step, patience_s)
    elif kind in ("workspace", "shared"):
        from vmgr.node.workspace import undo_workspace  # as above

        undo_workspace(step, patience_s)
    elif kind == "suspending":
        from vmgr.suspended.store import undo_suspending  # as above

        undo_suspending(step, patience_s)
    elif kind == "entry":
        from vmgr.suspended.store import undo_entry  # as above

        undo_entry(step, patience_s)
    elif kind == "partial":
        from vmgr.node.callersfile import undo_partial  # few jobs have such a step

        undo_partial(step, patience_s)
    elif kind == "filling":
        from vmgr.node.staging.cache import remove_unfinished  # likewise

        remove_unfinished(step)
