"""Leading and following the suspension of a job, without guests: the order of things, and what is called off when."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from types import SimpleNamespace
from typing import Any, Callable, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import a_user

from vmgr.errors import Code, Unanswered, VTorqueError
from vmgr.node import suspension
from vmgr.node.gate import Gate
from vmgr.node.meeting import ORDERS, TRIES, of_try
from vmgr.node.state import Progress
from vmgr.node.suspension import Follower, Leader, Means, number_of, stops_after
from vmgr.node.waiting import within

BROKEN = VTorqueError("the guest vn1-1 goes on without its shares", code=Code.GUEST)
REFUSED = VTorqueError("the guest vn1-1 cannot let go of its shares", code=Code.SUSPEND)


class Doubles:
    """Stand for guests, store, fellows and batch system. `does` says what a step does instead of succeeding."""

    def __init__(self, nodes: int = 1) -> None:
        self.done: list[str] = []
        self.does: dict[str, Any] = {}
        self.reached: dict[str, asyncio.Event] = {}
        self.nodes = nodes
        self.progress = Progress(0, {})
        self.progress.state = "running"
        self.calls: set[str] = set()
        self.called = asyncio.Event()
        self.gate = Gate()

    async def step(self, name: str) -> None:
        self.done.append(name)
        self.reach(name).set()
        does = self.does.get(name)
        if isinstance(does, BaseException):
            raise does
        if does is not None:
            await does()

    def reach(self, name: str) -> asyncio.Event:
        return self.reached.setdefault(name, asyncio.Event())

    def means(self) -> Means:
        job = SimpleNamespace(
            job_id="12.host", user=a_user(), image=SimpleNamespace(reference="micro@1"),
            allocation=SimpleNamespace(key="k", nodes=("n1", "n2")[: self.nodes]), group=SimpleNamespace(per_node=1),
            path_key="k",
        )  # fmt: skip
        guests: Any = SimpleNamespace(
            check=self._check, **{name: self._doing(name) for name in ("stop", "save", "go_on")}
        )
        store: Any = SimpleNamespace(
            **{name: self._doing(name) for name in ("begin", "complete", "claim", "drop", "remove")},
            mark=lambda job_id, entry, word: self.done.append(f"mark {word}"),
        )

        async def lead(order: str, number: int, step: Optional[str] = None) -> None:
            await self.step(f"sisters {of_try(order, number)}")

        async def call_over(*, suspended: bool = False) -> None:
            await self.step(f"over {suspended}")

        async def first_call(*orders: str) -> str:
            while True:
                given = next((order for order in orders if order in self.calls), None)
                if given is not None:
                    return given
                self.called.clear()
                await self.called.wait()

        async def tell(kind: str, data: dict[str, Any]) -> None:
            await self.step(f"{kind} {data.get('reason', '')}".strip())

        self.fellows: Any = SimpleNamespace(
            begin_try=lambda number: None, lead=lead, call_over=call_over, first_call=first_call, tell=tell,
            ended_as_usual=False, ended_suspended=False,
        )  # fmt: skip
        return Means(
            job, "a" * 64, guests, store, self.fellows, self.gate, 60.0,  # type: ignore[arg-type]
            lambda job_id: self.step(f"requeue {job_id}"), lambda kept: self.done.append(f"keep {kept}"),
            lambda entry: self.done.append(f"attend {entry is not None}"),
        )  # fmt: skip

    def _doing(self, name: str) -> Callable[..., Awaitable[None]]:
        return lambda *_, **__: self.step(name)

    async def _check(self) -> int:
        await self.step("check")
        return 7

    def call(self, order: str) -> None:
        self.calls.add(order)
        self.called.set()

    def leader(self, error: Optional[str] = None, *, leaves: bool = True) -> Leader:
        """A leader whose wrapper leaves its session as soon as it is told to, or says that it cannot."""
        leader = Leader(self.means(), self.progress)

        async def wrapper() -> None:
            async for _ in self.progress.changes():
                number = self.progress.facts.get("suspending")
                if number is not None and f"detach {number}" not in self.done:
                    self.done.append(f"detach {number}")
                    if leaves:
                        leader.detached(number - 1, None)  # a former try counts for nothing
                        leader.detached(number, error)

        self.wrapper = asyncio.ensure_future(wrapper())
        return leader


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), 20))


TO_SAVED = ["check", "begin", "detach 1", "sisters stop-1", "stop", "sisters save-1", "save"]
TO_REQUEUE = [*TO_SAVED, "keep True", "mark completing", "attend True", "complete", "requeue 12.host"]
SILENT = ("keep True", "check", "mark completing", "attend True")
DONE = [*TO_REQUEUE, "attend False", "mark settled", "over True"]
CALLED_OFF = ["claim", "mark settled", "attend False", "sisters goon-1", "go_on", "drop", "keep False", "remove"]


def test_everything_in_its_order() -> None:
    async def work() -> None:
        here, said = Doubles(nodes=2), list[str]()
        leader = here.leader()
        running = asyncio.ensure_future(leader.run())
        states = {}
        here.does["requeue 12.host"] = lambda: asyncio.sleep(0, states.update(requeue=here.progress.state))
        await leader.suspend(said.append)
        assert here.done == DONE
        assert states == {"requeue": "running"}
        assert here.progress.state == "suspended" and here.progress.stages[-1]["name"] == "suspended"
        await running
        assert await leader.settle() is True
        assert said[0] == "looking for room in the store" and said[-1] == "having the job requeued"
        with pytest.raises(VTorqueError, match="VT-SUSPEND: the job is suspended;"):
            await leader.suspend(said.append)

    run(work)


@pytest.mark.parametrize(
    ("step", "done"),
    [
        ("check", []),
        ("begin", ["drop"]),
        ("stop", ["sisters goon-1", "go_on", "drop"]),
        ("sisters stop-1", ["sisters goon-1", "go_on", "drop"]),
        ("save", ["sisters goon-1", "go_on", "drop"]),
        ("complete", CALLED_OFF),
        ("requeue 12.host", CALLED_OFF),
    ],
)
def test_what_fails_is_called_off_and_may_be_tried_again(step: str, done: list[str]) -> None:
    async def work() -> None:
        here = Doubles(nodes=2)
        leader = here.leader()
        here.does[step] = REFUSED
        with pytest.raises(VTorqueError) as caught:
            await leader.suspend(len)
        assert caught.value is REFUSED
        off = here.done[here.done.index(step) + 1 :]
        assert [name for name in off if not name.startswith(("stop", "save"))] == done
        assert (here.progress.state, here.progress.facts.get("suspending")) == ("running", None)
        assert await leader.settle() is False
        here.does.clear()
        here.done.clear()
        await leader.suspend(len)
        assert ("requeue 12.host" in here.done and "detach 2" in here.done) or step in ("check", "begin")

    run(work)


@pytest.mark.parametrize("ends", [True, False], ids=["the job ends", "the job goes on"])
@pytest.mark.parametrize("kind", [Unanswered, VTorqueError])
def test_a_requeue_whose_answer_is_lost(ends: bool, kind: type[VTorqueError], monkeypatch: pytest.MonkeyPatch) -> None:
    """The job may be queued again all the same: what it goes on from is not taken away as long as that may be."""
    monkeypatch.setattr(suspension, "LATE_SECONDS", 20 if ends else 0.1)

    async def work() -> None:
        here = Doubles()
        leader = here.leader()
        here.does["requeue 12.host"] = kind("the batch system has not answered", code=Code.ENGINE)
        suspending = asyncio.ensure_future(leader.suspend(len))
        await here.reach("requeue 12.host").wait()
        for _ in range(20):
            await asyncio.sleep(0)
        assert suspending.done() is (kind is VTorqueError)
        settled = asyncio.ensure_future(leader.settle()) if ends and kind is Unanswered else None
        await asyncio.wait([suspending])
        if settled is None:
            with pytest.raises(VTorqueError, match="has not answered"):
                suspending.result()
            assert "claim" in here.done
        else:
            assert await settled is True and here.done == DONE and here.progress.state == "suspended"

    run(work)


def test_an_entry_that_cannot_be_taken_back_ends_with_the_attempt() -> None:
    """The guests go on from where it is: no start may find it."""

    async def work() -> None:
        here = Doubles()
        here.does.update({"requeue 12.host": REFUSED, "claim": VTorqueError("it hangs", code=Code.SUSPEND)})
        with pytest.raises(VTorqueError, match="cannot let go"):
            await here.leader().suspend(len)
        assert here.done[len(TO_REQUEUE) :][:4] == ["claim", "mark stale", "attend False", "sisters goon-1"]
        assert here.done[-1] == "remove"

    run(work)


def test_a_wrapper_that_cannot_or_does_not_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        here = Doubles()
        with pytest.raises(VTorqueError, match="the job's session cannot be left: the script has just ended"):
            await here.leader("the script has just ended").suspend(len)
        assert here.done == ["check", "begin", "detach 1", "drop"] and here.progress.state == "running"
        monkeypatch.setattr(suspension, "DETACH_SECONDS", 0.1)
        here = Doubles()
        with pytest.raises(VTorqueError, match="has not left its session within 0\\.1 s"):
            await here.leader(leaves=False).suspend(len)

    run(work)


@pytest.mark.parametrize("step", [step for step in TO_REQUEUE if step not in SILENT])
@pytest.mark.parametrize("ends", ["job", "caller"])
def test_the_end_of_job_or_caller_in_each_phase(step: str, ends: str) -> None:
    """Before the requeue it calls everything off; from then on the batch system's word is waited for."""

    async def work() -> None:
        here = Doubles(nodes=2)
        leader, go = here.leader(leaves=step != "detach 1"), asyncio.Event()
        here.does[step] = go.wait
        suspending = asyncio.ensure_future(leader.suspend(len))
        if step == "detach 1":
            while step not in here.done:
                await asyncio.sleep(0)
        else:
            await here.reach(step).wait()
        settled: Optional[asyncio.Future[bool]] = None
        if ends == "job":
            settled = asyncio.ensure_future(leader.settle())
        else:
            suspending.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        if step.startswith("requeue"):
            assert not suspending.done(), "nobody knows yet what the batch system does"
            go.set()
        await asyncio.wait([suspending])
        suspended = step.startswith("requeue")
        assert ("over True" in here.done) is suspended and ("drop" in here.done) is not suspended
        assert (here.progress.state == "suspended") is suspended
        if settled is not None:
            assert await settled is suspended
            if not suspended:
                with pytest.raises(VTorqueError, match="the job is not suspended: the job has ended meanwhile"):
                    suspending.result()
        else:
            assert suspending.cancelled()
        with here.gate.beside("save"):
            pass

    run(work)


