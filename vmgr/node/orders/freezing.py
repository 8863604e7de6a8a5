"""A guest's disk at rest for a moment: the guest itself writes what it has and stops writing, then goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Optional

from vmgr.errors import Code, VTorqueError
from vmgr.node.guest import RunningGuest

FREEZE_SECONDS = 60.0
THAW_SECONDS = 10.0
MAX_REASON = 200


@asynccontextmanager
async def frozen(guest: RunningGuest) -> AsyncIterator[Optional[str]]:
    """The guest has written all to its disk, and writes no more as long as this lasts; it ends that by itself in time.

    Gives None, or why its file system does not stand still, and has only been written out. Raises VTorqueError
    (VT-GUEST) when the guest does not obey, and at the end when it has not waited for it.
    """
    if not guest.is_ready:
        raise VTorqueError(f"the guest {guest.name} is not ready yet", code=Code.GUEST, hint="wait for `ready`")
    try:
        answer = await guest.ask("freeze", FREEZE_SECONDS)
        if answer is None:
            raise VTorqueError(
                f"the guest {guest.name} did not write out its disk within {FREEZE_SECONDS:g} s",
                code=Code.GUEST,
                hint="--no-freeze takes the disk as it is, as after a power failure",
            )
        yield (answer.text.strip()[-MAX_REASON:] or "it cannot") if answer.status else None
    except BaseException:
        guest.tell("thaw")
        raise
    thawed = await asyncio.shield(guest.ask("thaw", THAW_SECONDS))
    if answer.status == 0 and thawed is not None and thawed.status:
        raise VTorqueError(
            f"the guest {guest.name} went on writing before the copy began", code=Code.GUEST, hint="try again"
        )
