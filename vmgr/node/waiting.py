"""Waiting for several things at once, with nothing left running afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any


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


async def all_of(*waiting: Awaitable[Any]) -> None:
    """Wait for all of several things to end, whatever they raise; then raise the first error among them, in order."""
    results = await asyncio.gather(*waiting, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
