"""How a job's guests become ready: those of this node, made known to each other, and then those of all nodes."""

from __future__ import annotations

import asyncio
from typing import Any

from vmgr.errors import Code, VTorqueError
from vmgr.node.crew import Crew
from vmgr.node.fellows import Fellows, check_image, parse_ssh_ports
from vmgr.node.guestjob import Job
from vmgr.node.resuming import check_alike, told
from vmgr.node.waiting import every


async def own_ready(job: Job, crew: Crew, fellows: Fellows, timeout_s: float) -> None:
    """Return when the guests of this node are ready. Raises VTorqueError (VT-BOOT, or what a guest says)."""
    introducing = [_introduce(job, crew, fellows, timeout_s)] if job.network.kind == "bridge" else []
    await every(*(guest.ready(timeout_s) for guest in crew.guests), *introducing)


async def _introduce(job: Job, crew: Crew, fellows: Fellows, timeout_s: float) -> None:
    """Tell the guests of this node where all guests of the job are, once all of them have said so.

    Raises VTorqueError (VT-BOOT) when they have not in time.
    """

    async def exchange() -> list[str]:
        return await fellows.exchange(await crew.addresses())

    try:
        addresses = await asyncio.wait_for(exchange(), timeout_s)
    except asyncio.TimeoutError:
        raise VTorqueError(f"not all guests told their addresses within {timeout_s} s", code=Code.BOOT) from None
    for guest in crew.guests:
        guest.send_hosts(zip(addresses, job.names))


def said_of(job: Job, crew: Crew) -> dict[str, Any]:
    """What a node whose guests are ready tells the mother superior of them; see `checked_ports`."""
    return {"ssh_ports": crew.ssh_ports(), "resumed": told(job.resumption), "image": job.image.reference}


async def all_ready(fellows: Fellows, timeout_s: float) -> list[dict[str, Any]]:
    """On the mother superior: wait until the guests of all nodes are ready; what these said, in their order.

    It is nothing, at once, on a sister. Raises VTorqueError (VT-BOOT) when they are not in time.
    """
    try:
        return await asyncio.wait_for(fellows.all_ready(), timeout_s)
    except asyncio.TimeoutError:
        raise VTorqueError(f"not all nodes were ready {timeout_s} s after this one", code=Code.BOOT) from None


def checked_ports(job: Job, node: int, said: dict[str, Any]) -> dict[str, int]:
    """The ports of a node, by its place among the job's, that it says lead to SSH of guests.

    Raises VTorqueError (VT-IMAGE, VT-SUSPEND) when its guests are not of one job with those of this node.
    """
    name, per_node = job.allocation.nodes[node], len(job.own)
    check_image(job.image.reference, name, said.get("image"))
    check_alike(job.resumption, name, said.get("resumed"))
    return parse_ssh_ports(said, job.names[node * per_node : (node + 1) * per_node])
