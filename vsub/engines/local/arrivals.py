"""Scripts on their way to the daemon: how much of it each user may have there, and how they are received."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from vsub.engines.local import protocol
from vsub.engines.local.job import Phase
from vsub.engines.local.protocol import ProtocolError, Refused
from vsub.engines.local.records import Records
from vsub.engines.local.settings import Settings
from vsub.engines.local.submission import Account

MAX_ARRIVING = 256
MAX_ARRIVING_PER_USER = 32
"""Scripts on their way at one time: half of a user's connections, so that a slow network leaves some for the rest."""
MAX_ARRIVING_BYTES = 1 << 30
"""Size of all scripts on their way. Those of one user count with the scripts that are there already."""


class Arrivals:
    """What is on its way, and what is there of each user."""

    def __init__(self, records: Records, settings: Settings) -> None:
        self._records = records
        self._settings = settings
        self._coming: list[tuple[int, int, int]] = []

    @contextlib.contextmanager
    def admitted(self, owner: Account, size: int, jobs: int) -> Iterator[None]:
        """While this lasts, a script of `size` bytes is on its way, for so many jobs.

        Raises Refused, before any of it is read.
        """
        theirs = [arrival for arrival in self._coming if arrival[0] == owner.uid]
        if len(theirs) >= MAX_ARRIVING_PER_USER or len(self._coming) >= MAX_ARRIVING:
            raise Refused(protocol.TOO_MANY, "too many scripts on their way")
        if sum(coming for _, coming, _ in self._coming) + size > MAX_ARRIVING_BYTES:
            raise Refused(protocol.TOO_MANY, "the scripts on their way are too large together")
        arrival = (owner.uid, size, jobs)
        self._admit(owner, [*theirs, arrival])
        self._coming.append(arrival)
        try:
            yield
        finally:
            self._coming.remove(arrival)

    def _admit(self, owner: Account, coming: list[tuple[int, int, int]]) -> None:
        """Refuse what would let one user fill the spool; `coming` is all of theirs that is on its way."""
        jobs = self._records.jobs.values()
        theirs = [job for job in jobs if job.owner.uid == owner.uid and job.phase is not Phase.COMPLETE]
        total = sum(size for _, size, _ in coming)
        for script in {self._records.script(job) for job in theirs}:
            try:
                total += script.stat().st_size
            except FileNotFoundError:
                pass
        if len(theirs) + sum(count for _, _, count in coming) > self._settings.max_jobs_per_user:
            raise Refused(protocol.TOO_MANY, f"user {owner.name} has {len(theirs)} jobs")
        if total > self._settings.max_script_bytes_per_user:
            raise Refused(protocol.TOO_MANY, f"the scripts of user {owner.name} are too large together")


async def receive(reader: asyncio.StreamReader, size: int, path: Path) -> None:
    """Write the script that follows a request to a new file. Raises ProtocolError when it ends early."""
    with open(path, "xb", opener=functools.partial(os.open, mode=0o600)) as file:
        left = size
        while left:
            data = await reader.read(min(left, 1 << 20))
            if not data:
                raise ProtocolError("the script has no end")
            file.write(data)
            left -= len(data)
