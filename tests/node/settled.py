"""Running a coroutine until the children that it started are collected too: that happens just after their last word,
by the loop, which would be closed by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import psutil

SETTLE_S = 10.0
PATIENCE_S = 60.0


def children() -> set[psutil.Process]:
    """Those of this process: daemons of fixtures, and what a test has started."""
    return set(psutil.Process().children())


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which may take PATIENCE_S. A child that does not end is left for the test to fail over."""
    before = children()

    async def settled() -> Any:
        try:
            return await asyncio.wait_for(work, PATIENCE_S)
        finally:
            deadline = asyncio.get_running_loop().time() + SETTLE_S
            while children() - before and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(0.01)

    return asyncio.run(settled())