@pytest.mark.parametrize("number", [None, "1", 1.0, True, [], 2, 0, -1, 1 << 70])
def test_what_no_wrapper_says_counts_for_nothing(number: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspension, "DETACH_SECONDS", 0.05)

    async def work() -> None:
        here = Doubles()
        leader = here.leader(leaves=False)
        trying = asyncio.ensure_future(leader.suspend(len))
        await here.reach("begin").wait()
        await settled()
        leader.detached(number, None)
        with pytest.raises(VTorqueError, match="has not left its session"):
            await trying

    run(work)


def test_a_guest_that_does_not_go_on_ends_the_job() -> None:
    async def work() -> None:
        here = Doubles()
        leader = here.leader()
        running = asyncio.ensure_future(leader.run())
        here.does.update(save=REFUSED, go_on=BROKEN)
        with pytest.raises(VTorqueError, match="cannot let go"):
            await leader.suspend(len)
        with pytest.raises(VTorqueError) as caught:
            await running
        assert caught.value is BROKEN and here.done[-1] == "drop"

    run(work)


@pytest.mark.parametrize("state", ["ready", "ending", "failed", "booting", "suspended"])
def test_only_what_runs_is_suspended(state: str) -> None:
    async def work() -> None:
        here = Doubles()
        leader = here.leader()
        here.progress.state = state
        with pytest.raises(VTorqueError, match=f"VT-SUSPEND: the job is {state}"):
            await leader.suspend(len)
        assert here.done == []

    run(work)


