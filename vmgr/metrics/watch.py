"""What an agent tells of its attempt to the node's counts: beside its work, in a thread, never waited for in it."""

from __future__ import annotations

import asyncio
from typing import Any, Optional

from vmgr.config import Paths
from vmgr.metrics import store
from vmgr.node import record
from vmgr.node.state import Progress


async def count(progress: Progress, paths: Paths, place: record.Place) -> None:
    """Note that the attempt is ready, has failed, has ended, each once, until the stage `gone`."""
    noted: set[str] = set()
    loop = asyncio.get_running_loop()
    async for _ in progress.changes():
        last = any(stage["name"] == "gone" for stage in progress.stages[-1:])
        for event in events(progress, noted):
            noted.add(event["e"])
            await loop.run_in_executor(None, _note, paths, place, event)
        if last:
            return


def _note(paths: Paths, place: record.Place, event: dict[str, Any]) -> None:
    if event["e"] == "ready":
        event = {**event, **_cache(place)}
    store.note(paths, event)


def _cache(place: record.Place) -> dict[str, int]:
    """How many files of the image were in the node's cache already, and how many were not."""
    steps = [step.get("do") for step in record.steps(place)]
    misses = steps.count("filling")
    return {"hits": max(0, steps.count("cached") - misses), "misses": misses}


def events(progress: Progress, noted: set[str]) -> list[dict[str, Any]]:
    """What there is to be noted of an attempt, but for what has been."""
    found: list[dict[str, Any]] = []
    if "ready" not in noted:
        ready = _ready(progress)
        if ready is not None:
            found.append(ready)
    if "failed" not in noted and progress.error is not None:
        found.append({"e": "failed", "code": progress.error.code.text})
    over = progress.stages[-1:] and progress.stages[-1]["name"] == "gone"
    if "ended" not in noted and (progress.state == "ended" or (over and progress.state == "suspended")):
        found.append({"e": "ended"})
    return found


def _ready(progress: Progress) -> Optional[dict[str, Any]]:
    times = {stage["name"]: float(stage["t"]) for stage in reversed(progress.stages)}
    ready = times.get("guests ready", times.get("ready"))  # those of this node, where there are others
    if ready is None:
        return None
    group = progress.private.get("spec", {}).get("groups", [{}])[0]
    return {
        "e": "ready",
        "image": group.get("image", "other"),
        "guests": group.get("per_node", 1),
        "boot_s": None if "resumed" in times else round(max(0.0, ready - times.get("pinned and running", ready)), 3),
        "start_s": max(0.0, ready),
    }
