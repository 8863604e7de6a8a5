"""A node's guests on their way into the store for suspended jobs, and back to their work where that comes to nothing.

QEMU saves no guest with a mounted share, and lets go of its disks when it has written its state: so the guest lets go
of its shares first, is stopped, its disk is copied, and its state goes last. `cont` lets a guest go on after each of
these steps (observed on QEMU 7.2). All that guests and QEMU say is the user's word; it is bounded in size and time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import Any, Callable, Optional, Protocol, TypeVar

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image
from vmgr.logs import LOGGER
from vmgr.node import record
from vmgr.node.crew import Crew
from vmgr.node.guest import RunningGuest
from vmgr.node.guestjob import Job
from vmgr.node.incoming import shown_version
from vmgr.node.members import Member
from vmgr.node.monitor import MAX_REASON, QUARREL, Monitor
from vmgr.node.orders.diskcopy import disk_copy, overlay_bytes
from vmgr.node.orders.telling import Tell
from vmgr.node.piping import Sum, copy_pipe
from vmgr.node.process import resident_bytes
from vmgr.node.resuming import state_bound
from vmgr.node.staging.child import Channel, in_child
from vmgr.node.staging.copying import percent
from vmgr.node.staging.overlay import MIB, empty_overlay, fill_overlay
from vmgr.node.waiting import all_of, every, within
from vmgr.suspended.entry import Entry, NodePart, SavedGuest
from vmgr.topology.model import Layout

NAME = "suspend"
QUIESCE_SECONDS = 120.0
"""For a guest to write out what its shares and its persistent disk are to have, and to let go of them."""
MOUNT_SECONDS = 300.0
"""To take them back, also where it has still been busy with letting go of them."""
CANCEL_SECONDS = 20.0
BANDWIDTH = 1 << 40
"""Bytes a second that QEMU may write, where nothing is to be left for a guest that runs (its default is 2^27)."""
MAX_EVENTS = 100
MAX_HOLDERS = 1000
"""Characters of what a guest says holds its shares."""

_T = TypeVar("_T")


class Storing(Protocol):
    """Where a job is stored that is being suspended; see `vmgr.suspended.store`."""

    async def begin(self, job_id: str, *, need_bytes: int) -> None: ...

    async def create(self, job_id: str, name: str) -> int: ...

    async def write_part(self, job_id: str, part: NodePart) -> None: ...

    async def complete(self, job_id: str, entry: Entry) -> None: ...

    async def claim(self, job_id: str) -> bool: ...

    async def drop(self, job_id: str) -> None: ...

    async def remove(self, job_id: str) -> None: ...

    def mark(self, job_id: str, entry: Entry, word: str) -> None: ...


class NodeGuests:
    """The guests of one node, which are stopped, saved, and let go on, in this order.

    `save_s` is in seconds, for all of them together.
    """

    def __init__(self, job: Job, crew: Crew, store: Storing, *, save_s: float) -> None:
        self._job = job
        self._crew = crew
        self._store = store
        self._save_s = save_s
        self._tell: Tell = lambda text: None
        self._touched = False

    async def check(self) -> int:
        """The bytes that what is stored of these guests may take, by what they have now.

        Raises VTorqueError (VT-SUSPEND) when one of them is not there to be suspended.
        """
        self._check_guests()
        if self._job.place.record.stat().st_size > record.MAX_RECORD_BYTES // 2:
            raise _cannot("too much has been tried with the guests of this job already", "submit a new job")
        ram, total = self._job.group.ram_mib * MIB, 0
        for guest in self._crew.guests:
            total += min(ram, resident_bytes(guest.pid)) + MIB
            if _has_disk(self._job.image):
                total += await overlay_bytes(guest.monitor)
        return total

    async def stop(self, tell: Tell) -> None:
        """Have all guests let go of their shares, and stop them. Raises VTorqueError (VT-SUSPEND, VT-GUEST)."""
        self._check_guests()
        self._touched = True
        tell("asking the guests to let go of their shares")
        guests = self._crew.guests
        await all_of(*map(_quiesce, guests))
        await every(*(guest.monitor.execute("stop") for guest in guests))

    async def save(self, tell: Tell) -> None:
        """Write disks and states of all guests, which are stopped, and this node's part. Raises VTorqueError."""
        self._tell = tell
        try:
            await within(self._save_s, self._save())
        except asyncio.TimeoutError:
            raise _cannot(
                f"the guests were not stored within {self._save_s:g} s", "is the store fast enough? timeouts.suspend"
            ) from None

    async def go_on(self) -> None:
        """Let all guests go on that were asked to stop, with their shares.

        Raises VTorqueError (VT-GUEST) when one of them does not: the job cannot go on then.
        """
        if not self._touched:
            return
        try:
            await every(*(guest.monitor.execute("cont") for guest in self._crew.guests))
            await every(*map(_mount, self._crew.guests))
        except VTorqueError:
            self._touched = False  # what has failed is not tried again; what was given up is
            raise
        self._touched = False

    def _check_guests(self) -> None:
        for guest in self._crew.guests:
            if guest.power != "on" or not guest.is_ready:
                state = "off" if guest.power == "off" else "not ready"
                raise _cannot(f"the guest {guest.name} is {state}", "wait until it is ready; `vmgr power on` starts it")

    async def _save(self) -> None:
        saved = []
        for index, (member, guest) in enumerate(zip(self._crew.members, self._crew.guests)):
            self._tell(f"storing {guest.name}")
            overlay = await self._naming(guest, self._save_disk(member, guest))
            state, crc32 = await self._naming(guest, self._save_state(member, guest))
            layout = unbound(self._crew.layouts[index])
            address = member.address
            saved.append(SavedGuest(member.rank, member.name, member.mac, address, layout, state, overlay, crc32))
        host_key = " ".join(self._crew.host_key.public.split()[:2])
        part = await describe(self._crew.guests[0].monitor, self._job.allocation.node_index, host_key, saved)
        await self._store.write_part(self._job.job_id, part)

    async def _naming(self, guest: RunningGuest, work: Coroutine[Any, Any, _T]) -> _T:
        """What `work` gives, unless the guest dies meanwhile: QEMU's connection tells that nobody who waits for it."""
        try:
            return await _while_it_lives(guest, work)
        except VTorqueError as err:
            raise _cannot(f"the guest {guest.name} cannot be stored: {err.message}", err.hint) from err

    async def _in_child(self, work: Callable[[Channel], _T], *keep: int) -> _T:
        outcome = await in_child(
            self._job.place, self._job.user, work, keep=keep, tell=self._tell, silence_s=self._save_s
        )  # fmt: skip
        result: _T = outcome.result
        return result

    async def _save_disk(self, member: Member, guest: RunningGuest) -> Optional[int]:
        """Copy the guest's overlay, as a layer; gives its size in bytes, None for a guest without a disk."""
        if not _has_disk(self._job.image):
            return None
        empty = await empty_overlay(self._job.image.virtual_size)
        fd = await self._store.create(self._job.job_id, f"{member.rank}.qcow2")
        try:
            await self._in_child(lambda _: fill_overlay(fd, empty), fd)
            async with disk_copy(guest.monitor, fd, whole=False) as steps:
                async for copied in steps:
                    share = 100 * copied.so_far // max(copied.total, 1)
                    self._tell(f"storing the disk of {guest.name} {min(max(share, 0), 100)} %")
            return await self._in_child(lambda _: _settle(fd), fd)
        finally:
            os.close(fd)

    async def _save_state(self, member: Member, guest: RunningGuest) -> tuple[int, int]:
        """Have QEMU write the guest's state into a pipe, and a child from there into the store.

        Gives its size in bytes, and its checksum.
        """
        ram = self._job.group.ram_mib * MIB
        most = state_bound(self._job.group.ram_mib)
        fd = await self._store.create(self._job.job_id, f"{member.rank}.state")
        read_end, write_end = os.pipe2(os.O_CLOEXEC)

        def copy(channel: Channel) -> tuple[int, int]:
            found = Sum()
            told = percent(f"storing the memory of {guest.name}", ram, channel.tell)
            copy_pipe(read_end, fd, most, told, found.add)
            return _settle(fd), found.value

        migrating: Optional[asyncio.Future[None]] = None
        try:
            try:
                await guest.monitor.execute("getfd", {"fdname": NAME}, fd=write_end)
            finally:
                os.close(write_end)
            migrating = asyncio.ensure_future(_migrate(guest.monitor))
            (size, crc32), _ = await every(self._in_child(copy, read_end, fd), migrating)
            return int(size), int(crc32)
        finally:
            os.close(read_end)  # a QEMU that still writes hears of it
            os.close(fd)
            if migrating is not None and (migrating.cancelled() or migrating.exception() is not None):
                await _cancel(guest.monitor)


