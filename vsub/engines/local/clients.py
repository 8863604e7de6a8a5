"""What the daemon answers its clients: one connection, one request, one answer.

The connection of an interactive job stays until the job has ended.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any, Optional

from vsub.engines.local import protocol, resources
from vsub.engines.local.arrays import Array, Range
from vsub.engines.local.arrivals import Arrivals, receive
from vsub.engines.local.attributes import Attributes, full_id, of_array, of_job
from vsub.engines.local.job import Job
from vsub.engines.local.protocol import Peer, ProtocolError, Refused
from vsub.engines.local.schedule import Thing
from vsub.engines.local.server import Server
from vsub.engines.local.submission import Account, Submission
from vsub.engines.local.terminal import Terminal

log = logging.getLogger("vtorque-local")

REQUEST_TIMEOUT_S = 60.0
MAX_CONNECTIONS = 512
MAX_CONNECTIONS_PER_USER = 64

Answer = dict[str, Any]


class Clients:
    """All connections to one daemon."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._records = server.records
        self._arrivals = Arrivals(server.records, server.settings)
        self._connections: dict[int, int] = {}

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, counted as long as it is used."""
        peer = protocol.peer_of(writer.get_extra_info("socket"))
        count = self._connections.get(peer.uid, 0)
        self._connections[peer.uid] = count + 1
        many = sum(self._connections.values()) > MAX_CONNECTIONS or (count >= MAX_CONNECTIONS_PER_USER and peer.uid)
        try:
            await self._serve(reader, writer, peer, refused=bool(many))
        finally:
            self._connections[peer.uid] -= 1
            if not self._connections[peer.uid]:
                del self._connections[peer.uid]

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: Peer, *, refused: bool
    ) -> None:
        terminal = Terminal(reader, writer)
        job: Optional[Job] = None
        try:
            if refused:
                raise Refused(protocol.TOO_MANY, "too many connections")
            answer, job = await self._answer(reader, peer, terminal)
        except Refused as refusal:
            answer = {"error": refusal.code, "detail": refusal.detail}
        except (
            ProtocolError,
            asyncio.TimeoutError,
            asyncio.IncompleteReadError,
            ConnectionError,
            ValueError,
        ):
            answer = {"error": protocol.INVALID, "detail": "the request cannot be understood"}
        except Exception as error:  # a daemon answers; the fault is in its log
            log.exception("fault while answering uid %d", peer.uid)
            answer = {"error": protocol.SYSTEM, "detail": type(error).__name__}
        if job is not None:
            await terminal.serve(functools.partial(self._server.qsub_gone, job))
            return
        try:
            writer.write(protocol.encode(answer))
            await asyncio.wait_for(writer.drain(), REQUEST_TIMEOUT_S)
        except (ConnectionError, asyncio.TimeoutError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, reader: asyncio.StreamReader, peer: Peer, terminal: Terminal
    ) -> tuple[Answer, Optional[Job]]:
        """The answer to a request; with an interactive job, whose terminal has the connection now and has answered."""
        line = await asyncio.wait_for(reader.readline(), REQUEST_TIMEOUT_S)
        if not line.endswith(b"\n"):
            raise ProtocolError("the line has no end")
        message = protocol.decode(line)
        operation = message.get("op")
        if operation == "submit":
            return await self._submit(message, reader, peer, terminal)
        if operation == "stat":
            return self._stat(message, peer), None
        if operation == "nodes":
            nodes = [machine.name for machine in self._server.cluster.machines]
            return {"nodes": nodes, "server": self._server.name}, None
        if operation == "wait":
            return await self._wait(self._own(message, peer), reader), None
        if operation in ("offline", "online"):
            if peer.uid != 0:
                raise Refused(protocol.PERMISSION)
            self._server.set_offline(message.get("node"), operation == "offline")
            return {"ok": True}, None
        changes = {
            "delete": lambda thing: self._delete(thing, message),
            "rerun": lambda thing: self._server.rerun(thing, operator=peer.uid == 0),
            "release": self._server.release,
        }
        if operation == "hold":
            return {"ok": True, "new": self._server.schedule.hold(self._own(message, peer))}, None
        if not isinstance(operation, str) or operation not in changes:
            raise Refused(protocol.INVALID, "unknown operation")
        changes[operation](self._own(message, peer))
        return {"ok": True}, None

    async def _submit(
        self, message: Mapping[str, Any], reader: asyncio.StreamReader, peer: Peer, terminal: Terminal
    ) -> tuple[Answer, Optional[Job]]:
        owner = Account.of(peer.uid)
        asked = Submission.read(message)
        size = message.get("script_size")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= protocol.MAX_SCRIPT:
            raise Refused(protocol.BAD_VALUE, f"script: larger than {protocol.MAX_SCRIPT} bytes")
        if asked.interactive and size:
            raise Refused(protocol.INVALID, "an interactive job has no script")
        count = 1 if asked.array is None else _members(asked.array)
        temporary = self._server.cluster.layout.records / f".script-{secrets.token_hex(8)}"
        self._server.refuse_if_stopping()
        try:
            with self._arrivals.admitted(owner, size, count):
                await asyncio.wait_for(receive(reader, size, temporary), REQUEST_TIMEOUT_S)
            self._server.refuse_if_stopping()
            thing = self._new(owner, asked)
            if not asked.interactive:
                temporary.rename(self._records.script(thing))
        finally:
            temporary.unlink(missing_ok=True)
        if isinstance(thing, Job) and asked.interactive:
            self._server.submit(thing, terminal)
            return {}, thing
        self._server.submit(thing)
        return {"job": thing.id}, None

    def _new(self, owner: Account, asked: Submission) -> Thing:
        """The job or array of a submission. Raises Refused when it cannot be had here."""
        depends = self._server.schedule.resolved(asked.depend)
        name, now, cluster = self._server.name, time.time(), self._server.cluster
        processors = len(cluster.allocate(resources.NodeRequest.of(asked.resources)))
        number = self._records.next_number()
        if asked.array is None:
            return Job(
                f"{number}.{name}",
                number,
                owner,
                asked,
                now,
                processors=processors,
                held=asked.held,
                depends=depends,
            )
        return Array.make(number, name, owner, asked, now, depends)

    def _own(self, message: Mapping[str, Any], peer: Peer) -> Thing:
        """The job or array of the request. Raises Refused when there is none or it is another user's."""
        text = message.get("job")
        name = full_id(text, self._server.name) if isinstance(text, str) else None
        thing: Optional[Thing] = None
        if name is not None:
            thing = self._records.jobs.get(name) or self._records.arrays.get(name)
        if thing is None:
            raise Refused(protocol.UNKNOWN_JOB)
        if peer.uid not in (0, thing.owner.uid):
            raise Refused(protocol.PERMISSION)
        return thing

    def _stat(self, message: Mapping[str, Any], peer: Peer) -> Answer:
        """Jobs and, unless their members are asked for, arrays in place of their members."""
        found: list[Thing]
        members = message.get("members") is True
        if message.get("job") is not None:
            thing = self._own(message, peer)
            found = [*thing.members] if members and isinstance(thing, Array) else [thing]
        else:
            found = [job for job in self._records.jobs.values() if members or job.index is None]
            found.extend(() if members else self._records.arrays.values())
            found = [thing for thing in found if peer.uid in (0, thing.owner.uid)]
            found.sort(key=lambda thing: thing.number)
        return {"jobs": [self._shown(thing) for thing in found]}

    def _shown(self, thing: Thing) -> tuple[str, Attributes]:
        name, host = self._server.name, self._server.cluster.host
        return thing.id, of_array(thing, name, host) if isinstance(thing, Array) else of_job(thing, name, host)

    def _delete(self, thing: Thing, message: Mapping[str, Any]) -> None:
        delay = message.get("delay")
        if delay is None:
            delay = self._server.settings.kill_delay_s
        if not isinstance(delay, (int, float)) or isinstance(delay, bool) or not 0 <= delay <= 86400:
            raise Refused(protocol.BAD_VALUE, "delay")
        self._server.delete(thing, delay)

    async def _wait(self, thing: Thing, reader: asyncio.StreamReader) -> Answer:
        """Answer when the job is complete and its output delivered; give up when the client has gone."""
        with self._server.endings.completion(thing) as complete:
            gone = asyncio.create_task(reader.read(1))
            both: set[asyncio.Future[Any]] = {complete, gone}
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
            if not complete.done():
                raise ConnectionResetError("the client has gone")
        return {"exit_status": thing.exit_status, "reason": thing.reason}


def _members(text: str) -> int:
    """How many jobs an array has. Raises Refused."""
    try:
        return len(Range.parse(text).indices)
    except ValueError as error:
        raise Refused(protocol.BAD_ARRAY, str(error)) from error
