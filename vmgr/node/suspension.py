"""The suspension of a job on all of its nodes: led by the mother superior's agent, followed by those of the sisters.

Leading, in this order: the job's wrapper leaves its session in the guest, all guests of all nodes stop, then all are
saved, the entry in the store is completed, the job is requeued. What fails before the requeue calls everything off.

Following: `stop` and `save` of one try after the other, until `goon`. A sister whose guests are saved goes on only when
she is told so: the requeue, of which she hears by her own batch system, may come before any word of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Callable, NamedTuple, Optional, Protocol, TypeVar

from vmgr.errors import Code, Unanswered, VTorqueError
from vmgr.logs import LOGGER
from vmgr.node.fellows import Fellows
from vmgr.node.gate import Gate
from vmgr.node.guestjob import Job
from vmgr.node.meeting import GO_ON, SAVE, SAVED, STOP, STOPPED, TRIES, of_try
from vmgr.node.orders.telling import Tell
from vmgr.node.state import Progress
from vmgr.node.suspending import MOUNT_SECONDS, QUIESCE_SECONDS, Storing
from vmgr.node.waiting import every, first, within
from vmgr.suspended.entry import COMPLETING, SETTLED, STALE, Entry

DETACH_SECONDS = 60.0
"""For the wrapper to leave its session: it has 30 s for the output that is on its way."""
MEETING_SECONDS = 60.0
"""What a step on all nodes may take beside its own time, for orders and answers to be seen."""
REQUEUE_SECONDS = 120.0
LATE_SECONDS = 10.0
"""So long after a requeue without an answer the job may still end by it."""
MAX_WHY = 1000
MAX_TRIES = 100
"""So often may it be tried in one attempt: each try leaves a line in the attempt's record."""

_T = TypeVar("_T")


class Guests(Protocol):
    """The guests of this node; see `vmgr.node.suspending.NodeGuests`."""

    async def check(self) -> int: ...

    async def stop(self, tell: Tell) -> None: ...

    async def save(self, tell: Tell) -> None: ...

    async def go_on(self) -> None: ...


class Means(NamedTuple):
    """What a suspension works with. `save_s` is in seconds; `requeue` has the batch system queue a job again.

    `keep` notes whether the job's workspace outlives the attempt, `attend` of which entry somebody is to queue the job
    again if this process dies.
    """

    job: Job
    spec_sha256: str
    guests: Guests
    store: Storing
    fellows: Fellows
    gate: Gate
    save_s: float
    requeue: Callable[[str], Awaitable[None]]
    keep: Callable[[bool], None]
    attend: Callable[[Optional[Entry]], None]


class Suspension(Protocol):
    """The agent's side of it, on any node."""

    async def run(self) -> None:
        """Follow what is said until the job is suspended. Raises VTorqueError when it cannot go on."""

    async def settle(self) -> bool:
        """The job is over: come to an end with what has been begun; whether the job is suspended.

        Its guests run if it is not.
        """

    def detached(self, number: object, error: object) -> None:
        """The job's wrapper has left its session for try `number`, or says why it cannot; the user's word."""

    async def suspend(self, tell: Tell) -> None:
        """Suspend the job. Raises VTorqueError, with everything called off, when that comes to nothing.

        When this is cancelled it is given up, unless the batch system has been told to requeue the job.
        """