async def _quiesce(guest: RunningGuest) -> None:
    """Have a guest let go of its shares and its persistent disk. Raises VTorqueError with who holds them."""
    answer = await guest.ask("quiesce", QUIESCE_SECONDS)
    if answer is None:
        raise _cannot(
            f"the guest {guest.name} did not let go of its shares within {QUIESCE_SECONDS:g} s", "is it stuck?"
        )
    if answer.status:
        holders = "; ".join(line.strip() for line in answer.text.splitlines() if line.strip())[:MAX_HOLDERS]
        raise _cannot(
            f"the guest {guest.name} cannot let go of its shares"
            + (f", they are in use: {holders}" if holders else ""),
            "close what is open there, and leave these directories",
        )


async def _while_it_lives(guest: RunningGuest, work: Coroutine[Any, Any, _T]) -> _T:
    working, dying = asyncio.ensure_future(work), asyncio.ensure_future(guest.died())
    tasks: list[asyncio.Future[Any]] = [working, dying]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if working.cancelled():
        dying.result()
    return working.result()


async def _mount(guest: RunningGuest) -> None:
    """Have a guest take its shares back. Raises VTorqueError (VT-GUEST)."""
    answer = await guest.ask("mount", MOUNT_SECONDS)
    if answer is None or answer.status:
        why = "does not answer" if answer is None else f"cannot mount them: {answer.text.strip()[-MAX_REASON:]}"
        raise VTorqueError(f"the guest {guest.name} goes on without its shares: it {why}", code=Code.GUEST)


