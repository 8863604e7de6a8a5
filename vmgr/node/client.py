"""The other side of an agent's socket: the job wrapper and the user prologue follow it, `vmgr` gives orders by it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Callable, Optional

from vmgr.config import Paths
from vmgr.errors import Code, VTorqueError
from vmgr.node.record import newest_socket

MAX_ANSWER_BYTES = 1 << 20


class AgentLink:
    """A connection to the agent of one job. `snapshots` are what `vmgr.node.state.Progress.full` gives.

    `closing` is called when it is closed: it ends what carries the connection, where that is not a socket of this node.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        closing: Optional[Callable[[], None]] = None,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._closing = closing

    @classmethod
    async def open(cls, paths: Paths, job_id: str) -> AgentLink:
        """Connect to the agent of the job's newest attempt. Raises VTorqueError (VT-AGENT) when there is none."""
        path = newest_socket(paths, job_id)
        try:
            if path is not None:
                return await cls.connect(path)
        except OSError:
            pass
        raise no_agent(f"no node agent serves job {job_id} on this node")

    @classmethod
    async def connect(cls, path: Path) -> AgentLink:
        """Connect to the agent that listens at `path`. Raises OSError, also when it is somebody else who listens."""
        reader, writer = await asyncio.open_unix_connection(str(path), limit=MAX_ANSWER_BYTES)
        uid = listener_of(writer.get_extra_info("socket"))
        if uid not in (0, os.geteuid()):
            writer.close()
            raise PermissionError(f"uid {uid} listens at {path}, not a node agent")
        return cls(reader, writer)

    @classmethod
    async def over(cls, connected: socket.socket, closing: Callable[[], None]) -> AgentLink:
        """A link over what leads to an agent's socket from elsewhere."""
        reader, writer = await asyncio.open_unix_connection(sock=connected, limit=MAX_ANSWER_BYTES)
        return cls(reader, writer, closing)

    def send(self, op: str, **members: object) -> None:
        self._writer.write(json.dumps({"op": op, **members}).encode() + b"\n")

    async def snapshot(self) -> Optional[dict[str, Any]]:
        """The agent's next answer, None when the agent is gone. Raises VTorqueError when it refuses to answer."""
        try:
            line = await self._reader.readline()
            if not line.endswith(b"\n"):
                return None
            answer = json.loads(line)
        except OSError:
            return None
        except (ValueError, RecursionError):  # also a line that is too long
            answer = None
        if not isinstance(answer, dict):
            raise VTorqueError("what the node agent says cannot be understood", code=Code.AGENT)
        if "error" in answer:
            code = answer.get("code")
            raise VTorqueError(str(answer["error"]), code=Code.named(code) if code else Code.ACCESS)
        return answer

    async def order(self, op: str, **members: object) -> AsyncIterator[dict[str, Any]]:
        """Give the guests an order and yield its answers until it is carried out.

        Raises VTorqueError: the order's failure, or VT-AGENT when the agent has gone meanwhile.
        """
        self.send(op, **members)
        while True:
            answer = await self.snapshot()
            if answer is None:
                raise VTorqueError(f"the node agent has ended before {op} was done", code=Code.AGENT)
            if answer.get("done"):
                return
            yield answer

    async def follow(self, op: str = "follow", **members: object) -> AsyncIterator[dict[str, Any]]:
        """Answers now and after each change, until the agent is gone."""
        self.send(op, **members)
        while True:
            answer = await self.snapshot()
            if answer is None:
                return
            yield answer

    async def drain(self) -> None:
        """Wait until what was sent is on its way; an agent that is gone is no error here."""
        try:
            await self._writer.drain()
        except OSError:
            pass

    def close(self) -> None:
        self._writer.close()
        if self._closing is not None:
            self._closing()


def listener_of(connection: socket.socket) -> int:
    """Whose process listens at the other end, by the kernel's word (SO_PEERCRED, unix(7))."""
    given = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    return int(struct.unpack("iII", given)[1])


async def state_of(socket: Path, timeout_s: float) -> Optional[dict[str, Any]]:
    """What the agent at `socket` says of its attempt; None when it is gone, does not answer, or not to this caller."""

    async def ask() -> Optional[dict[str, Any]]:
        link = await AgentLink.connect(socket)
        try:
            link.send("status")
            return await link.snapshot()
        finally:
            link.close()

    try:
        return await asyncio.wait_for(ask(), timeout_s)
    except (OSError, VTorqueError, ValueError, asyncio.TimeoutError):
        return None


def no_agent(text: str) -> VTorqueError:
    return VTorqueError(
        text,
        code=Code.AGENT,
        hint="does the batch system call vTorque's hooks (see vmgr doctor), and is there space and memory?",
    )


def failure(snapshot: dict[str, Any]) -> Optional[VTorqueError]:
    """The failure that a snapshot tells of, None when it tells of none."""
    if not snapshot.get("code"):
        return None
    return VTorqueError(str(snapshot.get("reason")), code=Code.named(snapshot["code"]))
