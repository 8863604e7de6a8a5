"""Connections to a port of the node, passed on to a guest's SSH port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable
from typing import Callable

from vmgr.logs import LOGGER

SSH_PORT = 22
MAX_CONNECTIONS = 128
"""At one time, to one guest; everybody on the node can connect. Further ones are closed at once."""
MAX_OF_NODE = 1024
"""The same for all guests of a job on a node, which share it: each takes two of the agent's descriptors."""
DIAL_SECONDS = 15.0
_CHUNK = 1 << 16

NewSocket = Callable[[], Awaitable[socket.socket]]
"""Makes an unconnected TCP socket where the guest can be reached."""


class Relay:
    """The way to one of so many `guests` of a node: any number of listening ports. Use `close` at the end."""

    def __init__(self, address: str, new_socket: NewSocket, guests: int = 1) -> None:
        self._address = address
        self._new_socket = new_socket
        self._servers: list[asyncio.AbstractServer] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._most = min(MAX_CONNECTIONS, max(1, MAX_OF_NODE // guests))

    async def listen(self, host: str, port: int) -> int:
        """Listen on a port, 0 for a free one; gives it. Raises OSError."""
        server = await asyncio.start_server(self._accept, host, port, limit=_CHUNK)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and break every connection; idempotent."""
        self._closed = True  # asyncio may still tell of one that was accepted before
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._servers.clear()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closed or len(self._tasks) >= self._most:
            writer.transport.abort()
            return
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on one connection, both ways, until both ends have said all."""
        try:
            there, back = await asyncio.wait_for(self._dial(), DIAL_SECONDS)
        except (OSError, asyncio.TimeoutError) as err:
            LOGGER.debug("no connection to %s: %s", self._address, err)
            writer.transport.abort()
            return
        except BaseException:
            writer.transport.abort()
            raise
        if self._closed:  # before Python 3.12 `wait_for` may swallow that this was cancelled
            writer.transport.abort()
            back.transport.abort()
            return
        ways = [asyncio.ensure_future(_copy(reader, back)), asyncio.ensure_future(_copy(there, writer))]
        try:
            await asyncio.gather(*ways)
            for end in (writer, back):
                end.close()
                await end.wait_closed()
        except OSError:
            pass  # one end broke the connection: so does the other
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            writer.transport.abort()
            back.transport.abort()

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        link = await self._new_socket()
        try:
            link.setblocking(False)
            await asyncio.get_running_loop().sock_connect(link, (self._address, SSH_PORT))
            return await asyncio.open_connection(sock=link, limit=_CHUNK)
        except BaseException:
            link.close()
            raise


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on one direction to its end, and the end."""
    while True:
        data = await reader.read(_CHUNK)
        if not data:
            break
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
