"""The jobs of a spool directory: in memory, and in files that a crash leaves behind.

A job is a file before its submission is answered and is written again at every change of its phase.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path

from vsub.engines.local.job import Job
from vsub.engines.local.machine import Layout

log = logging.getLogger("vtorque-local")


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file in one step; what was there before survives a crash."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb", opener=functools.partial(os.open, mode=0o600)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Records:
    """All jobs that are known, by their ids."""

    def __init__(self, layout: Layout) -> None:
        self.jobs: dict[str, Job] = {}
        self._layout = layout

    def script(self, job: Job) -> Path:
        """The script of a job as it was submitted."""
        return self._layout.records / f"{job.id}.SC"

    def save(self, job: Job) -> None:
        """Store a job that is known. Raises OSError."""
        if job.id in self.jobs:
            write_whole(self._path(job.id), json.dumps(job.to_json()).encode("ascii"))

    def save_if_possible(self, job: Job) -> None:
        """What must go on without its record: the end of what runs."""
        try:
            self.save(job)
        except OSError:
            log.exception("%s: cannot be recorded", job.id)

    def add(self, job: Job) -> None:
        """A new job, its script in place."""
        self.jobs[job.id] = job
        self.save(job)

    def forget(self, job: Job) -> None:
        """A job that nobody can ask for any more."""
        self.jobs.pop(job.id, None)
        self._path(job.id).unlink(missing_ok=True)

    def load(self) -> None:
        """Read what an earlier daemon left; what cannot be read is put aside, never guessed at."""
        found = []
        for path in sorted(self._layout.records.iterdir()):
            if path.name.startswith("."):
                path.unlink()
            elif path.suffix == ".json":
                try:
                    found.append(Job.from_json(json.loads(path.read_bytes())))
                except (KeyError, TypeError, ValueError) as error:
                    log.error("%s cannot be read (%s) and is put aside", path, error)
                    path.rename(path.with_suffix(".unreadable"))
        for job in sorted(found, key=lambda job: job.number):
            self.jobs[job.id] = job
        for path in self._layout.records.glob("*.SC"):
            if path.stem not in self.jobs:
                path.unlink()

    def next_number(self) -> int:
        """A number that no job has had."""
        path = self._layout.private / "seq"
        try:
            number = int(path.read_text(encoding="ascii")) + 1
        except FileNotFoundError:
            number = 1
        write_whole(path, str(number).encode("ascii"))
        return number

    def _path(self, job_id: str) -> Path:
        return self._layout.records / f"{job_id}.json"
