"""A guest's QMP connection over the guest's whole life: read while something is asked, else left alone.

QEMU is the user's, and what it sends is the user's word. While nobody waits for an answer nothing is read, so that a
QEMU that floods its monitor keeps no one busy but itself; answers are bounded in size and time.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Callable, Optional

from qemu.qmp import QMPClient, QMPError

from vmgr.errors import Code, VTorqueError
from vmgr.logs import LOGGER

MAX_REPLY_BYTES = 1 << 20
CLOSE_SECONDS = 2.0
MAX_REASON = 300
QUARREL = (QMPError, OSError, EOFError, ValueError, KeyError, TypeError, OverflowError)
"""What a QEMU that does not speak QMP, or says what cannot be, leads to."""


class _Client(QMPClient):
    """A client whose socket can be left unread."""

    def pause(self) -> None:
        if self._writer is not None:
            self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    def resume(self) -> None:
        if self._writer is not None:
            self._writer.transport.resume_reading()  # type: ignore[attr-defined]

    def abort(self) -> None:
        """Break the connection: nothing more is sent, and nobody waits for the other side to take it."""
        if self._writer is not None:
            self._writer.transport.abort()


class Monitor:
    """The QMP of one guest, one talk at a time."""

    def __init__(self) -> None:
        self._client = _Client("guest", readbuflen=MAX_REPLY_BYTES)
        self._client.events.event_filter = lambda _: False  # nobody reads them: they would pile up
        self._turn = asyncio.Lock()

    async def connect(self, connection: socket.socket) -> None:
        """Take over the connected socket and negotiate. Raises what `QUARREL` lists."""
        await self._client.connect(connection)

    @asynccontextmanager
    async def talk(self) -> AsyncIterator[QMPClient]:
        """The client, for this caller alone and read while the talk lasts."""
        async with self._turn:
            self._client.resume()
            try:
                yield self._client
            finally:
                self._client.pause()

    async def execute(
        self,
        command: str,
        arguments: Optional[Mapping[str, Any]] = None,
        *,
        timeout_s: float = 10.0,
        fd: Optional[int] = None,
    ) -> Any:
        """The answer to one command; `fd` goes along with it, for those that take a descriptor (add-fd, getfd).

        Raises VTorqueError (VT-GUEST) with what QEMU says, or that it says nothing.
        """

        async def ask() -> Any:
            async with self.talk() as client:
                if fd is not None:
                    client.send_fd_scm(fd)
                return await client.execute(command, None if arguments is None else dict(arguments))

        try:
            return await asyncio.wait_for(ask(), timeout_s)
        except asyncio.TimeoutError:
            raise VTorqueError(
                f"QEMU did not answer {command} within {timeout_s:g} s", code=Code.GUEST, hint="is the guest stuck?"
            ) from None
        except QUARREL as err:
            raise VTorqueError(f"QEMU refuses {command}: {str(err)[:MAX_REASON]}", code=Code.GUEST) from err

    async def until(self, event: str, cause: Callable[[QMPClient], Awaitable[object]], *, timeout_s: float) -> bool:
        """Do what leads to an event of QEMU's, and wait for that; false when it does not come in time.

        The connection is read meanwhile. Raises VTorqueError (VT-GUEST) when QEMU refuses, or speaks something else.
        """

        async def wait() -> None:
            async with self.talk() as client:
                with client.listener(event) as listener:
                    await cause(client)
                    await listener.get()

        try:
            await asyncio.wait_for(wait(), timeout_s)
            return True
        except asyncio.TimeoutError:
            return False
        except QUARREL as err:
            raise VTorqueError(f"QEMU refuses: {str(err)[:MAX_REASON]}", code=Code.GUEST) from err

    async def close(self) -> None:
        """Give the connection back; QEMU must have ended. Its user may have its end of it still, and take nothing."""
        self._client.abort()
        try:
            await asyncio.wait_for(self._client.disconnect(), CLOSE_SECONDS)
        except Exception as err:  # what has ended the reading comes out here, whatever QEMU sent to do so
            LOGGER.debug("the end of a QMP connection: %s", err)
