"""Noticing that something in a folder has changed, with inotify where it tells, and by looking again where not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Optional

from inotify_simple import INotify, flags

RENAMED_IN = flags.MOVED_TO | flags.CLOSE_WRITE
"""A file is there, whole."""
COMES_OR_GOES = RENAMED_IN | flags.CREATE | flags.MOVED_FROM | flags.DELETE
"""A file is there, or is gone."""


async def changes(folder: Path, events: int, look_again_s: float) -> AsyncIterator[None]:
    """Yield now, after each of `events` in `folder`, and whenever nothing has been told for `look_again_s`."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    watch = _watch(folder, events)

    def drain() -> None:
        if watch is not None:
            watch.read(timeout=0)
            changed.set()

    if watch is not None:
        loop.add_reader(watch.fileno(), drain)
    try:
        while True:
            changed.clear()
            yield
            waiting = asyncio.ensure_future(changed.wait())
            try:
                await asyncio.wait([waiting], timeout=look_again_s)
            finally:
                waiting.cancel()
    finally:
        if watch is not None:
            loop.remove_reader(watch.fileno())
            watch.close()


def _watch(folder: Path, events: int) -> Optional[INotify]:
    """A watch for `events` in `folder`, None where the kernel gives none."""
    try:
        watch = INotify()
    except OSError:
        return None
    try:
        watch.add_watch(str(folder), events)
    except OSError:
        watch.close()
        return None
    return watch
