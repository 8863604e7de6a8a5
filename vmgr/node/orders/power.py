"""`power`: a guest's reset button and its switch.

QEMU is started so that a guest that reboots or powers off by itself ends it, which is a failure of the job. What is
ordered here is none: QEMU is told beforehand to stay (`set-action`, QEMU 6.0), and the guest can be switched on again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Optional

from qemu.qmp import QMPClient

from vmgr.config import Timeouts
from vmgr.errors import Code, VTorqueError
from vmgr.node.control import Order, Talk
from vmgr.node.guest import RunningGuest
from vmgr.node.orders.which import guest_of

if TYPE_CHECKING:
    from vmgr.node.orders import CrewNow, Lost

ACTIONS = ("reset", "off", "on")
QMP_SECONDS = 10.0


def order(crew: CrewNow, timeouts: Timeouts, lost: Lost) -> Order:
    """The order `power`: `action` is one of ACTIONS, `rank` names the guest; `now` cuts the power without a shutdown.

    Without the guest of rank 0, in which its script runs, the job fails (`lost`); without any other it goes on.

    Answers `{"guest", "rank", "power"}` when the order is carried out, a second time when a guest that boots again is
    ready. `wait` false leaves the second one out.
    """

    async def power(talk: Talk) -> AsyncIterator[Mapping[str, Any]]:
        action, now, wait = (talk.request.get(key, default) for key, default in _REQUEST)
        if action not in ACTIONS or type(now) is not bool or type(wait) is not bool:
            raise VTorqueError(
                f"{action!r} is nothing that can be done to a guest's power",
                code=Code.VALUE,
                hint=f"possible: {', '.join(ACTIONS)}; now and wait are true or false",
            )
        member, guest = guest_of(crew(), talk.request)
        _check(guest, str(action))
        if member.rank == 0 and guest.is_ready:
            how = "reset" if action == "reset" else "switched off"
            text = f"the guest {member.name}, in which the job's script runs, was {how} by uid {talk.peer.uid}"
            lost(VTorqueError(text, code=Code.GUEST))
        if action == "off":
            clean = await guest.switch(_off(guest, timeouts, now=now))
            yield {"guest": member.name, "rank": member.rank, "power": guest.power, "clean": clean}
            return
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        booting = asyncio.ensure_future(guest.switch(_boot(guest, timeouts, started, was_off=action == "on")))
        try:
            await asyncio.wait([booting, started], return_when=asyncio.FIRST_COMPLETED)
            if booting.done():
                booting.result()
            yield {"guest": member.name, "rank": member.rank, "power": guest.power}
            if wait:
                await booting
                yield {"guest": member.name, "rank": member.rank, "power": guest.power}
        finally:
            booting.cancel()  # the guest boots on

    return power


_REQUEST = (("action", None), ("now", False), ("wait", True))


def _check(guest: RunningGuest, action: str) -> None:
    """Refuse what makes no sense. Raises VTorqueError (VT-GUEST)."""
    problem: Optional[str] = None
    if action == "on" and guest.power != "off":
        problem = "is not off"
    elif action != "on" and guest.power == "off":
        problem = "is off"
    elif action == "off" and guest.power == "on" and not guest.is_ready:
        problem = "is not ready yet: delete the job to end it"
    if problem is not None:
        raise VTorqueError(f"the guest {guest.name} {problem}", code=Code.GUEST, hint="`vmgr ps` shows its state")


async def _off(guest: RunningGuest, timeouts: Timeouts, *, now: bool) -> bool:
    """Shut the guest down, or cut its power; QEMU stays. Gives whether it has powered off by itself."""
    clean, before = guest.is_ready and not now, guest.power
    guest.power = "ending"
    try:
        await guest.monitor.execute("set-action", {"shutdown": "pause"})
    except VTorqueError:
        guest.power = before
        raise
    if clean:

        async def shut_down(_: QMPClient) -> None:
            guest.tell("shutdown")

        limit = timeouts.vm_epilogue + timeouts.shutdown
        clean = await guest.monitor.until("SHUTDOWN", shut_down, timeout_s=limit)
    if not clean:
        await guest.monitor.execute("stop")
    guest.begin_anew()
    guest.power = "off"
    return clean


async def _boot(guest: RunningGuest, timeouts: Timeouts, started: asyncio.Future[None], *, was_off: bool) -> None:
    """Let the guest boot from the beginning, and wait until it is ready. `started` is settled when it boots.

    The firmware (SeaBIOS on q35, observed) answers a reset with one of its own: it is let do so until the guest's own
    program says that it runs.
    """

    async def reset(client: QMPClient) -> None:
        await client.execute("system_reset")

    first_boot = guest.power == "on" and not guest.is_ready
    await guest.monitor.execute("set-action", {"reboot": "reset", "shutdown": "poweroff"})
    try:
        guest.begin_anew()
        if not await guest.monitor.until("RESET", reset, timeout_s=QMP_SECONDS):
            raise VTorqueError("QEMU does not reset the guest", code=Code.GUEST)
        if was_off:
            await guest.monitor.execute("cont")
        if not first_boot:  # else its agent waits for it still
            guest.power = "booting"
        if not started.done():
            started.set_result(None)
        await guest.booted(timeouts.boot)
    finally:
        await guest.monitor.execute("set-action", {"reboot": "shutdown"})
    if not first_boot:
        await guest.ready(timeouts.boot)
        guest.power = "on"
