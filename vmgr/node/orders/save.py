"""`save`: a guest's disk as it is now, as an image in the pool, which root asks for, or as a file of the caller's."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import NAME, Pool
from vmgr.node.callersfile import CallersFile, callers_file, discard, note, working
from vmgr.node.control import Order, Talk
from vmgr.node.guest import RunningGuest
from vmgr.node.guestjob import Job
from vmgr.node.members import Member
from vmgr.node.orders.diskcopy import disk_copy, overlay_bytes
from vmgr.node.orders.freezing import frozen
from vmgr.node.orders.publishing import Saved, publish_saved
from vmgr.node.orders.room import have_room, most_bytes, unnamed_disk
from vmgr.node.orders.telling import Tell, as_answer, telling
from vmgr.node.orders.which import guest_of
from vmgr.node.staging.chain import MAX_LAYERS, chain_of
from vmgr.node.staging.child import Channel, in_child
from vmgr.node.staging.copying import copy_data, percent
from vmgr.node.staging.overlay import MIB, empty_overlay, fill_overlay
from vmgr.node.userio import open_file

if TYPE_CHECKING:
    from vmgr.node.orders import CrewNow, JobNow

MAX_DESCRIPTION = 300


class Wish(NamedTuple):
    """What the caller asks for: a new revision of the image `name`, or the file `file`.

    `whole` is a disk that stands alone, else a layer on the guest's image; `freezes` whether the guest is asked to
    write its file systems out before.
    """

    member: Member
    guest: RunningGuest
    name: Optional[str]
    description: str
    file: Optional[CallersFile]
    whole: bool
    freezes: bool


def order(crew: CrewNow, job: JobNow, config: Config) -> Order:
    """The order `save`: `rank`, `name` or `file`, `layer` and `freeze` (booleans), `description`."""
    saver = _Saver(config)

    async def save(talk: Talk) -> AsyncIterator[Mapping[str, Any]]:
        member, guest = guest_of(crew(), talk.request)
        running = job()
        assert running is not None, "there are no guests without a job"
        wish = wish_of(talk, running, config, member, guest)
        with saver.alone(guest.name):
            async for answer in saver.save(running, wish):
                yield answer

    return save


def wish_of(talk: Talk, job: Job, config: Config, member: Member, guest: RunningGuest) -> Wish:
    """What is asked for, where it may be. Raises VTorqueError."""
    request, as_root = talk.request, talk.peer.uid == 0
    if job.image.disk is None:
        raise VTorqueError(
            f"the image {job.image.name} has no disk: it lives in memory, and nothing of it can be saved",
            code=Code.IMAGE,
            hint="vmgr dump writes down the memory of a guest",
        )
    name, description = request.get("name"), request.get("description", "")
    whole, freezes = not request.get("layer", False), request.get("freeze", True)
    if not isinstance(description, str) or len(description) > MAX_DESCRIPTION or not description.isprintable():
        raise VTorqueError(f"a description has one line of up to {MAX_DESCRIPTION} characters", code=Code.VALUE)
    if name is None:
        if not whole:
            raise VTorqueError("a layer is of use only in the pool", code=Code.VALUE, hint="save the whole disk")
        return Wish(member, guest, None, "", callers_file(request, job.user, as_root=as_root), True, bool(freezes))
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise VTorqueError(f"illegal image name {name!r}", code=Code.IMAGE, hint=f"a name looks like {NAME}")
    if not as_root:
        raise VTorqueError(
            "the pool belongs to root", code=Code.ACCESS, hint="save the disk to a file of your own: --to FILE"
        )
    if not whole and job.image.is_own:
        raise VTorqueError(
            f"{job.image.name} lies in no pool, so nothing can be a layer on it",
            code=Code.IMAGE,
            hint="save it with --flat",
        )
    if not whole and len(chain_of(Pool(config.images.pool), job.image)) >= MAX_LAYERS:
        raise VTorqueError(
            f"{job.image.reference} is {MAX_LAYERS} layers already", code=Code.IMAGE, hint="save it with --flat"
        )
    if not description:
        description = f"saved from {job.job_id}, {member.name} ({job.image.reference})"
    return Wish(member, guest, name, description, None, whole, bool(freezes))


class _Saver:
    """Saves the disks of a node's guests, each one at a time."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._busy: set[str] = set()

    @contextmanager
    def alone(self, guest: str) -> Iterator[None]:
        """One at a time for each guest. Raises VTorqueError (VT-GUEST)."""
        if guest in self._busy:
            raise VTorqueError(f"the disk of {guest} is being saved already", code=Code.GUEST)
        self._busy.add(guest)
        try:
            yield
        finally:
            self._busy.discard(guest)

    async def save(self, job: Job, wish: Wish) -> AsyncIterator[Mapping[str, Any]]:
        """Say what is being done, and at last what was made."""
        monitor, size = wish.guest.monitor, job.image.virtual_size
        empty = await empty_overlay(size)
        async with AsyncExitStack() as opened:
            yield {"doing": "asking the guest to write out its disk"}
            async with self._at_rest(wish) as unfrozen:
                most = most_bytes(size) if wish.whole else _layer_bytes(size, await overlay_bytes(monitor))
                target = await opened.enter_async_context(self._target(job, wish, empty, most))
                copying = await opened.enter_async_context(AsyncExitStack())
                steps = await copying.enter_async_context(disk_copy(monitor, target, whole=wish.whole))
            if unfrozen is not None:
                yield {"warning": f"the copy is as a disk after a power failure, not frozen: {unfrozen}"}
            async for copied in steps:
                yield {"doing": "copying the disk", **copied._asdict()}
            await copying.aclose()
            async with telling(lambda tell: self._keep(job, wish, target, tell)) as told:
                async for text in told:
                    yield as_answer(text, os.fstat(target).st_size)
            yield told.result()

    @asynccontextmanager
    async def _at_rest(self, wish: Wish) -> AsyncIterator[Optional[str]]:
        """The guest frozen, where that is wished; gives why it is not."""
        if not wish.freezes:
            yield "nobody asked the guest"
            return
        async with frozen(wish.guest) as unfrozen:
            yield unfrozen

    @asynccontextmanager
    async def _target(self, job: Job, wish: Wish, empty: bytes, most: int) -> AsyncIterator[int]:
        """The file that QEMU writes, open: the owner's own, or one that only root keeps the content of."""
        file = wish.file
        if file is None or file.user is None:
            with unnamed_disk(self._config, job.place, wish.guest.name, empty, most) as fd:
                yield fd
            return
        timeout_s = float(self._config.timeouts.user_file)
        note(job.place, file)
        try:
            fd = await open_file(
                file.user, lambda: _create(file, empty, most), file.path, timeout_s=timeout_s, code=Code.STAGE
            )  # fmt: skip
            try:
                yield fd
            finally:
                os.close(fd)
        finally:
            await discard(file, timeout_s=timeout_s)

    async def _keep(self, job: Job, wish: Wish, disk: int, tell: Tell) -> Mapping[str, Any]:
        """Have a child give the complete copy its place, now that QEMU has let go of it."""
        file, limit = wish.file, most_bytes(job.image.virtual_size)

        def publish(channel: Channel) -> Mapping[str, Any]:
            os.umask(0o022)  # everybody may read the pool
            saved = Saved(str(wish.name), wish.description, job.image, wish.whole)
            pool = Pool(self._config.images.pool)
            made = publish_saved(pool, disk, saved, most=limit, tell=channel.tell, wait=channel.wait)
            return {"image": made.reference}

        def finish(channel: Channel) -> Mapping[str, Any]:
            assert file is not None
            channel.wait("writing it to its disk")
            return {"file": file.path, "bytes": working(file, lambda: file.finish(disk))}

        def copy(channel: Channel) -> Mapping[str, Any]:
            assert file is not None
            size = min(os.fstat(disk).st_size, limit)

            def write() -> int:
                fd = file.create()
                copy_data(disk, fd, size, percent("writing", size, channel.tell))
                channel.wait("writing it to its disk")
                return file.finish(fd)

            return {"file": file.path, "bytes": working(file, write)}

        as_root = file is not None and file.user is None
        if as_root:
            assert file is not None
            note(job.place, file)
        try:
            outcome = await in_child(
                job.place,
                file.user if file is not None else None,
                publish if file is None else copy if as_root else finish,
                keep=[disk],
                tell=tell,
                silence_s=self._config.timeouts.boot,
            )
        finally:
            if as_root and file is not None:
                await discard(file, timeout_s=float(self._config.timeouts.user_file))
        result: Mapping[str, Any] = outcome.result
        return result


def _create(file: CallersFile, empty: bytes, most: int) -> int:
    """In a child with the owner's rights: the empty disk, with room for what it may become."""
    fd = file.create()
    try:
        fill_overlay(fd, empty)
        have_room(fd, most)
    except BaseException:
        file.remove()
        raise
    return fd


def _layer_bytes(virtual_size: int, overlay: int) -> int:
    """What a copy of an overlay may take that takes `overlay` bytes: clusters that are new in between are in it."""
    return min(most_bytes(virtual_size), overlay + overlay // 8 + 64 * MIB)
