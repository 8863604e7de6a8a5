"""The user's side of an agent's socket: what the job wrapper and the user prologue follow."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Optional

from vmgr.config import Paths
from vmgr.errors import Code, VTorqueError
from vmgr.node.record import newest_socket

MAX_ANSWER_BYTES = 1 << 20


class AgentLink:
    """A connection to the agent of one job. `snapshots` are what `vmgr.node.state.Progress.full` gives."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, paths: Paths, job_id: str) -> AgentLink:
        """Connect to the agent of the job's newest attempt. Raises VTorqueError (VT-AGENT) when there is none."""
        socket = newest_socket(paths, job_id)
        try:
            if socket is not None:
                return await cls.connect(socket)
        except OSError:
            pass
        raise no_agent(f"no node agent serves job {job_id} on this node")

    @classmethod
    async def connect(cls, socket: Path) -> AgentLink:
        """Connect to the agent that listens at `socket`. Raises OSError."""
        return cls(*await asyncio.open_unix_connection(str(socket), limit=MAX_ANSWER_BYTES))

    def send(self, op: str, **members: object) -> None:
        self._writer.write(json.dumps({"op": op, **members}).encode() + b"\n")

    async def snapshot(self) -> Optional[dict[str, Any]]:
        """The agent's next answer, None when the agent is gone. Raises VTorqueError when it refuses to answer."""
        try:
            line = await self._reader.readline()
        except OSError:
            return None
        if not line.endswith(b"\n"):
            return None
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise VTorqueError(str(answer["error"]), code=Code.ACCESS)
        return answer

    async def follow(self, op: str = "follow") -> AsyncIterator[dict[str, Any]]:
        """Answers now and after each change, until the agent is gone."""
        self.send(op)
        while True:
            answer = await self.snapshot()
            if answer is None:
                return
            yield answer

    def close(self) -> None:
        self._writer.close()


def no_agent(text: str) -> VTorqueError:
    return VTorqueError(text, code=Code.AGENT, hint="are the prologue hooks installed, and is there space and memory?")


def failure(snapshot: dict[str, Any]) -> Optional[VTorqueError]:
    """The failure that a snapshot tells of, None when it tells of none."""
    if not snapshot.get("code"):
        return None
    return VTorqueError(str(snapshot.get("reason")), code=Code.named(snapshot["code"]))