async def _migrate(monitor: Monitor) -> None:
    """Have QEMU write its state to what it has as NAME, and wait until it says that all is there.

    The guest is stopped before, and stays so. Raises VTorqueError (VT-GUEST).
    """
    events = {"capabilities": [{"capability": "events", "state": True}]}
    try:
        async with monitor.talk() as client:
            await client.execute("migrate-set-capabilities", events)
            await client.execute("migrate-set-parameters", {"max-bandwidth": BANDWIDTH})
            with client.listener("MIGRATION") as listener:
                await client.execute("migrate", {"uri": f"fd:{NAME}"})
                for _ in range(MAX_EVENTS):
                    event: Any = await listener.get()
                    status = event["data"]["status"]
                    if status == "completed":
                        return
                    if status in ("failed", "cancelled"):
                        break
            said: Any = await client.execute("query-migrate")
            reason = said.get("error-desc") if isinstance(said, dict) else None
            raise ValueError(str(reason or "it gives no reason"))
    except QUARREL as err:
        raise VTorqueError(f"QEMU cannot write its state: {str(err)[:MAX_REASON]}", code=Code.GUEST) from err


async def _cancel(monitor: Monitor) -> None:
    """Have QEMU give up writing its state, and wait, within a bound, until it has: the guest can go on only then."""

    async def wait() -> None:
        async with monitor.talk() as client:
            with client.listener("MIGRATION") as listener:
                await client.execute("migrate_cancel")
                for _ in range(MAX_EVENTS):
                    said = await client.execute("query-migrate")
                    if not isinstance(said, dict) or said.get("status") not in (
                        "setup",
                        "active",
                        "cancelling",
                        "device",
                    ):
                        return
                    await listener.get()

    try:
        await within(CANCEL_SECONDS, wait())
    except (asyncio.TimeoutError, *QUARREL) as err:
        LOGGER.warning("QEMU does not give up writing its state: %s", str(err)[:MAX_REASON] or "it says nothing")
    with suppress(VTorqueError):
        await monitor.execute("closefd", {"fdname": NAME})


async def describe(monitor: Monitor, node: int, host_key: str, guests: Iterable[SavedGuest]) -> NodePart:
    """The part of a node whose guests have been saved. Raises VTorqueError (VT-GUEST)."""
    kvm, version = await monitor.execute("query-kvm"), await monitor.execute("query-version")
    try:
        accelerator = "kvm" if kvm["enabled"] is True else "tcg"
        return NodePart(node, host_key, accelerator, shown_version(version), tuple(guests))
    except QUARREL as err:
        raise VTorqueError("QEMU does not say what it is", code=Code.GUEST) from err


def unbound(layout: Layout) -> Layout:
    """The layout as its guest sees it, bound to no NUMA node of a host."""
    return layout._replace(cells=tuple(cell._replace(host_node=None) for cell in layout.cells))


def _settle(fd: int) -> int:
    """In a child: have all of a file on its disk; gives its size in bytes. Raises OSError."""
    os.fsync(fd)
    return os.fstat(fd).st_size


def _has_disk(image: Image) -> bool:
    return image.disk is not None


def _cannot(text: str, hint: Optional[str] = None) -> VTorqueError:
    return VTorqueError(text, code=Code.SUSPEND, hint=hint)
