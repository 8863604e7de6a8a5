"""Whether the job is there for which an attempt has guests: its wrapper has come, or all is over."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

from vmgr.errors import Code, VTorqueError
from vmgr.node.waiting import first


class Attendance:
    """What is known of the job on this node; made in the loop in which it is waited for.

    `attached` is set when its wrapper has come, `over` when the attempt is to end, for whatever reason. `attach_s` is
    how long the wrapper may take, in seconds; `awaited`: this is the mother superior, where one comes.
    """

    def __init__(self, attach_s: float, *, awaited: bool) -> None:
        self.attached = asyncio.Event()
        self.over = asyncio.Event()
        self._attach_s = attach_s
        self._awaited = awaited

    def end_at_signals(self) -> None:
        """Take the signals that end a process for the end of the job."""
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(sig, self.over.set)

    async def end_after(self, ending: Coroutine[Any, Any, None]) -> None:
        """Wait for `ending`, which is the end of the job."""
        await ending
        self.over.set()

    async def unattended(self) -> None:
        """Raise VTorqueError (VT-AGENT) when no job wrapper comes in time: its job is over, or never was one.

        Wherever the batch system's epilogue is lost, this and the end of the wrapper's connection end the guest. To a
        sister no wrapper comes: there the batch system's own file says how long the job lives.
        """
        if self._awaited:
            await first(self.attached.wait(), asyncio.sleep(self._attach_s))
            if not self.attached.is_set():
                raise VTorqueError(f"no job has come for the guest within {self._attach_s} s", code=Code.AGENT)
        await asyncio.Event().wait()