def test_one_try_at_a_time_and_no_other_order_beside_it() -> None:
    async def work() -> None:
        here = Doubles()
        leader, go = here.leader(), asyncio.Event()
        here.does["save"] = go.wait
        trying = asyncio.ensure_future(leader.suspend(len))
        await here.reach("save").wait()
        with pytest.raises(VTorqueError, match="is being suspended already"):
            await leader.suspend(len)
        with pytest.raises(VTorqueError, match="there is no dump meanwhile"), here.gate.beside("dump"):
            pass
        go.set()
        await trying
        here = Doubles()
        with here.gate.beside("save"), pytest.raises(VTorqueError, match="the order save is being carried out"):
            await here.leader().suspend(len)

    run(work)


async def settled() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("usual", "suspended"), [(True, False), (False, True)], ids=["the job is deleted", "the job is requeued"]
)
def test_a_sister_whose_guests_are_saved(usual: bool, suspended: bool) -> None:
    async def work() -> None:
        here = Doubles(nodes=2)
        sister = Follower(here.means(), here.progress)
        running = asyncio.ensure_future(sister.run())
        await settled()
        assert here.done == []
        here.call("stop-1")
        await settled()
        assert here.done == ["stop", "stopped-1"]
        here.call("save-1")
        await settled()
        assert here.done == ["stop", "stopped-1", "save", "saved-1"]
        running.cancel()
        await asyncio.wait([running])
        here.fellows.ended_as_usual = usual
        assert await sister.settle() is suspended and ("go_on" in here.done) is usual

    run(work)


