"""The jobs and arrays of a spool directory: in memory, and in files that a crash leaves behind.

A job is a file before its submission is answered and is written again at every change of its phase. An array
is one file, which stands for those of its members that are as they were submitted.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

from vsub.engines.local.arrays import Array
from vsub.engines.local.job import Job
from vsub.engines.local.machine import Layout

log = logging.getLogger("vtorque-local")

ARRAY_MARK = "[]."
"""What the id of an array has in it."""


def write_whole(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file in one step; what was there before survives a crash, of the machine as well if `durable`."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb", opener=functools.partial(os.open, mode=0o600)) as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)


class Records:
    """All jobs and arrays that are known, by their ids; members of arrays are among the jobs."""

    def __init__(self, layout: Layout) -> None:
        self.jobs: dict[str, Job] = {}
        self.arrays: dict[str, Array] = {}
        self._layout = layout
        self._stored: set[str] = set()

    def script(self, thing: Union[Job, Array]) -> Path:
        """The script as it was submitted; the members of an array have one together."""
        owner = thing.array_id if isinstance(thing, Job) else None
        return self._layout.records / f"{owner or thing.id}.SC"

    # --- writing

    def save(self, job: Job) -> None:
        """Store a job that is known. Raises OSError."""
        if job.id in self.jobs:
            self._write(job.id, job.to_json(), durable=job.index is None or job.attempts > 0)

    def save_if_possible(self, thing: Union[Job, Array]) -> None:
        """What must go on without its record: the end of what runs, and what follows from it."""
        try:
            self.save_things(thing)
        except OSError:
            log.exception("%s: cannot be recorded", thing.id)

    def save_things(self, thing: Union[Job, Array]) -> None:
        """Store a job, or an array with those of its members that have changed before. Raises OSError."""
        if isinstance(thing, Job):
            self.save(thing)
            return
        self._write(thing.id, thing.to_json())
        for job in thing.members:
            if job.id in self._stored:
                self.save(job)

    def add(self, thing: Union[Job, Array]) -> None:
        """A new job or array, its script in place. Raises OSError when it cannot be stored."""
        if isinstance(thing, Job):
            self.jobs[thing.id] = thing
        else:
            self._know(thing)
        try:
            self.save_things(thing)
        except OSError:
            self.forget(thing)
            raise

    def _know(self, array: Array) -> None:
        self.arrays[array.id] = array
        self.jobs.update((job.id, job) for job in array.members)

    def forget(self, thing: Union[Job, Array]) -> None:
        """A job or array that nobody can ask for any more."""
        if isinstance(thing, Array):
            for job in thing.members:
                self._drop(job.id)
        self.script(thing).unlink(missing_ok=True)
        self._drop(thing.id)

    def _drop(self, name: str) -> None:
        self.jobs.pop(name, None)
        self.arrays.pop(name, None)
        self._stored.discard(name)
        self._path(name).unlink(missing_ok=True)

    def _write(self, name: str, stored: Mapping[str, Any], *, durable: bool = True) -> None:
        write_whole(self._path(name), json.dumps(stored).encode("ascii"), durable=durable)
        self._stored.add(name)

    # --- reading

    def load(self) -> None:
        """Read what an earlier daemon left; what cannot be read is put aside, never guessed at."""
        paths = []
        for path in sorted(self._layout.records.iterdir()):
            if path.name.startswith("."):
                path.unlink()
            elif path.suffix == ".json":
                paths.append(path)
        found: list[Union[Job, Array]] = []
        for path in sorted(paths, key=lambda path: ARRAY_MARK not in path.name):
            try:
                found.extend(self._read(path))
                self._stored.add(path.stem)
            except (KeyError, TypeError, ValueError) as error:
                log.error("%s cannot be read (%s) and is put aside", path, error)
                path.rename(path.with_suffix(".unreadable"))
        for thing in sorted(found, key=lambda thing: thing.number):
            if isinstance(thing, Array):
                self._know(thing)
            else:
                self.jobs[thing.id] = thing
        for path in self._layout.records.glob("*.SC"):
            if path.stem not in self.jobs and path.stem not in self.arrays:
                path.unlink()

    def _read(self, path: Path) -> list[Union[Job, Array]]:
        """A job that is no member, or an array; a member takes its place in its array, which was read before."""
        stored = json.loads(path.read_bytes())
        if ARRAY_MARK in path.name:
            array = Array.from_json(stored)
            self.arrays[array.id] = array
            return [array]
        if stored.get("index") is None:
            return [Job.from_json(stored)]
        head, _, server = path.stem.partition(f"[{stored['index']}].")
        members = self.arrays[f"{head}{ARRAY_MARK}{server}"].members
        place = [job.index for job in members].index(stored["index"])
        members[place] = Job.from_json(stored, members[place])
        return []

    def next_number(self) -> int:
        """A number that no job has had."""
        path = self._layout.private / "seq"
        try:
            number = int(path.read_text(encoding="ascii")) + 1
        except FileNotFoundError:
            number = 1
        write_whole(path, str(number).encode("ascii"))
        return number

    def _path(self, name: str) -> Path:
        return self._layout.records / f"{name}.json"
