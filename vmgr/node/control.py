"""The agent's local socket: who may ask for what, one JSON object a line.

The caller is known by the kernel's word (SO_PEERCRED): root or the job's owner. Operations: `status` (one answer),
`follow` (an answer now and after each change), `attach` (the job wrapper: as `follow`, and the job is over when the
connection breaks), `join` (as `status`; the caller and what it has started are the job's), `started` (the script runs
now), `detached` (the script's session has been left for `try`, or `error` says why it cannot be), `end` (the job is
over; `status` is its script's exit status). Any other is an order to the guests (`Order`): what it answers, answer by
answer, is followed by `{"done": true}`, or by `error` and `code` where it fails; an order ends when its caller goes.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from typing import Any, Callable, NamedTuple, Optional

from vmgr.errors import VTorqueError
from vmgr.logs import LOGGER
from vmgr.node.state import Progress

MAX_CLIENTS = 64
MAX_REQUEST_BYTES = 4096
MAX_WAITING = 16
REFUSAL_SECONDS = 1.0
MAX_REFUSALS = 16
"""So many are told why at one time; others are turned away without a word. Everybody on the node may connect."""


class Peer(NamedTuple):
    """Who connected, by the kernel's word."""

    pid: int
    uid: int


class Talk:
    """One order's side of its connection: who gave it, what it says, and what the caller sends meanwhile."""

    def __init__(self, peer: Peer, request: Mapping[str, Any]) -> None:
        self.peer = peer
        self.request = request
        self._more: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue(MAX_WAITING)

    async def more(self) -> Mapping[str, Any]:
        """The caller's next request, which is this order's matter."""
        return await self._more.get()

    async def hear(self, request: Mapping[str, Any]) -> None:
        """Keep a request for the order; who sends faster than it is taken waits."""
        await self._more.put(request)


Order = Callable[[Talk], AsyncIterator[Mapping[str, Any]]]
"""What carries out one operation on the guests: an asynchronous generator of answers. Raises VTorqueError."""


class Control:
    """Serves one attempt's socket. `over` is called when the job's own wrapper says, or shows, that the job is over,
    `attached` when it comes, `named` with what it says as `member`, `joined` with the pid of each process of the
    owner's that says it is the job's, `detached` with what is said as `try` and `error`; `started` with what is said as
    `error` when the script starts, where that is not all that there is to it. `orders` has the operations on the
    guests, by name.
    """

    def __init__(
        self,
        progress: Progress,
        owner: int,
        *,
        over: Callable[[], None],
        attached: Callable[[], None],
        joined: Optional[Callable[[int], Awaitable[None]]] = None,
        detached: Callable[[object, object], None] = lambda number, error: None,
        named: Callable[[object], None] = lambda member: None,
        started: Optional[Callable[[object], None]] = None,
        orders: Optional[Mapping[str, Order]] = None,
    ) -> None:
        self._progress = progress
        self._owner = owner
        self._over = over
        self._attached = attached
        self._joined = joined
        self._detached = detached
        self._named = named
        self._started = started or (lambda error: progress.stage("job started", "running"))
        self._orders = orders or {}
        self._clients: set[asyncio.Task[None]] = set()
        self._refusals = 0

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
                text = f"this job belongs to uid {self._owner}, you are uid {peer.uid}"
                return await self._refuse(reader, writer, text)
            if peer.uid and len(self._clients) >= MAX_CLIENTS:
                text = f"the agent of this job serves {MAX_CLIENTS} callers already"
                return await self._refuse(reader, writer, text)
            self._clients.add(task)
            await self._converse(reader, writer, peer)
        except (OSError, ValueError, RecursionError):
            pass  # it is gone, or speaks another language
        finally:
            self._clients.discard(task)
            writer.close()
            if writer.transport.get_write_buffer_size():  # it takes nothing, and would keep the descriptor for ever
                writer.transport.abort()

    async def _refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str) -> None:
        """Say why, and let the caller read it: what it has sent and nobody has read would take that away from it."""
        if self._refusals >= MAX_REFUSALS:
            return
        self._refusals += 1
        try:
            await _send(writer, {"error": text})
            writer.write_eof()
            await asyncio.wait_for(reader.read(MAX_REQUEST_BYTES), REFUSAL_SECONDS)
        except asyncio.TimeoutError:
            pass
        finally:
            self._refusals -= 1

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: Peer) -> None:
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
                        self._named(request.get("member"))
                    follower.append(asyncio.ensure_future(self._follow(writer)))
                    if op == "attach":
                        await self._join(peer)
                elif op == "started":
                    if self._progress.state == "ready":
                        self._started(request.get("error"))
                elif op == "detached":
                    self._detached(request.get("try"), request.get("error"))
                elif op == "end":
                    self._progress.ended_with(request.get("status"))
                    self._over()
                elif isinstance(op, str) and op in self._orders:
                    await self._obey(reader, writer, Talk(peer, request))
                else:
                    known = ["status", "follow", "attach", "join", "started", "detached", "end", *self._orders]
                    await _send(writer, {"error": f"the operations are {', '.join(known)}"})
        finally:
            for task in follower:
                task.cancel()
            if attached:
                LOGGER.debug("the job wrapper has left")
                self._over()

    async def _obey(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, talk: Talk) -> None:
        """Carry out an order to its end, or until its caller has gone."""
        carrying_out = asyncio.ensure_future(self._carry_out(writer, talk))
        hearing = asyncio.ensure_future(_hear(reader, talk))
        try:
            await asyncio.wait([carrying_out, hearing], return_when=asyncio.FIRST_COMPLETED)
            if carrying_out.done():
                carrying_out.result()
        finally:
            for task in (carrying_out, hearing):
                task.cancel()
            await asyncio.gather(carrying_out, hearing, return_exceptions=True)

    async def _carry_out(self, writer: asyncio.StreamWriter, talk: Talk) -> None:
        name = talk.request["op"]
        LOGGER.info("%s, asked for by uid %d", name, talk.peer.uid)
        answers = self._orders[name](talk)
        try:
            async for answer in answers:
                await _send(writer, answer)
        except VTorqueError as err:
            LOGGER.warning("%s: %s", name, err)
            await _send(writer, {"error": err.detail, "code": err.code.text})
        else:
            await _send(writer, {"done": True})
        finally:
            if isinstance(answers, AsyncGenerator):  # also one whose caller went between two answers cleans up now
                await answers.aclose()

    async def _join(self, peer: Peer) -> None:
        if self._joined is not None and peer.uid == self._owner:
            await self._joined(peer.pid)

    async def _follow(self, writer: asyncio.StreamWriter) -> None:
        try:
            async for _ in self._progress.changes():
                await _send(writer, self._progress.full())
        except OSError:
            pass


async def _hear(reader: asyncio.StreamReader, talk: Talk) -> None:
    """Pass requests on to the order that is being carried out; returns when the caller has gone."""
    while line := await reader.readline():
        request = json.loads(line)
        if not isinstance(request, dict):
            raise ValueError("no request")
        await talk.hear(request)


async def _send(writer: asyncio.StreamWriter, answer: Mapping[str, Any]) -> None:
    writer.write(json.dumps(answer).encode() + b"\n")
    await writer.drain()


def _peer(writer: asyncio.StreamWriter) -> Peer:
    peer = writer.get_extra_info("socket")
    given = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    pid, uid, _ = struct.unpack("iII", given)
    return Peer(pid, uid)
