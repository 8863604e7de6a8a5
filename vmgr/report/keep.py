"""The agent's side: the node's part of the report, written again whenever something of the attempt is new."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from vmgr.logs import LOGGER, open_for
from vmgr.node.state import Progress
from vmgr.report.parts import MAX_ATTEMPTS, MAX_BYTES, SUFFIX, VERSION

SETTLE_SECONDS = 0.3
"""So long after something new what comes with it is waited for."""


async def keep(progress: Progress, log: Path, reader: int, facts: dict[str, Any]) -> None:
    """Keep the report beside the job's log current, until the stage `gone` stands in it. The user `reader` may read it.

    `facts` are members of the part that the agent learns as it goes on: `user`, `key`, `node_index`, `nodes`,
    `first_rank`. What comes quickly one after the other is written at once, so that it does not hold up the boot. It is
    not to be cancelled, as `state.publish` is not.
    """
    path = log.with_suffix(SUFFIX)
    older = earlier_attempts(path, reader)
    began = round(time.time() - progress.seconds, 3)
    told: Optional[tuple[object, ...]] = None
    async for _ in progress.changes():
        if _news(progress) == told:  # how far a copy is, is none
            continue
        await _settle(progress)
        told = _news(progress)
        attempt = {**as_part(progress, facts), "began": began, "reader": reader}
        try:
            write(path, reader, [*older, attempt])
        except OSError as err:
            LOGGER.debug("the report is not written: %s", err)
        if _is_over(progress):
            return


def _news(progress: Progress) -> tuple[object, ...]:
    return len(progress.stages), progress.state, sum(map(len, progress.guests.values())), progress.job_status


def _is_over(progress: Progress) -> bool:
    return any(stage["name"] == "gone" for stage in progress.stages[-1:])


async def _settle(progress: Progress) -> None:
    """Wait a moment for what else comes, unless nothing can, or a failure is to be told: its job may end us at once."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + SETTLE_SECONDS
    while not _is_over(progress) and progress.error is None and loop.time() < deadline:
        waiting = asyncio.ensure_future(progress.changed())
        await asyncio.wait([waiting], timeout=deadline - loop.time())
        waiting.cancel()


def as_part(progress: Progress, learned: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the attempt as `parts.read_parts` reads it, but for when it began."""
    facts, failure = progress.facts, progress.failure()
    group = progress.private.get("spec", {}).get("groups", [{}])[0]
    return {
        "user": learned["user"],
        "key": learned.get("key", ""),
        "job_id": facts["job_id"],
        "attempt": facts["attempt"],
        "node": facts["node"],
        "node_index": learned.get("node_index", 0),
        "nodes": learned.get("nodes", []),
        "image": str(progress.private.get("image", "")),
        "vcpus": group.get("vcpus", 0),
        "ram_mib": group.get("ram_mib", 0),
        "state": progress.state,
        "code": failure["code"],
        "reason": failure["reason"],
        "job_status": progress.job_status,
        "stages": progress.stages,
        "guests": [
            {"name": name, "rank": learned.get("first_rank", 0) + at, "moments": progress.guests.get(name, [])}
            for at, name in enumerate(facts["guests"])
        ],
    }


def earlier_attempts(path: Path, reader: int) -> list[Any]:
    """The earlier attempts of the same job of the same user that are in the file, the newest ones."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as stream:
            attempts = json.loads(stream.read(MAX_BYTES + 1))["attempts"]
        same = [attempt for attempt in attempts if attempt["reader"] == reader]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    return same[-(MAX_ATTEMPTS - 1) :]


def write(path: Path, reader: int, attempts: list[Any]) -> None:
    """Write the file whole and rename it into place; what does not fit goes without its oldest attempts.

    Raises OSError.
    """
    data = json.dumps({"v": VERSION, "attempts": attempts}).encode()
    while len(data) > MAX_BYTES and len(attempts) > 1:
        attempts = attempts[1:]
        data = json.dumps({"v": VERSION, "attempts": attempts}).encode()
    temporary = path.with_name(f".{path.name}")
    fd = open_for(temporary, reader, truncate=True)
    try:
        with open(fd, "wb") as stream:
            stream.write(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
