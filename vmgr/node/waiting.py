"""Waiting for several things at once, with nothing left running afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import Any, Optional, TypeVar

_T = TypeVar("_T")


async def first(*waiting: Awaitable[Any]) -> None:
    """Wait for the first of several things, give the others up, and raise what that first one raised."""
    tasks = [asyncio.ensure_future(thing) for thing in waiting]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def every(*waiting: Awaitable[Any]) -> list[Any]:
    """What each of several things gives; at the first that raises, give the others up and raise it too."""
    tasks = [asyncio.ensure_future(thing) for thing in waiting]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def within(limit_s: float, doing: Awaitable[_T]) -> _T:
    """What `doing` gives in time, else it is given up. Raises asyncio.TimeoutError, and what it raises.

    Unlike `asyncio.wait_for` before Python 3.12 this never swallows that it is cancelled.
    """
    task = asyncio.ensure_future(doing)
    try:
        await asyncio.wait([task], timeout=limit_s)
        if not task.done():
            raise asyncio.TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await _end(task)
        if not task.cancelled():
            task.exception()  # looked at
    return task.result()


async def _end(task: asyncio.Future[Any]) -> None:
    """Wait until `task` has ended, also when this is cancelled meanwhile: it may be cleaning up."""
    cancelled: Optional[asyncio.CancelledError] = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as err:
            cancelled = err
    if cancelled is not None:
        raise cancelled


async def gone(program: asyncio.subprocess.Process) -> None:
    """Kill a program that nobody needs any more, unless it has ended, and wait until it is gone."""
    if program.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            program.kill()
        await program.communicate()  # a pipe that is full would keep `wait` waiting


async def all_of(*waiting: Awaitable[Any]) -> None:
    """Wait for all of several things to end, whatever they raise; then raise the first error among them, in order."""
    results = await asyncio.gather(*waiting, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