class Leader:
    """On the mother superior: tries to suspend the job, one after the other, whenever they are asked for."""

    def __init__(self, means: Means, progress: Progress) -> None:
        self._means = means
        self._progress = progress
        self._tries = 0
        self._trying: Optional[asyncio.Future[None]] = None
        self._given_up: asyncio.Future[VTorqueError] = asyncio.get_running_loop().create_future()
        self._detached: asyncio.Future[Optional[str]] = asyncio.get_running_loop().create_future()
        self._over: asyncio.Future[Optional[VTorqueError]] = asyncio.get_running_loop().create_future()
        self._job_over = asyncio.Event()
        self._suspended = False

    async def run(self) -> None:
        """See `Suspension`."""
        error = await self._over
        if error is not None:
            raise error

    async def settle(self) -> bool:
        """See `Suspension`."""
        self._job_over.set()
        await self.give_up("the job has ended meanwhile")
        return self._suspended

    def detached(self, number: object, error: object) -> None:
        """See `Suspension`."""
        if type(number) is int and number == self._tries and not self._detached.done():
            self._detached.set_result(None if error is None else str(error)[:MAX_WHY])

    async def suspend(self, tell: Tell) -> None:
        """See `Suspension`."""
        with self._means.gate.alone():
            if self._progress.state != "running":
                raise VTorqueError(
                    f"the job is {self._progress.state}",
                    code=Code.SUSPEND,
                    hint="it can be suspended while its script runs",
                )
            loop = asyncio.get_running_loop()
            self._given_up, self._detached = loop.create_future(), loop.create_future()
            self._trying = trying = asyncio.ensure_future(self._try(tell))
            try:
                await asyncio.wait([trying])
            finally:
                await self.give_up("who asked for it has gone")
            trying.result()

    async def give_up(self, why: str) -> None:
        """Have the present try call everything off, if that is still possible, and wait for its end."""
        if self._trying is None or self._trying.done():
            return
        if not self._given_up.done():
            self._given_up.set_result(VTorqueError(f"the job is not suspended: {why}", code=Code.SUSPEND))
        await asyncio.wait([self._trying])
        if not self._trying.cancelled():
            self._trying.exception()  # looked at: nobody may wait for it any more

    async def _try(self, tell: Tell) -> None:
        means, job_id = self._means, self._means.job.job_id
        self._tries += 1
        number = self._tries
        if number > MAX_TRIES:
            raise VTorqueError(
                f"the job could not be suspended {MAX_TRIES} times; it is not tried again", code=Code.SUSPEND
            )
        means.fellows.begin_try(number)
        off: list[Callable[[], Awaitable[None]]] = []
        """What calls this off, to be done in this order."""

        def say(text: str) -> None:
            self._progress.doing(text)
            tell(text)

        try:
            say("looking for room in the store")
            need = await means.guests.check() * len(means.job.allocation.nodes)
            off.append(lambda: means.store.drop(job_id))
            await self._unless_given_up(means.store.begin(job_id, need_bytes=need))
            self._progress.facts["suspending"] = number
            off.insert(0, self._attach_again)
            say("waiting for the job's session to be left")
            await self._unless_given_up(self._detach())
            off.insert(0, means.guests.go_on)
            off.insert(0, lambda: means.fellows.lead(GO_ON, number))
            say("stopping the guests")
            await self._on_all(STOP, number, STOPPED, means.guests.stop(say), QUIESCE_SECONDS)
            say("storing the guests")
            await self._on_all(SAVE, number, SAVED, means.guests.save(say), means.save_s)
            say("completing what is stored")
            means.keep(True)
            off.append(self._keep_no_more)
            off.append(lambda: means.store.remove(job_id))
            entry = self._entry()
            off[:0] = [lambda: self._take_back(entry), self._stand_alone]  # first: no start may find what goes on
            means.store.mark(job_id, entry, COMPLETING)
            means.attend(entry)
            await self._unless_given_up(means.store.complete(job_id, entry))
            say("having the job requeued")
            await self._requeue()
        except BaseException:
            await self._call_off(off)
            raise
        self._suspended = True
        means.attend(None)
        with suppress(VTorqueError):  # it would only be told what may not be so
            means.store.mark(job_id, entry, SETTLED)
        self._progress.stage("suspended", "suspended")
        await means.fellows.call_over(suspended=True)
        if not self._over.done():
            self._over.set_result(None)

    async def _requeue(self) -> None:
        """Have the job requeued: nothing is called off meanwhile, for nobody knows whether that has been done."""
        if self._given_up.done():
            raise self._given_up.result()
        try:
            await within(REQUEUE_SECONDS, self._means.requeue(self._means.job.job_id))
        except asyncio.TimeoutError:
            err: VTorqueError = Unanswered(
                f"the batch system has not requeued the job within {REQUEUE_SECONDS:g} s", code=Code.ENGINE
            )
        except VTorqueError as problem:
            err = problem
        else:
            return
        if not isinstance(err, Unanswered) or not await self._ends_all_the_same():
            raise err
        LOGGER.warning("the job has ended, so it has been requeued all the same: %s", err)

    async def _ends_all_the_same(self) -> bool:
        """Whether the job ends, although the batch system has not said that it will.

        What is stored of it stays then: where it has been ended for another reason, nobody misses that.
        """
        try:
            await within(LATE_SECONDS, self._job_over.wait())
        except asyncio.TimeoutError:
            return False
        return True

    async def _detach(self) -> None:
        try:
            error = await within(DETACH_SECONDS, asyncio.shield(self._detached))
        except asyncio.TimeoutError:
            raise VTorqueError(
                f"the job's wrapper has not left its session within {DETACH_SECONDS:g} s", code=Code.SUSPEND
            ) from None
        if error is not None:
            raise VTorqueError(f"the job's session cannot be left: {error}", code=Code.SUSPEND)

    async def _on_all(
        self, order: str, number: int, step: str, here: Coroutine[Any, Any, None], limit_s: float
    ) -> None:
        """Have all nodes do a step; this one does it `here`."""
        work = every(self._means.fellows.lead(order, number, step), here)
        try:
            await self._unless_given_up(within(limit_s + MEETING_SECONDS, work))
        except asyncio.TimeoutError:
            raise VTorqueError(
                f"not all nodes have {step} their guests within {limit_s + MEETING_SECONDS:g} s", code=Code.SUSPEND
            ) from None

    async def _unless_given_up(self, doing: Awaitable[_T]) -> _T:
        """What `doing` gives, unless the try is given up meanwhile: its reason is raised then."""
        task = asyncio.ensure_future(doing)
        ends: list[asyncio.Future[Any]] = [task, self._given_up]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
        if self._given_up.done():
            if not task.cancelled():
                task.exception()  # looked at
            raise self._given_up.result()
        return task.result()

    async def _call_off(self, off: Sequence[Callable[[], Awaitable[None]]]) -> None:
        """Let everything go on as before the try."""
        for undo in off:
            try:
                await undo()
            except VTorqueError as err:
                LOGGER.warning("%s", err)
                if err.code is Code.GUEST and not self._over.done():
                    self._over.set_result(err)
            except Exception as err:  # what comes after it is to be done all the more
                LOGGER.exception("fault")
                if not self._over.done():
                    self._over.set_result(VTorqueError(f"fault in the node agent: {err}", code=Code.INTERNAL))
        self._progress.facts["doing"] = None
        self._progress.turn("running")

    async def _attach_again(self) -> None:
        self._progress.facts["suspending"] = None
        self._progress.turn("running")

    async def _take_back(self, entry: Entry) -> None:
        """Take the entry away; where that cannot be done now, it is done at the end of the attempt, at the latest."""
        try:
            await self._means.store.claim(self._means.job.job_id)
        except VTorqueError:
            self._means.store.mark(self._means.job.job_id, entry, STALE)
            raise
        self._means.store.mark(self._means.job.job_id, entry, SETTLED)

    async def _stand_alone(self) -> None:
        self._means.attend(None)

    async def _keep_no_more(self) -> None:
        self._means.keep(False)

    def _entry(self) -> Entry:
        job = self._means.job
        return Entry(
            job.job_id,
            job.user.name,
            self._means.spec_sha256,
            job.image.reference,
            job.path_key,
            len(job.allocation.nodes),
            job.group.per_node,
            int(time.time()),
            int(self._progress.seconds),
        )


