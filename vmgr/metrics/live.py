"""What is on this node at this moment, for monitoring: from the records, and from the agents behind their sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from vmgr.config import Config
from vmgr.node import accel, record
from vmgr.node.client import state_of
from vmgr.node.staging.overlay import MIB, reserved

ANSWER_SECONDS = 3.0
AT_ONCE = 64


class Room(NamedTuple):
    """Bytes that are given away, and that may be."""

    used: int
    most: int


class Live(NamedTuple):
    """Guests by state, what they have together, and attempts of which nothing is known.

    `silent` are attempts whose agent lives and does not answer, `dead` those that have none and wait for the janitor.
    `kvm` is None as long as the node has not tried. `cache` is None where there is none.
    """

    guests: Mapping[str, int]
    vcpus: int
    ram_mib: int
    silent: int
    dead: int
    kvm: Optional[bool]
    overlays: Room
    ramdisks: Room
    cache: Optional[Room]


async def look(config: Config) -> Live:
    """What is on this node now; takes no longer than `ANSWER_SECONDS` of waiting. Needs root."""
    places = record.places(config.paths)
    held = [place for place in places if record.is_held(place)]
    answers = await _ask_all([place.socket for place in held])
    known = [answer for answer in answers if answer is not None]
    found = accel.remembered(config)
    images, cache = config.images, config.images.cache
    return Live(
        guests=guests_by_state(known),
        vcpus=_sum(known, "vcpus"),
        ram_mib=_sum(known, "ram_mib"),
        silent=len(answers) - len(known),
        dead=len(places) - len(held),
        kvm=None if found is None else found.works,
        overlays=Room(reserved(config, "overlay"), images.overlays_max * MIB),
        ramdisks=Room(reserved(config, "ramdisk"), images.ramdisk_max * MIB),
        cache=None if cache.folder is None else Room(_bytes_in(cache.folder), cache.max * MIB),
    )


def guests_by_state(answers: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many guests are in each state, by what the agents say; one that is switched off is `off` and nothing else."""
    counts: dict[str, int] = {}
    for answer in answers:
        count, state = len(answer.get("guests") or [None]), str(answer.get("state"))
        off = sum(member.get("power") == "off" for member in answer.get("members", ()))
        for name, number in ((state, count - off), ("off", off)):
            if number > 0:
                counts[name] = counts.get(name, 0) + number
    return counts


def _sum(answers: Iterable[Mapping[str, Any]], key: str) -> int:
    """What the guests that are there, or will be, have together."""
    total = 0
    for answer in answers:
        group = answer.get("spec", {}).get("groups", [{}])[0]
        if answer.get("state") not in ("failed", "ended"):
            total += int(group.get(key, 0)) * int(group.get("per_node", 1))
    return total


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in record.listed(folder):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


async def _ask_all(sockets: Sequence[Path]) -> list[Optional[dict[str, Any]]]:
    turns = asyncio.Semaphore(AT_ONCE)
    deadline = asyncio.get_running_loop().time() + ANSWER_SECONDS

    async def ask(socket: Path) -> Optional[dict[str, Any]]:
        async with turns:
            left = max(0.05, deadline - asyncio.get_running_loop().time())
            return await state_of(socket, left)

    return list(await asyncio.gather(*map(ask, sockets)))
