"""The script of a job that can be suspended, between its session in the guest and what the agent wants of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Callable, Optional

from vmgr.errors import VTorqueError
from vmgr.node.kept import Allowed, KeptSession

DETACH_SECONDS = 30.0


class Suspended(Exception):
    """The job has been suspended: its script goes on in another attempt."""


class KeptJob:
    """Does what the agent's snapshots say: `suspending`, a number while the script is to be let go of, the state
    `suspended` when it will not go on here.

    `snapshot` gives the newest one, `changed` the event of the next change, `answer` tells the agent what
    came of the try of a number: no error, or a line.
    """

    def __init__(
        self,
        session: KeptSession,
        snapshot: Callable[[], dict[str, Any]],
        changed: Callable[[], asyncio.Event],
        answer: Callable[[int, Optional[str]], None],
    ) -> None:
        self._session = session
        self._snapshot = snapshot
        self._changed = changed
        self._answer = answer
        self._refused: Optional[str] = "its script has not started yet"

    async def run(self, described: str, script: Path, arguments: str) -> int:
        """Run the script, as `KeptSession.run_kept` does; gives its exit status.

        Raises Suspended, and VTorqueError (VT-CONNECT) when the connection fails.
        """
        return await self._to_its_end(self._session.run_kept(described, script, arguments))

    async def go_on(self, allowed: Allowed) -> int:
        """As `run`, for the script of a resumed job: it goes on when it is within reach, and `allowed` returns."""
        return await self._to_its_end(self._session.attach(allowed))

    async def _to_its_end(self, connected: Awaitable[Optional[int]]) -> int:
        self._refused = None
        try:
            while (status := await connected) is None:
                await self._until_called_off()
                connected = self._session.attach()
            return status
        finally:
            self._refused = "its script has ended"

    async def follow(self) -> None:
        """Answer the agent's wishes, one by one, until cancelled."""
        answered: Optional[int] = None
        while True:
            changed = self._changed()
            number = self._number()
            if number is not None and number != answered:
                self._answer(number, await self._detach())
            answered = number
            if self._number() == number:
                await changed.wait()

    async def _detach(self) -> Optional[str]:
        if self._session.detached:
            return None
        if self._refused is not None:
            return self._refused
        try:
            await self._session.detach(DETACH_SECONDS)
        except VTorqueError as err:
            return err.detail
        except Exception as err:  # the next wish is to be answered too
            return f"fault in the job wrapper: {err}"
        return None

    async def _until_called_off(self) -> None:
        while True:
            changed = self._changed()
            if self._snapshot().get("state") == "suspended":
                raise Suspended
            if self._number() is None:
                return
            await changed.wait()

    def _number(self) -> Optional[int]:
        number = self._snapshot().get("suspending")
        return number if type(number) is int and number > 0 else None
