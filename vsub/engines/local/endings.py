"""How jobs end: they are completed, whoever waits for that is told, and after a while they are forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Optional

from vsub.engines.local import mom, workspace
from vsub.engines.local.arrays import Array
from vsub.engines.local.job import Job, Phase
from vsub.engines.local.machine import Cluster
from vsub.engines.local.records import Records
from vsub.engines.local.schedule import Schedule, Thing, jobs_of
from vsub.engines.local.settings import Settings
from vsub.engines.local.terminal import Terminal

log = logging.getLogger("vtorque-local")


class Endings:
    """The ends of the jobs in `records`."""

    def __init__(self, cluster: Cluster, settings: Settings, records: Records, schedule: Schedule) -> None:
        self.terminals: dict[str, Terminal] = {}
        """Those of interactive jobs that have not started."""
        self.farewells: set[asyncio.Task[None]] = set()
        self._cluster = cluster
        self._settings = settings
        self._records = records
        self._schedule = schedule
        self._waiters: dict[str, list[asyncio.Future[None]]] = {}

    # --- completing

    def complete(self, *jobs: Job) -> None:
        """Complete jobs, and those that can never start because of how these ended."""
        ended = list(jobs)
        while ended:
            for job in ended:
                self._complete(job)
            things = self._schedule.dependents({job.id for job in ended})
            ended = [job for thing in things for job in self._never(thing)]

    def end_queued(self, jobs: Iterable[Job], reason: str) -> int:
        """Complete those of the jobs that have not started; how many that were."""
        queued = [job for job in jobs if job.phase is Phase.QUEUED]
        for job in queued:
            job.exit_status, job.reason, job.depends = mom.DELETED, reason, ()
        self.complete(*queued)
        return len(queued)

    def settle(self, thing: Thing) -> None:
        """Look at what depends on other jobs: it may start, or never can."""
        self.complete(*self._never(thing))

    def _never(self, thing: Thing) -> list[Job]:
        """The jobs in `thing` that can never start; what they wait for no longer is settled."""
        culprit = self._schedule.settle(thing)
        if culprit is None:
            return []
        jobs = [job for job in jobs_of(thing) if job.phase is Phase.QUEUED]
        for job in jobs:
            job.depends, job.exit_status = (), mom.DELETED
            job.reason = f"Job deleted as result of dependency on job {culprit}"
        thing.depends = ()
        return jobs

    def _complete(self, job: Job) -> None:
        job.phase, job.completed = Phase.COMPLETE, time.time()
        try:
            self._remove_files(job)
            self._records.save(job)
        except OSError:
            log.exception("%s: its end cannot be recorded", job.id)
        log.info("%s: complete, exit status %s %s", job.id, job.exit_status, job.reason)
        if job.id in self.terminals:
            farewell = asyncio.ensure_future(self.terminals.pop(job.id).close())
            self.farewells.add(farewell)
            farewell.add_done_callback(self.farewells.discard)
        self._tell(job.id)
        array = self._array_of(job)
        if array is not None and array.complete:
            self._tell(array.id)
        self.forget_when_old(job)

    def _array_of(self, job: Job) -> Optional[Array]:
        return None if job.array_id is None else self._records.arrays.get(job.array_id)

    def _remove_files(self, job: Job) -> None:
        workspace.remove(self._cluster.layout.records, self._cluster.of_job(job.exec_host), job)
        array = self._array_of(job)
        if array is None or array.complete:
            self._records.script(job).unlink(missing_ok=True)

    # --- telling

    def _tell(self, name: str) -> None:
        for waiter in self._waiters.pop(name, []):
            if not waiter.done():
                waiter.set_result(None)

    @contextlib.contextmanager
    def completion(self, thing: Thing) -> Iterator[asyncio.Future[None]]:
        """A future that is done when the job or array is complete and its output delivered."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if all(job.phase is Phase.COMPLETE for job in jobs_of(thing)):
            waiter.set_result(None)
        waiters = self._waiters.setdefault(thing.id, [])
        waiters.append(waiter)
        try:
            yield waiter
        finally:
            waiters.remove(waiter)
            if not waiters and self._waiters.get(thing.id) is waiters:
                del self._waiters[thing.id]

    # --- forgetting

    def forget_when_old(self, job: Job) -> None:
        """Forget a job, with the array that it is in, some time after all of that is complete."""
        jobs = jobs_of(self._array_of(job) or job)
        if all(member.phase is Phase.COMPLETE for member in reversed(jobs)):
            age = time.time() - max(member.completed or 0.0 for member in jobs)
            self._forget_in(max(0.0, self._settings.keep_completed_s - age), job)

    def _forget_in(self, delay_s: float, job: Job) -> None:
        asyncio.get_running_loop().call_later(delay_s, self._forget, job)

    def _forget(self, job: Job) -> None:
        """Drop what is complete, but not while a hook of it is still running."""
        thing = self._array_of(job) or job
        if any(member.marks for member in jobs_of(thing)):
            self._forget_in(max(1.0, self._settings.keep_completed_s), job)
            return
        self._records.forget(thing)
