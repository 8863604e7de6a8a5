"""Work that says what it is doing, for an order that passes that on as it comes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, Callable

Tell = Callable[[str], None]


class Telling:
    """Iterate what the work says, then take its `result`."""

    def __init__(self, work: Callable[[Tell], Awaitable[Any]]) -> None:
        self._said: asyncio.Queue[str] = asyncio.Queue()
        self._task = asyncio.ensure_future(work(self._said.put_nowait))

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        hearing = asyncio.ensure_future(self._said.get())
        try:
            await asyncio.wait([hearing, self._task], return_when=asyncio.FIRST_COMPLETED)
            if hearing.done():
                return hearing.result()
            raise StopAsyncIteration
        finally:
            hearing.cancel()

    def result(self) -> Any:
        """What the work gave. Raises what it raised."""
        return self._task.result()

    async def end(self) -> None:
        """Give the work up, if it is not done."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@asynccontextmanager
async def telling(work: Callable[[Tell], Awaitable[Any]]) -> AsyncIterator[Telling]:
    """Start `work`, which gets what it says things with; it ends with this."""
    told = Telling(work)
    try:
        yield told
    finally:
        await told.end()


def as_answer(text: str, total: int) -> dict[str, Any]:
    """What a child says, as the answer to an order: how much is done of `total` bytes, where it says a percentage."""
    said = re.fullmatch(r"(.*) ([0-9]{1,3}) %", text)
    return (
        {"doing": text} if said is None else {"doing": said[1], "so_far": int(said[2]) * total // 100, "total": total}
    )
