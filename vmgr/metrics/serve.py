"""A small server of one page, for sites whose Prometheus asks the nodes themselves.

It answers `GET /metrics` and nothing else, reads no more than the head of a request, and gives each connection a few
seconds; there are never more than a few. The metrics hold no name of a user or of a job.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Callable, Optional

from prometheus_client import CONTENT_TYPE_LATEST

MAX_HEAD_BYTES = 8192
REQUEST_SECONDS = 5.0
CONNECTIONS = 16
FRESH_SECONDS = 1.0
"""For so long an answer is given again: asking more often costs the node nothing."""

Produce = Callable[[], Awaitable[bytes]]


class Server:
    """Serves what `produce` gives. A failure of it is told by status 500, without the reason."""

    def __init__(self, produce: Produce, complain: Callable[[str], None]) -> None:
        self._produce = produce
        self._complain = complain
        self._open = 0
        self._turn = asyncio.Lock()
        self._page: Optional[bytes] = None
        self._made = 0.0

    async def listen(self, host: str, port: int) -> asyncio.base_events.Server:
        """Start to listen. Raises OSError."""
        return await asyncio.start_server(self._accept, host, port, limit=MAX_HEAD_BYTES, backlog=CONNECTIONS)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= CONNECTIONS:
                await asyncio.wait_for(self._answer(reader, writer), REQUEST_SECONDS)
                writer.close()
                await asyncio.wait_for(writer.wait_closed(), REQUEST_SECONDS)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # it is slow, gone, or says too much
        finally:
            self._open -= 1
            writer.transport.abort()  # one that takes nothing would keep the descriptor for ever

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            await _send(writer, "405 Method Not Allowed", b"only GET\n")
        elif path != b"/metrics":
            await _send(writer, "404 Not Found", b"/metrics is here\n")
        else:
            page = await self._current()
            if page is None:
                await _send(writer, "500 Internal Server Error", b"see what the server says\n")
            else:
                await _send(writer, "200 OK", page, CONTENT_TYPE_LATEST, head_only=method == b"HEAD")

    async def _current(self) -> Optional[bytes]:
        async with self._turn:
            if self._page is None or time.monotonic() - self._made > FRESH_SECONDS:
                try:
                    self._page = await self._produce()
                    self._made = time.monotonic()
                except Exception as err:
                    self._page = None
                    self._complain(f"{type(err).__name__}: {err}")
            return self._page


async def _send(
    writer: asyncio.StreamWriter, status: str, body: bytes, kind: str = "text/plain", *, head_only: bool = False
) -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + (b"" if head_only else body))
    await writer.drain()
