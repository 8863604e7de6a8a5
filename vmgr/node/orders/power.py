"""`power`: a guest's reset button and switch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from vmgr.errors import Code, VTorqueError
from vmgr.node.control import Order, Talk
from vmgr.node.orders.which import guest_of

if TYPE_CHECKING:
    from vmgr.node.orders import CrewNow

COMMANDS = {"reset": "system_reset", "off": "system_powerdown"}
"""What each action is in QMP."""


def order(crew: CrewNow) -> Order:
    """The order `power`: `action` is one of COMMANDS, `rank` names the guest."""

    async def power(talk: Talk) -> AsyncIterator[Mapping[str, Any]]:
        action = talk.request.get("action")
        if not isinstance(action, str) or action not in COMMANDS:
            raise VTorqueError(
                f"{action!r} is nothing that can be done to a guest's power",
                code=Code.VALUE,
                hint=f"possible: {', '.join(COMMANDS)}",
            )
        member, guest = guest_of(crew(), talk.request)
        await guest.monitor.execute(COMMANDS[action])
        yield {"guest": member.name, "rank": member.rank}

    return power
