"""The guest's console: drained as fast as is good for the node, its last lines kept, followed by whoever asks."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable

KEEP_BYTES = 64 * 1024
FOLLOWER_BYTES = 256 * 1024
"""As much may wait for one who follows; of more the oldest goes."""
PAUSE_SECONDS = 0.02


class Follower:
    """One who reads along. What is not taken in time is lost, and nobody waits for it."""

    def __init__(self) -> None:
        self._waiting = bytearray()
        self._lost = 0
        self._ended = False
        self._more = asyncio.Event()

    def add(self, data: bytes) -> None:
        self._waiting += data
        excess = len(self._waiting) - FOLLOWER_BYTES
        if excess > 0:
            del self._waiting[:excess]
            self._lost += excess
        self._more.set()

    def end(self) -> None:
        self._ended = True
        self._more.set()

    async def take(self, most: int) -> tuple[bytes, int]:
        """The next bytes, at most so many, and how many were lost before them; none at the console's end."""
        while not self._waiting and not self._ended:
            self._more.clear()
            await self._more.wait()
        data, lost = bytes(self._waiting[:most]), self._lost
        del self._waiting[:most]
        self._lost = 0
        return data, lost


class Console:
    """Reads a console until the guest ends. `sink` gets what may be logged: at most `log_bytes` of it."""

    def __init__(self, connected: socket.socket, sink: Callable[[bytes], object], *, log_bytes: int) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._sink = sink
        self._log_left = log_bytes
        self._tail = bytearray()
        self._followers: set[Follower] = set()
        self._ended = False
        self._keys = asyncio.Lock()

    async def drain(self) -> None:
        try:
            await self._drain()
        finally:
            self._ended = True
            for follower in self._followers:
                follower.end()

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                data = await loop.sock_recv(self._socket, KEEP_BYTES)
            except OSError:
                return
            if not data:
                return
            self._tail = (self._tail + data)[-KEEP_BYTES:]
            for follower in self._followers:
                follower.add(data)
            if self._log_left > 0:
                self._log(data[: self._log_left])
            await asyncio.sleep(PAUSE_SECONDS)  # a guest that floods its console costs the node little

    @contextmanager
    def followed(self) -> Iterator[Follower]:
        """Read along from now on."""
        follower = Follower()
        if self._ended:
            follower.end()
        self._followers.add(follower)
        try:
            yield follower
        finally:
            self._followers.discard(follower)

    def last_bytes(self, count: int) -> bytes:
        """The last bytes before now, at most so many."""
        return bytes(self._tail[-count:]) if count else b""

    async def type(self, data: bytes) -> None:
        """Give the guest input, after what others give it. Waits as long as QEMU takes none.

        Raises OSError when it has ended.
        """
        async with self._keys:  # a socket has one writer at a time in asyncio: another would never hear of room again
            await asyncio.get_running_loop().sock_sendall(self._socket, data)

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
