"""What the daemon answers its clients: one connection, one request, one answer."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any

from vsub.engines.local import protocol
from vsub.engines.local.arrivals import Arrivals, receive
from vsub.engines.local.job import Account, Job, Submission, attributes, full_id
from vsub.engines.local.protocol import Peer, ProtocolError, Refused
from vsub.engines.local.server import Server

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
        """One connection: one request, one answer."""
        peer = protocol.peer_of(writer.get_extra_info("socket"))
        count = self._connections.get(peer.uid, 0)
        self._connections[peer.uid] = count + 1
        try:
            if sum(self._connections.values()) > MAX_CONNECTIONS or (count >= MAX_CONNECTIONS_PER_USER and peer.uid):
                raise Refused(protocol.TOO_MANY, "too many connections")
            answer = await self._answer(reader, peer)
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
        finally:
            self._connections[peer.uid] -= 1
            if not self._connections[peer.uid]:
                del self._connections[peer.uid]
        try:
            writer.write(protocol.encode(answer))
            await asyncio.wait_for(writer.drain(), REQUEST_TIMEOUT_S)
        except (ConnectionError, asyncio.TimeoutError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, peer: Peer) -> Answer:
        line = await asyncio.wait_for(reader.readline(), REQUEST_TIMEOUT_S)
        if not line.endswith(b"\n"):
            raise ProtocolError("the line has no end")
        message = protocol.decode(line)
        operation = message.get("op")
        if operation == "submit":
            return await asyncio.wait_for(self._submit(message, reader, peer), REQUEST_TIMEOUT_S)
        if operation == "stat":
            return self._stat(message, peer)
        if operation == "delete":
            return self._delete(self._own(message, peer), message)
        if operation == "rerun":
            self._server.rerun(self._own(message, peer))
            return {"ok": True}
        if operation == "wait":
            return await self._wait(self._own(message, peer), reader)
        raise Refused(protocol.INVALID, "unknown operation")

    async def _submit(self, message: Mapping[str, Any], reader: asyncio.StreamReader, peer: Peer) -> Answer:
        owner = Account.of(peer.uid)
        asked = Submission.read(message)
        size = message.get("script_size")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= protocol.MAX_SCRIPT:
            raise Refused(protocol.BAD_VALUE, f"script: larger than {protocol.MAX_SCRIPT} bytes")
        server = self._server
        temporary = server.machine.layout.records / f".script-{secrets.token_hex(8)}"
        server.refuse_if_stopping()
        try:
            with self._arrivals.admitted(owner, size):
                await receive(reader, size, temporary)
            server.refuse_if_stopping()
            number = self._records.next_number()
            job = Job(f"{number}.{server.name}", number, owner, asked, time.time())
            job.processors = len(server.machine.allocate(job.node_request))
            temporary.rename(self._records.script(job))
        finally:
            temporary.unlink(missing_ok=True)
        server.submit(job)
        return {"job": job.id}

    def _own(self, message: Mapping[str, Any], peer: Peer) -> Job:
        """The job of the request. Raises Refused when there is none or it is another user's."""
        text = message.get("job")
        job_id = full_id(text, self._server.name) if isinstance(text, str) else None
        job = self._records.jobs.get(job_id) if job_id is not None else None
        if job is None:
            raise Refused(protocol.UNKNOWN_JOB)
        if peer.uid not in (0, job.owner.uid):
            raise Refused(protocol.PERMISSION)
        return job

    def _stat(self, message: Mapping[str, Any], peer: Peer) -> Answer:
        if message.get("job") is not None:
            jobs = [self._own(message, peer)]
        else:
            jobs = [job for job in self._records.jobs.values() if peer.uid in (0, job.owner.uid)]
        return {"jobs": [self._shown(job) for job in jobs]}

    def _shown(self, job: Job) -> tuple[str, list[tuple[str, str]]]:
        return job.id, attributes(job, self._server.name, self._server.machine.name)

    def _delete(self, job: Job, message: Mapping[str, Any]) -> Answer:
        delay = message.get("delay")
        if delay is None:
            delay = self._server.settings.kill_delay_s
        if not isinstance(delay, (int, float)) or isinstance(delay, bool) or not 0 <= delay <= 86400:
            raise Refused(protocol.BAD_VALUE, "delay")
        self._server.delete(job, delay)
        return {"ok": True}

    async def _wait(self, job: Job, reader: asyncio.StreamReader) -> Answer:
        """Answer when the job is complete and its output delivered; give up when the client has gone."""
        with self._server.completion(job) as complete:
            gone = asyncio.create_task(reader.read(1))
            both: set[asyncio.Future[Any]] = {complete, gone}
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
            if not complete.done():
                raise ConnectionResetError("the client has gone")
        return {"exit_status": job.exit_status, "reason": job.reason}
