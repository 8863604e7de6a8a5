"""What this node's guests of a suspended job go on from: their files, opened where the job is stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.node import record
from vmgr.node.allocation import Allocation
from vmgr.node.guestjob import Job
from vmgr.node.incoming import SavedState
from vmgr.node.piping import sum_file
from vmgr.node.resuming import Ask, Resumption, find
from vmgr.node.staging.child import Channel, in_child
from vmgr.node.staging.copying import percent
from vmgr.node.staging.model import Disk, StageRequest
from vmgr.node.staging.saved import SavedOverlay, restore_overlays
from vmgr.node.user import User
from vmgr.suspended.entry import SavedGuest


async def find_suspended(
    config: Config, user: User, ask: Ask, allocation: Allocation, place: record.Place
) -> Optional[Resumption]:
    """What the job goes on from; None where it starts from its beginning. Raises VTorqueError (VT-SUSPEND)."""
    if config.suspended.folder is None:
        return None
    from vmgr.suspended.store import Store

    return await find(Store(config, user, place), ask, allocation)


async def open_states(job: Job, config: Config, opened: ExitStack) -> Sequence[SavedState]:
    """The saved states of the node's guests, by their number. Raises VTorqueError (VT-SUSPEND)."""
    part = job.part
    assert part is not None
    states = []
    for guest in part.guests:
        fd = await _open(job, f"{guest.rank}.state", guest.state_bytes, opened)
        check = partial(_check_state, job, config, guest, fd)
        states.append(SavedState(fd, part.qemu, float(config.timeouts.suspend), check))
    return states


async def _check_state(job: Job, config: Config, guest: SavedGuest, fd: int) -> None:
    """Refuse a state that is not as it was written. Raises VTorqueError: VT-SUSPEND, or VT-STAGE."""
    if guest.state_crc32 is None:
        return

    def work(channel: Channel) -> int:
        told = percent(f"reading the memory of {guest.name}", guest.state_bytes, channel.tell)
        return sum_file(fd, guest.state_bytes, told)

    silence_s = float(config.timeouts.suspend)
    found = await in_child(job.place, job.user, work, keep=[fd], tell=lambda _: None, silence_s=silence_s)
    if found.result != guest.state_crc32:
        raise VTorqueError(
            f"the memory of {guest.name} in the suspended job {job.job_id} is damaged: it is not what was stored",
            code=Code.SUSPEND,
            hint=f"`vmgr delete suspended --job {job.job_id}` removes it; the job starts from its beginning then",
        )


async def restore_disks(request: StageRequest, job: Job, disks: Sequence[Optional[Disk]]) -> None:
    """Fill the node's overlays, which are staged and empty. Raises VTorqueError (VT-SUSPEND, VT-STAGE)."""
    part = job.part
    assert part is not None
    targets, saved = [], []
    with ExitStack() as opened:
        for guest, disk in zip(part.guests, disks):
            if disk is not None and guest.overlay_bytes is not None:
                fd = await _open(job, f"{guest.rank}.qcow2", guest.overlay_bytes, opened)
                shown_as = f"the stored disk of {guest.name}"
                targets.append(disk.overlay)
                saved.append(SavedOverlay(fd, guest.overlay_bytes, shown_as))
        if targets:
            await restore_overlays(request, targets, saved)


async def _open(job: Job, name: str, size: int, opened: ExitStack) -> int:
    """A stored file, of this many bytes as was written down."""
    assert job.resumption is not None
    fd, found = await job.resumption.stored.open(job.job_id, name)
    opened.callback(os.close, fd)
    if found != size:
        raise VTorqueError(
            f"{name} of the suspended job {job.job_id} has {found} bytes, not {size}",
            code=Code.SUSPEND,
            hint=f"`vmgr delete suspended --job {job.job_id}` removes it; the job starts from its beginning then",
        )
    return fd
