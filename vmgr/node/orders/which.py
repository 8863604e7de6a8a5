"""Which guest an order is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.node.crew import Crew
from vmgr.node.guest import RunningGuest
from vmgr.node.members import Member


def guest_of(crew: Optional[Crew], request: Mapping[str, Any]) -> tuple[Member, RunningGuest]:
    """The guest with the `rank` that a request names; the node's only one, or its first, where it names none.

    Raises VTorqueError: VT-GUEST while the node has no guests, VT-VALUE for a rank that is not on this node.
    """
    if crew is None:
        raise VTorqueError("there are no running guests on this node", code=Code.GUEST, hint="`vmgr ps` shows them")
    rank = request.get("rank")
    pairs = list(zip(crew.members, crew.guests))
    if rank is None:
        return pairs[0]
    found = next((pair for pair in pairs if pair[0].rank == rank and type(rank) is int), None)
    if found is None:
        here = ", ".join(str(member.rank) for member, _ in pairs)
        raise VTorqueError(f"rank {rank!r} is not on this node", code=Code.VALUE, hint=f"here: {here}")
    return found
