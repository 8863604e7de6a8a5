"""`suspend`: the job's guests go into the store, and the job into the queue, held, until it is released."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from vmgr.errors import Code, VTorqueError
from vmgr.node.control import Order, Talk
from vmgr.node.orders.telling import as_answer, telling
from vmgr.node.staging.overlay import MIB

if TYPE_CHECKING:
    from vmgr.node.orders import JobNow, SuspensionNow


def order(job: JobNow, suspension: SuspensionNow) -> Order:
    """The order `suspend`, of the whole job, at its mother superior.

    It is given up when the caller goes, as long as the batch system has not been told to requeue the job.
    """

    async def suspend(talk: Talk) -> AsyncIterator[Mapping[str, Any]]:
        running = job()
        if running is None:
            raise VTorqueError("the job has no guests yet", code=Code.SUSPEND, hint="wait for `running`")
        if not running.spec.suspend:
            raise VTorqueError(
                "the job was not submitted as one that can be suspended", code=Code.SUSPEND, hint="vsub -vm suspend=on"
            )
        if running.allocation.node_index:
            raise VTorqueError(
                f"this is not the first node of the job, {running.allocation.nodes[0]} is", code=Code.SUSPEND
            )
        leading = suspension()
        if leading is None:
            raise VTorqueError("the job has no guests that are ready", code=Code.SUSPEND, hint="wait for `running`")
        async with telling(leading.suspend) as told:
            async for text in told:
                yield as_answer(text, running.group.ram_mib * MIB)
            told.result()
        yield {"suspended": running.job_id}

    return suspend
