"""Undoing an attempt from its record, backwards: done by the agent at its end, the epilogue after it, the janitor.

Every inverse is idempotent, and a failing one does not stop the others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vmgr.node import process, record

KILL_SECONDS = 5.0


def undo(place: record.Place) -> list[str]:
    """Undo an attempt and remove its place. Gives a line for each inverse that failed; empty when nothing is left.

    The agent goes first: as long as it lives it may add to the record. The calling process may be the agent itself
    and is spared.
    """
    failures = _undo_steps(step for step in record.steps(place) if step.get("role") == "agent")
    failures += _undo_steps(reversed([step for step in record.steps(place) if step.get("role") != "agent"]))
    if not failures:
        shutil.rmtree(place.folder, ignore_errors=True)
        for folder in (place.folder.parent, place.socket.parent):
            try:
                folder.rmdir()
            except OSError:
                pass  # another attempt of the job is there
    return failures


def _undo_steps(steps: Iterable[dict[str, Any]]) -> list[str]:
    failures = []
    for step in steps:
        try:
            _undo_step(step)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as err:
            failures.append(f"{step.get('do')}: {err}")
    return failures


def _undo_step(step: dict[str, Any]) -> None:
    kind = step["do"]
    if kind == "process":
        found = process.Process(str(step["boot"]), int(step["pid"]), int(step["start"]))
        if found.pid != os.getpid() and not process.end(found, timeout_s=KILL_SECONDS):
            raise OSError(f"pid {found.pid} ({step.get('role')}) does not end")
    elif kind in ("overlay", "socket"):
        Path(str(step["path"])).unlink(missing_ok=True)