def test_a_sister_whose_mother_superior_has_it_suspended_ends_with_it() -> None:
    """Also one whose guests have not been saved by this attempt: it was to go on, and the job waits again."""

    async def work() -> None:
        here = Doubles(nodes=2)
        sister = Follower(here.means(), here.progress)
        here.fellows.ended_suspended = True
        assert await sister.settle() is True and here.done == []

    run(work)


@pytest.mark.parametrize("step", ["stop", "save"])
@pytest.mark.parametrize("order", ["goon-1", "stop-2"])
def test_a_sister_gives_up_what_is_called_off(step: str, order: str) -> None:
    """Its guests do not stand still until it is done: it may be at it for as long as saving may take."""

    async def work() -> None:
        here = Doubles(nodes=2)
        here.does[step] = asyncio.Event().wait
        running = asyncio.ensure_future(Follower(here.means(), here.progress).run())
        for each in ("stop-1", "save-1"):
            here.call(each)
        await here.reach(step).wait()
        here.call(order)
        await here.reach("go_on").wait()
        assert here.done[-1] == "go_on" and f"{step}ped-1" not in here.done and "saved-1" not in here.done
        running.cancel()
        await asyncio.wait([running])

    run(work)


def test_a_fault_while_all_is_called_off_leaves_nothing_undone() -> None:
    async def work() -> None:
        here = Doubles()
        here.does.update({"save": REFUSED, "sisters goon-1": RuntimeError("a fault")})
        leader = here.leader()
        with pytest.raises(VTorqueError, match="cannot let go"):
            await leader.suspend(len)
        assert here.done[-2:] == ["go_on", "drop"] and here.progress.facts["suspending"] is None
        with pytest.raises(VTorqueError, match="VT-INTERNAL: fault in the node agent: a fault"):
            await leader.run()

    run(work)


def test_a_sister_does_one_try_after_the_other() -> None:
    async def work() -> None:
        here = Doubles(nodes=2)
        sister = Follower(here.means(), here.progress)
        running = asyncio.ensure_future(sister.run())
        here.does["stop"] = REFUSED
        here.call("save-1")  # what comes without a beginning counts for nothing
        here.call("goon-3")
        here.call("stop-1")
        await settled()
        assert here.done == ["stop", f"stopped-1 {REFUSED.detail}", "go_on"]
        here.does.clear()
        here.call("stop-2")
        await settled()
        here.call("goon-2")
        await settled()
        assert here.done[3:] == ["stop", "stopped-2", "go_on"]
        here.call("stop-4")
        await settled()
        here.call("save-4")
        await settled()
        here.call("stop-5")  # a new try stands for the end of the former
        await settled()
        assert here.done[6:] == ["stop", "stopped-4", "save", "saved-4", "go_on", "stop", "stopped-5"]
        running.cancel()
        await asyncio.wait([running])
        assert await sister.settle() is False and here.done[-1] == "go_on"

    run(work)


def test_a_sister_whose_guests_do_not_go_on_fails_the_job() -> None:
    async def work() -> None:
        here = Doubles(nodes=2)
        here.does.update(stop=REFUSED, go_on=BROKEN)
        here.call("stop-1")
        sister = Follower(here.means(), here.progress)
        with pytest.raises(VTorqueError) as caught:
            await sister.run()
        assert caught.value is BROKEN and await sister.settle() is False

    run(work)


def test_a_sister_that_hears_nothing_more_goes_on() -> None:
    async def work() -> None:
        here = Doubles(nodes=2)
        sister = Follower(here.means(), here.progress)
        sister._patience_s = 0.05
        running = asyncio.ensure_future(sister.run())
        here.call("stop-1")
        await here.reach("go_on").wait()
        assert here.done == ["stop", "stopped-1", "go_on"]
        running.cancel()
        await asyncio.wait([running])

    run(work)


@given(st.integers(0, 20))
def test_orders_of_tries(number: int) -> None:
    later = stops_after(number)
    assert set(later) <= set(ORDERS) and len(later) == sum(each > number for each in TRIES)
    assert [number_of(order) for order in later] == sorted(map(number_of, later), reverse=True)


def test_within_a_limit_nothing_is_swallowed() -> None:
    async def work() -> None:
        assert await within(5, asyncio.sleep(0, "there")) == "there"
        ended: list[str] = []

        async def slow() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.append("ended")

        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, slow())
        task = asyncio.ensure_future(within(60, slow()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["ended"] * 2
        there: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(within(60, there))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        there.set_result(1)
        task.cancel()  # at the same moment
        with pytest.raises(asyncio.CancelledError):
            await task

    run(work)
