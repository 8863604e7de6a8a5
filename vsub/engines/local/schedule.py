"""Which job starts next, and what dependencies, holds and dates make of the others.

Jobs start in the order of their priority, then of their submission. One job runs at a time, so the slot limit
of an array is kept by itself.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from typing import Optional, Union

from vsub.engines.local import depend, protocol
from vsub.engines.local.arrays import Array
from vsub.engines.local.attributes import full_id
from vsub.engines.local.depend import Dependency, Outcome
from vsub.engines.local.job import Job, Phase
from vsub.engines.local.machine import Cluster
from vsub.engines.local.protocol import Refused
from vsub.engines.local.records import Records

Thing = Union[Job, Array]
"""What a client can name."""


def jobs_of(thing: Thing) -> list[Job]:
    """The job itself, or the members of an array."""
    return thing.members if isinstance(thing, Array) else [thing]


def _outcome(kind: str, other: Optional[Job]) -> Outcome:
    """What a job means for those that depend on it; one that is not known any more will never do anything."""
    if other is None:
        return Outcome.NEVER
    complete = other.phase is Phase.COMPLETE
    started = other.attempts > 0
    return depend.outcome(kind, started=started, exit_status=(other.exit_status or 0) if complete else None)


class Schedule:
    """The order of the jobs in `records`."""

    def __init__(self, records: Records, server: str) -> None:
        self._records = records
        self._server = server

    def _queued(self) -> Iterator[Job]:
        return (job for job in self._records.jobs.values() if job.phase is Phase.QUEUED)

    def next(self, cluster: Cluster) -> Optional[Job]:
        """The job that may start now, if there is one: it waits for nothing, and its nodes are not offline."""
        ready = (
            (-job.asked.priority, place, job)
            for place, job in enumerate(self._queued())
            if job.letter == "Q" and cluster.can_start(job.node_request)
        )
        first = min(ready, default=None, key=lambda entry: entry[:2])
        return None if first is None else first[2]

    def pause_s(self) -> Optional[float]:
        """Seconds until the next job's date; None when no job waits for one."""
        now = time.time()
        return min((max(0.0, job.starts_in(now)) for job in self._queued() if job.letter == "W"), default=None)

    # --- dependencies

    def resolved(self, dependencies: Iterable[Dependency]) -> tuple[Dependency, ...]:
        """The dependencies of a new job, with whole ids. Raises Refused when a job is not known."""
        found = []
        for kind, text in dependencies:
            job_id = full_id(text, self._server)
            if job_id is None or job_id not in self._records.jobs:
                raise Refused(protocol.BAD_DEPEND, f"job {text} is not known")
            found.append((kind, job_id))
        return tuple(found)

    def dependents(self, ids: Collection[str]) -> list[Thing]:
        """What has not started and depends on one of these jobs."""
        return [thing for thing in self.dependent() if any(other in ids for _, other in thing.depends)]

    def dependent(self) -> list[Thing]:
        """What has not started because of other jobs."""
        return list(self._dependent())

    def _dependent(self) -> Iterator[Thing]:
        yield from (array for array in self._records.arrays.values() if array.depends)
        yield from (job for job in self._queued() if job.index is None and job.depends)

    def settle(self, thing: Thing) -> Optional[str]:
        """Drop the dependencies that are met. Gives the id of a job because of which one never can be.

        The record is written when something changed; what it lacks is found again from the jobs that ended.
        """
        outcomes = {pair: _outcome(pair[0], self._records.jobs.get(pair[1])) for pair in thing.depends}
        left = tuple(pair for pair, found in outcomes.items() if found is not Outcome.MET)
        if left != thing.depends:
            for job in jobs_of(thing):
                if job.phase is Phase.QUEUED:
                    job.depends = left
            thing.depends = left
            self._records.save_if_possible(thing)
        return next((other for (_, other), found in outcomes.items() if found is Outcome.NEVER), None)

    # --- holds

    def hold(self, thing: Thing) -> bool:
        """Keep jobs from starting, once they are queued again if they run. Raises Refused when they are complete.

        Gives whether one of them was not held before.
        """
        jobs = [job for job in jobs_of(thing) if job.phase is not Phase.COMPLETE]
        if not jobs:
            raise Refused(protocol.BAD_STATE, "invalid state for job - COMPLETE")
        new = not all(job.held for job in jobs)
        self._set_held(thing, True)
        return new

    def release(self, thing: Thing) -> None:
        """Let held jobs start. Raises Refused when nothing holds them."""
        jobs = [job for job in jobs_of(thing) if job.phase is not Phase.COMPLETE]
        if jobs and not any(job.held for job in jobs):
            raise Refused(protocol.NOT_HELD, "no user hold")
        self._set_held(thing, False)

    def _set_held(self, thing: Thing, held: bool) -> None:
        for job in jobs_of(thing):
            if job.phase is not Phase.COMPLETE:
                job.held = held
        thing.held = held
        self._records.save_things(thing)
