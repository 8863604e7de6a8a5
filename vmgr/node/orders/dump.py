"""`dump`: a guest's memory written down for the analysis of a crash, as a file of the caller's.

QEMU writes into a pipe, and a child with the caller's rights from there into the file: so a dump can be broken off
(QEMU has no command for that: its pipe breaks, and the guest goes on), and QEMU, which is the user's, never has a file
of root's open.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.node.callersfile import CallersFile, callers_file, discard, note, working
from vmgr.node.control import Order, Talk
from vmgr.node.guestjob import Job
from vmgr.node.monitor import Monitor
from vmgr.node.orders.telling import Telling, as_answer, telling
from vmgr.node.orders.which import guest_of
from vmgr.node.piping import copy_pipe
from vmgr.node.resuming import state_bound
from vmgr.node.staging.child import Channel, Outcome, in_child
from vmgr.node.staging.copying import percent
from vmgr.node.staging.overlay import MIB

if TYPE_CHECKING:
    from vmgr.node.orders import CrewNow, JobNow

FORMATS = ("kdump-zlib", "elf")
"""As QEMU calls them; the first one is compressed."""
NAME = "dump"


def order(crew: CrewNow, job: JobNow, config: Config) -> Order:
    """The order `dump`: `rank`, `file` (a path), `format` (one of FORMATS)."""

    async def dump(talk: Talk) -> AsyncIterator[Mapping[str, Any]]:
        member, guest = guest_of(crew(), talk.request)
        running = job()
        assert running is not None, "there are no guests without a job"
        kind = talk.request.get("format", FORMATS[0])
        if not isinstance(kind, str) or kind not in FORMATS:
            raise VTorqueError(
                f"{kind!r} is no format of dumps", code=Code.VALUE, hint=f"possible: {', '.join(FORMATS)}"
            )
        if guest.power == "off":
            raise VTorqueError(
                f"the guest {member.name} is off", code=Code.GUEST, hint="`vmgr power on` switches it on again"
            )
        file = callers_file(talk.request, running.user, as_root=talk.peer.uid == 0)
        dumper = _Dumper(config, running, file)
        async with dumper.created(kind) as fd:
            yield {"doing": f"writing down the memory of {member.name}, which waits meanwhile"}
            async with dumper.written(guest.monitor, kind, fd) as told:
                async for text in told:
                    yield as_answer(text, dumper.ram_bytes)
                told.result()
            await _check_complete(guest.monitor)
            made = await dumper.finish(fd)
            yield {"file": file.path, "bytes": made}

    return dump


class _Dumper:
    """Writes one dump."""

    def __init__(self, config: Config, job: Job, file: CallersFile) -> None:
        self._config = config
        self._job = job
        self._file = file
        self.ram_bytes = job.group.ram_mib * MIB

    async def _in_child(self, work: Any, *keep: int, tell: Any = len) -> Outcome:
        return await in_child(
            self._job.place, self._file.user, work, keep=keep, tell=tell, silence_s=self._config.timeouts.boot
        )  # fmt: skip

    @asynccontextmanager
    async def created(self, kind: str) -> AsyncIterator[int]:
        """The partial file, open; nothing is left of it afterwards, unless it was finished."""
        file, least = self._file, self.ram_bytes if kind == "elf" else 0

        def create() -> int:
            fd = file.create()
            info = os.fstatvfs(fd)
            if info.f_bavail * info.f_frsize < least:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({least // MIB} MiB are needed)")
            return fd

        def give(channel: Channel) -> None:
            channel.give(working(file, create))

        note(self._job.place, file)
        try:
            with ExitStack() as opened:
                fds = (await self._in_child(give)).descriptors
                for fd in fds:
                    opened.callback(os.close, fd)
                yield fds[0]
        finally:
            await discard(self._job.place, file, timeout_s=float(self._config.timeouts.user_file))

    @asynccontextmanager
    async def written(self, monitor: Monitor, kind: str, fd: int) -> AsyncIterator[Telling]:
        """QEMU at work, and what the child says that writes what comes from it, until the last byte is there."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        most = state_bound(self._job.group.ram_mib)
        file = self._file

        def copy(channel: Channel) -> None:
            working(file, lambda: copy_pipe(read_end, fd, most, percent("writing", self.ram_bytes, channel.tell)))

        try:
            try:
                await _begin(monitor, kind, write_end)
            finally:
                os.close(write_end)
            async with telling(lambda tell: self._in_child(copy, read_end, fd, tell=tell)) as told:
                yield told
        finally:
            os.close(read_end)

    async def finish(self, fd: int) -> int:
        """Give the file its name; gives its size in bytes."""
        file = self._file
        size = (await self._in_child(lambda channel: working(file, lambda: file.finish(fd)), fd)).result
        return int(size)


async def _begin(monitor: Monitor, kind: str, write_end: int) -> None:
    """Have QEMU begin. Raises VTorqueError (VT-GUEST) with what it says."""
    await monitor.execute("getfd", {"fdname": NAME}, fd=write_end)
    try:
        await monitor.execute(
            "dump-guest-memory", {"paging": False, "protocol": f"fd:{NAME}", "format": kind, "detach": True}
        )
    except BaseException:
        with suppress(VTorqueError):
            await asyncio.shield(monitor.execute("closefd", {"fdname": NAME}))
        raise


async def _check_complete(monitor: Monitor) -> None:
    """Raise VTorqueError (VT-GUEST) unless QEMU says that it has written all: it says so before it closes the pipe."""
    state = await monitor.execute("query-dump")
    status = state.get("status") if isinstance(state, dict) else None
    if status != "completed":
        raise VTorqueError(f"QEMU could not write down all of the memory: {str(status)[:100]}", code=Code.GUEST)