class Follower:
    """On a sister: does what the mother superior says, one try after the other."""

    def __init__(self, means: Means, progress: Progress) -> None:
        self._means = means
        self._progress = progress
        self._last = 0
        self._is_saved = False
        self._patience_s = 2 * means.save_s + QUIESCE_SECONDS + MOUNT_SECONDS + REQUEUE_SECONDS + 4 * MEETING_SECONDS
        """Longer than the mother superior takes for all that may follow."""

    async def run(self) -> None:
        """See `Suspension`."""
        while True:
            order = await self._means.fellows.first_call(*stops_after(self._last))
            self._last = number_of(order)
            try:
                with self._means.gate.alone():
                    await self._follow(self._last)
            except VTorqueError as err:
                if err.code is not Code.SUSPEND:
                    raise
                LOGGER.warning("%s", err)
                await self._tell(STOPPED, err)

    async def settle(self) -> bool:
        """See `Suspension`."""
        fellows = self._means.fellows
        if fellows.ended_suspended or (self._is_saved and not fellows.ended_as_usual):
            return True
        try:
            await self._go_on()
        except VTorqueError as err:
            LOGGER.warning("%s", err)  # the job is over, or has failed for another reason
        return False

    def detached(self, number: object, error: object) -> None:
        """The wrapper is the mother superior's matter."""

    async def suspend(self, tell: Tell) -> None:
        """Suspending is the mother superior's matter."""
        raise VTorqueError("this is not the first node of the job", code=Code.SUSPEND)

    async def _follow(self, number: int) -> None:
        """One try, until its end. Raises VTorqueError (VT-GUEST) when the guests cannot go on."""
        if not await self._do(STOPPED, self._means.guests.stop(self._progress.doing), QUIESCE_SECONDS):
            return await self._go_on()
        if await self._told(number, SAVE) != of_try(SAVE, number):
            return await self._go_on()
        if await self._do(SAVED, self._save(), self._means.save_s):
            await self._told(number)
        await self._go_on()

    async def _save(self) -> None:
        await self._means.guests.save(self._progress.doing)
        self._is_saved = True

    async def _do(self, step: str, work: Awaitable[None], limit_s: float) -> bool:
        """Do a step and say so, or why it cannot be done; whether it has been. One that is called off is given up."""
        try:
            if not await within(limit_s + MEETING_SECONDS, self._unless_called_off(work)):
                return False
        except asyncio.TimeoutError:
            await self._tell(step, VTorqueError(f"not {step} in time", code=Code.SUSPEND))
            return False
        except VTorqueError as err:
            LOGGER.warning("%s", err)
            await self._tell(step, err)
            return False
        await self._tell(step, None)
        return True

    async def _unless_called_off(self, work: Awaitable[None]) -> bool:
        """Whether `work` came to its end before the mother superior has called the try off."""
        working = asyncio.ensure_future(work)
        called_off = (of_try(GO_ON, self._last), *stops_after(self._last))
        await first(working, self._means.fellows.first_call(*called_off))
        return not working.cancelled()

    async def _tell(self, step: str, error: Optional[VTorqueError]) -> None:
        data = {} if error is None else {"reason": error.detail}
        await self._means.fellows.tell(of_try(step, self._last), data)

    async def _told(self, number: int, *orders: str) -> str:
        """What the mother superior says next of this try: that the guests go on, or one of these orders.

        A new try stands for the former; so does her silence, which is longer than she can be busy.
        """
        going = of_try(GO_ON, number)
        awaited = (going, *stops_after(number), *(of_try(order, number) for order in orders))
        try:
            return await within(self._patience_s, self._means.fellows.first_call(*awaited))
        except asyncio.TimeoutError:
            LOGGER.warning("the mother superior says nothing more of the suspension: the guests go on")
            return going

    async def _go_on(self) -> None:
        self._is_saved = False
        await self._means.guests.go_on()
        self._progress.facts["doing"] = None
        self._progress.turn(self._progress.state)


def stops_after(number: int) -> tuple[str, ...]:
    """The orders that begin a try after this one, the last of them first."""
    return tuple(of_try(STOP, later) for later in reversed(TRIES) if later > number)


def number_of(order: str) -> int:
    """The number of the try that an order is about."""
    return int(order.rpartition("-")[2])
