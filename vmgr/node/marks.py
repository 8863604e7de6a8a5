"""Copying a job's output to its own streams, with an eye on the mark behind which nothing of it is to come.

A mark is a token, which nobody else knows, and a letter. It stands in the output, and is taken out of it.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
from types import TracebackType
from typing import Callable, Optional

CHUNK_BYTES = 1 << 16


class MarkFilter:
    """Takes one expected mark out of a stream. Only what may be the beginning of it is kept back, until more comes."""

    def __init__(self) -> None:
        self._token: Optional[bytes] = None
        self._kept = b""

    def expect(self, token: bytes) -> None:
        self._token = token

    def feed(self, data: bytes) -> tuple[bytes, Optional[str]]:
        """What of the stream is to be passed on now, and the letter of the mark where that was in it."""
        token = self._token
        if token is None:
            return data, None
        data = self._kept + data
        self._kept = b""
        at = data.find(token)
        if 0 <= at < len(data) - len(token):
            self._token = None
            behind = at + len(token) + 1
            return data[:at] + data[behind:], chr(data[behind - 1])
        cut = at if at >= 0 else len(data) - _begun(data, token)
        self._kept = data[cut:]
        return data[:cut], None

    def rest(self) -> bytes:
        """What was kept back, at the stream's end."""
        rest, self._kept = self._kept, b""
        return rest


def _begun(data: bytes, token: bytes) -> int:
    """How many bytes at the end of `data` may be the beginning of `token`."""
    return next((length for length in range(min(len(data), len(token) - 1), 0, -1) if data.endswith(token[:length])), 0)


class Copier:
    """Copies what is written to `inlet` to the descriptor `target`, by a thread: both may block.

    What cannot be written is lost, as it would be for a program that writes there itself; `complain` gets the first
    reason. Use it as a context manager in an event loop: at its end nothing is waited for.
    """

    def __init__(self, target: int, complain: Callable[[OSError], None]) -> None:
        self._target = target
        self._complain: Optional[Callable[[OSError], None]] = complain
        self._filter = MarkFilter()
        self._loop = asyncio.get_running_loop()
        self._mark: Optional[asyncio.Future[Optional[str]]] = None
        self._ended = asyncio.Event()
        self._source, self.inlet = os.pipe()

    def __enter__(self) -> Copier:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._close_inlet()
        if self._source >= 0:  # it was never started
            os.close(self._source)

    def start(self) -> None:
        """Copy until nobody has `inlet` open any more; here it is closed now."""
        self._close_inlet()
        source, self._source = self._source, -1
        threading.Thread(target=self._copy, args=(source,), daemon=True).start()

    async def end(self) -> None:
        """Wait until everything has been passed on."""
        await self._ended.wait()

    def expect(self, token: str) -> asyncio.Future[Optional[str]]:
        """The letter of the mark with this token, when all before it has been passed on; None where none comes."""
        self._mark = mark = self._loop.create_future()
        if self._ended.is_set():
            mark.set_result(None)
        else:
            self._filter.expect(token.encode("ascii"))
        return mark

    @property
    def expects(self) -> bool:
        return self._mark is not None and not self._mark.done()

    def _close_inlet(self) -> None:
        if self.inlet >= 0:
            os.close(self.inlet)
            self.inlet = -1

    def _copy(self, source: int) -> None:
        try:
            while data := os.read(source, CHUNK_BYTES):
                passed_on, letter = self._filter.feed(data)
                self._write(passed_on)
                if letter is not None:
                    self._tell(self._marked, letter)
            self._write(self._filter.rest())
        finally:
            os.close(source)
            self._tell(self._over)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._target, view) :]
            except BlockingIOError:  # somebody who has it too has made it so
                select.select([], [self._target], [])
            except OSError as err:
                if self._complain is not None:
                    self._tell(self._complain, err)
                    self._complain = None
                return

    def _tell(self, what: Callable[..., None], *words: object) -> None:
        try:
            self._loop.call_soon_threadsafe(what, *words)
        except RuntimeError:
            pass  # the loop has ended, and nobody waits

    def _marked(self, letter: str) -> None:
        if self._mark is not None and not self._mark.done():
            self._mark.set_result(letter)

    def _over(self) -> None:
        self._ended.set()
        if self._mark is not None and not self._mark.done():
            self._mark.set_result(None)
