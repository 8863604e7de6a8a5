"""The agent's local socket: who may ask for what, one JSON object a line.

The caller is known by the kernel's word (SO_PEERCRED): root or the job's owner. Operations: `status` (one answer),
`follow` (an answer now and after each change), `attach` (the job wrapper: as `follow`, and the job is over when the
connection breaks), `join` (as `status`; the caller and what it has started are the job's), `started` (the script runs
now), `end` (the job is over; with `status` its script's exit status).
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable
from typing import Callable, NamedTuple, Optional

from vmgr.logs import LOGGER
from vmgr.node.state import Progress

MAX_CLIENTS = 64
MAX_REQUEST_BYTES = 4096


class _Peer(NamedTuple):
    """Who connected, by the kernel's word."""

    pid: int
    uid: int


class Control:
    """Serves one attempt's socket. `over` is called when the job's own wrapper says, or shows, that the job is over,
    `attached` when it comes, `joined` with the pid of each process of the owner's that says it is the job's.
    """

    def __init__(
        self,
        progress: Progress,
        owner: int,
        *,
        over: Callable[[], None],
        attached: Callable[[], None],
        joined: Optional[Callable[[int], Awaitable[None]]] = None,
    ) -> None:
        self._progress = progress
        self._owner = owner
        self._over = over
        self._attached = attached
        self._joined = joined
        self._clients: set[asyncio.Task[None]] = set()

    async def serve(self, listener: socket.socket) -> asyncio.AbstractServer:
        return await asyncio.start_unix_server(self._accept, sock=listener, limit=MAX_REQUEST_BYTES)

    async def drain(self, timeout_s: float) -> None:
        """Wait until every client has got the last answer and left, or the time is over."""
        if self._clients:
            await asyncio.wait(set(self._clients), timeout=timeout_s)
        for client in self._clients:
            client.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        peer = _peer(writer)
        try:
            if peer.uid not in (0, self._owner):
                await _send(writer, {"error": f"this job belongs to uid {self._owner}, you are uid {peer.uid}"})
                return
            if peer.uid and len(self._clients) >= MAX_CLIENTS:
                await _send(writer, {"error": f"the agent of this job serves {MAX_CLIENTS} callers already"})
                return
            self._clients.add(task)
            await self._converse(reader, writer, peer)
        except (OSError, ValueError, RecursionError):
            pass  # it is gone, or speaks another language
        finally:
            self._clients.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: _Peer) -> None:
        follower: list[asyncio.Task[None]] = []
        attached = False
        try:
            while True:
                line = await reader.readline()
                if not line:
                    break
                request = json.loads(line)
                op = request.get("op") if isinstance(request, dict) else None
                if op in ("status", "join"):
                    if op == "join":
                        await self._join(peer)
                    await _send(writer, self._progress.full())
                elif op in ("follow", "attach") and not follower:
                    if op == "attach":
                        attached = True
                        self._attached()
                    follower.append(asyncio.ensure_future(self._follow(writer)))
                    if op == "attach":
                        await self._join(peer)
                elif op == "started":
                    if self._progress.state == "ready":
                        self._progress.stage("job started", "running")
                elif op == "end":
                    self._progress.ended_with(request.get("status"))
                    self._over()
                else:
                    await _send(writer, {"error": "the operations are status, follow, attach, join, started and end"})
        finally:
            for task in follower:
                task.cancel()
            if attached:
                LOGGER.debug("the job wrapper has left")
                self._over()

    async def _join(self, peer: _Peer) -> None:
        if self._joined is not None and peer.uid == self._owner:
            await self._joined(peer.pid)

    async def _follow(self, writer: asyncio.StreamWriter) -> None:
        try:
            async for _ in self._progress.changes():
                await _send(writer, self._progress.full())
        except OSError:
            pass


async def _send(writer: asyncio.StreamWriter, answer: dict[str, object]) -> None:
    writer.write(json.dumps(answer).encode() + b"\n")
    await writer.drain()


def _peer(writer: asyncio.StreamWriter) -> _Peer:
    peer = writer.get_extra_info("socket")
    given = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    pid, uid, _ = struct.unpack("iII", given)
    return _Peer(pid, uid)
