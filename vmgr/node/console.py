"""The guest's console: drained as fast as is good for the node, its last lines kept for the report of a failure."""

from __future__ import annotations

import asyncio
import socket
from typing import Callable

KEEP_BYTES = 64 * 1024
PAUSE_SECONDS = 0.02


class Console:
    """Reads a console until the guest ends. `sink` gets what may be logged: at most `log_bytes` of it."""

    def __init__(self, connected: socket.socket, sink: Callable[[bytes], object], *, log_bytes: int) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._sink = sink
        self._log_left = log_bytes
        self._tail = bytearray()

    async def drain(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                data = await loop.sock_recv(self._socket, KEEP_BYTES)
            except OSError:
                return
            if not data:
                return
            self._tail = (self._tail + data)[-KEEP_BYTES:]
            if self._log_left > 0:
                self._log(data[: self._log_left])
            await asyncio.sleep(PAUSE_SECONDS)  # a guest that floods its console costs the node little

    def _log(self, data: bytes) -> None:
        try:
            self._sink(data)
            self._log_left -= len(data)
        except OSError:
            self._log_left = 0  # the guest is not made to wait for a full disk

    def last_lines(self, count: int) -> list[str]:
        """The last lines with something on them, fit to be printed."""
        text = bytes(self._tail).decode("utf-8", "replace").replace("\r", "\n")
        lines = ["".join(c if c.isprintable() else "?" for c in line).strip() for line in text.split("\n")]
        return [line[:200] for line in lines if line][-count:]
