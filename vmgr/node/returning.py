"""A suspended job that could not go on in this attempt: it goes back to where it was, held and queued again.

What has failed may be this node's alone, and what is stored of the job is whole, so the job does not end by that. It is
held, so that only a person has it tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Any, Callable, NamedTuple, Optional, Protocol

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.logs import LOGGER
from vmgr.node.fellows import Fellows
from vmgr.node.state import Progress
from vmgr.node.user import User
from vmgr.node.waiting import first
from vmgr.reach import batch
from vmgr.suspended.store import Store


class Notes(Protocol):
    """Where the job is stored; see `vmgr.suspended.store`."""

    async def find(self, job_id: str) -> Optional[Any]: ...

    async def note(self, job_id: str, text: str) -> None: ...


class Means(NamedTuple):
    """What a job is put back with; without a `store` nothing can be stored now.

    `attached`: its wrapper has come; `over`: its attempt is ended from outside. `attach_s` is how long the wrapper may
    take, in seconds. `hold` and `requeue` are the batch system's, and block; `call_over` has the other nodes end the
    attempt, without an end of the job.
    """

    job_id: str
    store: Optional[Notes]
    attached: asyncio.Event
    over: asyncio.Event
    attach_s: float
    hold: Callable[[str], object]
    requeue: Callable[[str], object]
    call_over: Callable[[], Awaitable[None]]


def means_of(
    config: Config, user: User, job_id: str, attached: asyncio.Event, over: asyncio.Event, fellows: Optional[Fellows]
) -> Means:
    """What an attempt has for it."""

    async def call_over() -> None:
        if fellows is not None:
            await fellows.call_over(suspended=True)

    store: Optional[Notes]
    try:
        store = Store(config, user)
    except VTorqueError:
        store = None
    hold, requeue = partial(batch.hold, config), partial(batch.requeue, config)
    return Means(job_id, store, attached, over, config.timeouts.attach, hold, requeue, call_over)


async def put_back(means: Means, progress: Progress, problem: VTorqueError, *, is_stored: Optional[bool]) -> bool:
    """Have the job wait for its release again, after `problem`; whether it does, or has been ended meanwhile.

    `is_stored` is None where that is not known yet; it is looked at then. Nothing is raised: what stands in the way is
    logged, and the job fails of `problem`.
    """
    if is_stored is None and not await _is_stored(means):
        return False
    LOGGER.error("the job does not go on: %s", problem)
    try:
        if means.store is not None:
            await means.store.note(means.job_id, str(problem))
    except VTorqueError as err:
        LOGGER.warning("the reason is not stored: %s", err)
    try:
        await _call(means.hold, means.job_id)
        progress.facts["returned"] = str(problem)
        progress.turn("returning")
        await means.call_over()
        await _until_attached(means)
        if not means.over.is_set():
            await _call(means.requeue, means.job_id)
    except VTorqueError as err:
        LOGGER.warning("the job cannot be queued again: %s", err)
        if not means.over.is_set():
            progress.facts["returned"] = None
            return False
    progress.stage("suspended", "suspended")
    return True


async def _is_stored(means: Means) -> bool:
    if means.store is None:
        return False
    try:
        return await means.store.find(means.job_id) is not None
    except VTorqueError as err:
        LOGGER.warning("whether the job was suspended is not known: %s", err)
        return False


async def _until_attached(means: Means) -> None:
    """Wait for the job's wrapper: one that does not know that the job goes back would take the job directory away."""
    waiting = first(means.attached.wait(), means.over.wait())
    try:
        await asyncio.wait_for(waiting, means.attach_s)
    except asyncio.TimeoutError:
        raise VTorqueError(f"no job has come for the guest within {means.attach_s:g} s", code=Code.AGENT) from None


async def _call(ask: Callable[[str], object], job_id: str) -> None:
    await asyncio.get_running_loop().run_in_executor(None, ask, job_id)
