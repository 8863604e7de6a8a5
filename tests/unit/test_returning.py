"""A suspended job that could not go on: when it goes back to where it was, and when it fails."""

from __future__ import annotations

import asyncio
from typing import Any, Callable, Optional

import pytest

from vmgr.errors import Code, VTorqueError
from vmgr.node.returning import Means, put_back
from vmgr.node.state import Progress

PROBLEM = VTorqueError("another QEMU", code=Code.LAUNCH)
REFUSED = VTorqueError("no", code=Code.ENGINE)
ALL = ["note VT-LAUNCH: another QEMU", "hold 12.host", "over", "requeue 12.host"]


class Site:
    """Stands for store, batch system, wrapper and sisters. `does` says what a step does instead of succeeding."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.does: dict[str, Callable[[], object]] = {}
        self.attached, self.over = asyncio.Event(), asyncio.Event()
        self.attached.set()
        self.progress = Progress(0, {})
        self.states: dict[str, object] = {}

    def step(self, name: str) -> Any:
        self.done.append(name)
        word = name.partition(" ")[0]
        self.states[word] = (self.progress.state, self.progress.facts.get("returned"))
        return self.does.get(word, lambda: None)()

    async def find(self, job_id: str) -> Optional[Any]:
        return self.step(f"find {job_id}")

    async def note(self, job_id: str, text: str) -> None:
        self.step(f"note {text}")

    async def put_back(self, is_stored: Optional[bool] = True, *, has_store: bool = True) -> bool:
        async def call_over() -> None:
            self.step("over")

        means = Means(
            "12.host", self if has_store else None, self.attached, self.over, 0.1,
            lambda job_id: self.step(f"hold {job_id}"), lambda job_id: self.step(f"requeue {job_id}"), call_over,
        )  # fmt: skip
        return await asyncio.wait_for(put_back(means, self.progress, PROBLEM, is_stored=is_stored), 10)


def fails() -> None:
    raise REFUSED


def run(work: Callable[[Site], Any]) -> None:
    async def with_site() -> None:  # before Python 3.10 an event belongs to the loop in which it is made
        await work(Site())

    asyncio.run(with_site())


@pytest.mark.parametrize("notes", [True, False], ids=["", "the store is full"])
def test_it_is_held_before_it_is_queued_again(notes: bool) -> None:
    async def work(site: Site) -> None:
        if not notes:
            site.does["note"] = fails
        assert await site.put_back()
        assert site.done == ALL and site.progress.state == "suspended" and site.progress.error is None
        assert site.states["hold"] == ("starting", None)
        assert site.states["requeue"] == ("returning", "VT-LAUNCH: another QEMU"), "the wrapper is not to end the job"

    run(work)


@pytest.mark.parametrize(("step", "done"), [("hold", ALL[:2]), ("requeue", ALL)])
def test_what_the_batch_system_refuses_fails_the_job(step: str, done: list[str]) -> None:
    async def work(site: Site) -> None:
        site.does[step] = fails
        assert not await site.put_back()
        assert site.done == done and site.progress.facts.get("returned") is None and site.progress.state != "suspended"

    run(work)


def test_a_requeue_that_came_through_and_was_not_heard_of() -> None:
    async def work(site: Site) -> None:
        loop = asyncio.get_running_loop()

        def late() -> None:
            loop.call_soon_threadsafe(site.over.set)
            raise REFUSED

        site.does["requeue"] = late
        assert await site.put_back() and site.progress.state == "suspended"

    run(work)


def test_a_job_without_a_wrapper_is_not_queued_again() -> None:
    async def work(site: Site) -> None:
        site.attached.clear()
        assert not await site.put_back()
        assert site.done == ALL[:3]

    run(work)


def test_a_job_that_is_ended_meanwhile_is_not_queued_again() -> None:
    async def work(site: Site) -> None:
        site.attached.clear()
        asyncio.get_running_loop().call_later(0.01, site.over.set)
        assert await site.put_back() and site.done == ALL[:3]

    run(work)


@pytest.mark.parametrize(("there", "back"), [(lambda: None, False), (lambda: "entry", True), (fails, False)])
def test_where_nothing_is_known_yet_it_is_looked_for(there: Callable[[], object], back: bool) -> None:
    async def work(site: Site) -> None:
        site.does["find"] = there
        assert await site.put_back(None) is back
        assert site.done == ["find 12.host", *(ALL if back else [])]

    run(work)


def test_where_the_site_has_no_store_any_more() -> None:
    async def work(site: Site) -> None:
        assert not await site.put_back(None, has_store=False) and site.done == []
        assert await site.put_back(has_store=False) and site.done == ALL[1:]

    run(work)
