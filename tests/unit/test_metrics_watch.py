"""What an agent tells of its attempt: once for each thing, from its stages, beside its work."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Optional

import pytest
from nodesite import Node, make_node, short_folder

from vmgr.errors import Code, VTorqueError
from vmgr.metrics import store
from vmgr.metrics.watch import count, events
from vmgr.node import process, record
from vmgr.node.state import Progress

SPEC = {"spec": {"groups": [{"image": "micro", "per_node": 3, "vcpus": 2, "ram_mib": 512}]}}


@pytest.fixture
def node() -> Iterator[Node]:
    with short_folder() as base:
        yield make_node(base)


def now() -> int:
    return round(process.TICKS_PER_SECOND * process.seconds_since(0))


def at(progress: Progress, **times: float) -> None:
    progress.stages += [{"name": name.replace("_", " "), "t": t} for name, t in times.items()]


def test_boot_counts_from_the_first_instruction() -> None:
    progress = Progress(now(), {})
    progress.private = SPEC
    at(progress, pinned_and_running=1.5, booted=4.0, ready=9.0)
    (event,) = events(progress, set())
    assert event == {"e": "ready", "image": "micro", "guests": 3, "boot_s": 7.5, "start_s": 9.0}
    assert events(progress, {"ready"}) == []


def test_what_goes_on_has_booted_nothing() -> None:
    progress = Progress(now(), {})
    progress.private = SPEC
    at(progress, pinned_and_running=1.5, resumed=2.0, ready=2.1)
    assert events(progress, set()) == [{"e": "ready", "image": "micro", "guests": 3, "boot_s": None, "start_s": 2.1}]


def test_of_several_nodes_each_counts_its_own_guests() -> None:
    progress = Progress(now(), {})
    at(progress, pinned_and_running=1.0, guests_ready=5.0, ready=60.0)
    assert events(progress, set())[0]["boot_s"] == 4.0


@pytest.mark.parametrize(
    "ends",
    [(("job ended", "ending"), ("gone", "ended")), (("suspended", "suspended"), ("gone", None))],
    ids=["ended", "suspended"],
)
def test_a_life(node: Node, ends: tuple[tuple[str, Optional[str]], ...]) -> None:
    place = node.place()
    lock, listener = record.create(place, {})
    listener.close()
    for step in ("cached", "cached", "cached", "filling"):
        record.append(place, {"do": step, "path": "/x"})

    async def live() -> None:
        progress = Progress(now(), {})
        counting = asyncio.ensure_future(count(progress, node.config.paths, place))
        progress.private = SPEC
        for name, state in (("agent", None), ("pinned and running", "booting"), ("ready", "ready")):
            progress.stage(name, state)
        await asyncio.sleep(0)
        for name, state in ends:
            progress.stage(name, state)
            await asyncio.sleep(0)
        await asyncio.wait_for(counting, 10)

    asyncio.run(live())
    totals = store.read(node.config.paths)
    assert (totals.ready, totals.guests, totals.failed, totals.ended) == ({"micro": 1}, {"micro": 3}, {}, 1)
    assert (totals.hits, totals.misses) == (2, 1)
    os.close(lock)


def test_a_failure_before_anything_was_ready(node: Node) -> None:
    async def live() -> None:
        progress = Progress(now(), {})
        counting = asyncio.ensure_future(count(progress, node.config.paths, node.place()))
        await asyncio.sleep(0)
        progress.fail(VTorqueError("it did not boot", code=Code.BOOT))
        progress.fail(VTorqueError("and then", code=Code.GUEST))
        progress.stage("gone", None)
        await asyncio.wait_for(counting, 10)

    asyncio.run(live())
    totals = store.read(node.config.paths)
    assert (totals.ready, totals.failed, totals.ended) == ({}, {"VT-BOOT": 1}, 0)


def test_an_agent_that_is_killed_later_has_counted_its_boot(node: Node) -> None:
    async def live() -> None:
        progress = Progress(now(), {})
        counting = asyncio.ensure_future(count(progress, node.config.paths, node.place()))
        progress.private = SPEC
        progress.stage("ready", "ready")
        while not (store.folder(node.config.paths) / "journal").exists():
            await asyncio.sleep(0.01)
        counting.cancel()
        await asyncio.gather(counting, return_exceptions=True)

    asyncio.run(asyncio.wait_for(live(), 10))
    assert store.read(node.config.paths).ready == {"micro": 1}
