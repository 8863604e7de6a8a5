"""The daemon of the embedded batch system: runs its jobs one after another and completes them."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import logging
import os
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Callable, Optional

from vsub.engines.local import deliver, mom, process, protocol
from vsub.engines.local.job import Job, Phase
from vsub.engines.local.machine import Machine
from vsub.engines.local.mom import Attempt, Verdict, Why
from vsub.engines.local.protocol import Refused
from vsub.engines.local.records import Records
from vsub.engines.local.settings import Settings

log = logging.getLogger("vtorque-local")

Recovery = Callable[["Server", Job], Awaitable[None]]
"""What is done with a job that an earlier daemon had begun."""


class Server:
    """All jobs of one spool directory."""

    def __init__(self, machine: Machine, name: str, settings: Settings) -> None:
        self.machine = machine
        self.name = name
        self.settings = settings
        self.records = Records(machine.layout)
        self._queue: collections.deque[str] = collections.deque()
        self._attempt: Optional[Attempt] = None
        self._wake = asyncio.Event()
        self._stopping = False
        self._lingering: set[asyncio.Task[int]] = set()
        self._waiters: dict[str, list[asyncio.Future[None]]] = {}

    # --- running jobs

    def load(self) -> None:
        """Read what an earlier daemon left."""
        self.records.load()
        self._queue.extend(job.id for job in self.records.jobs.values() if job.phase is Phase.QUEUED)

    async def run(self, recover: Recovery, stop: asyncio.Event, close: Callable[[], None]) -> None:
        """Recover what an earlier daemon left, then run jobs until `stop` is set; then `close` and end what runs."""
        runner = asyncio.create_task(self._run_jobs(recover))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({stopped, runner}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        self._stopping = True
        close()
        if self._attempt is not None:
            self._attempt.interrupt(Why.STOP, self.settings.kill_delay_s)
        self._wake.set()
        try:
            await runner
        finally:
            for task in self._lingering:
                task.cancel()
            for job in list(self.records.jobs.values()):
                await self.end_marks(job)
        log.info("stopped")

    async def _run_jobs(self, recover: Recovery) -> None:
        for job in [job for job in self.records.jobs.values() if job.phase is not Phase.QUEUED]:
            await self._guarded(job, functools.partial(recover, self))
        while True:
            while not self._queue and not self._stopping:
                self._wake.clear()
                await self._wake.wait()
            if self._stopping:
                return
            await self._guarded(self.records.jobs[self._queue.popleft()], self._run)

    async def _guarded(self, job: Job, what: Callable[[Job], Awaitable[None]]) -> None:
        """A fault in one job must not stop the others: it is logged and the job ends, its epilogues included."""
        try:
            await what(job)
        except Exception as error:  # the last line of defence of a daemon
            log.exception("%s: fault", job.id)
            job.exit_status = mom.RETRY if job.exit_status is None else job.exit_status
            job.reason = f"fault of the batch server: {error}"
            for step in (self.end_marks, self._epilogues_after_fault):
                try:
                    await step(job)
                except Exception:
                    log.exception("%s: fault after a fault", job.id)
            self._complete(job)

    async def _epilogues_after_fault(self, job: Job) -> None:
        """End what the prologues of the job began, if they had their turn and the epilogues had not."""
        if job.phase in (Phase.PROLOGUE, Phase.RUNNING, Phase.EPILOGUE):
            job.phase = Phase.EPILOGUE
            attempt = Attempt(self.machine, job, self.settings, self.name, self.records.save_if_possible)
            await attempt.epilogues_after_fault()

    def attempt(self, job: Job) -> Attempt:
        """One start of a job."""
        return Attempt(self.machine, job, self.settings, self.name, self.records.save)

    async def _run(self, job: Job) -> None:
        """One attempt and what follows from it."""
        self._attempt = attempt = self.attempt(job)
        try:
            verdict = await attempt.run()
        finally:
            self._attempt = None
            if attempt.lingering is not None:
                self._lingering.add(attempt.lingering)
                attempt.lingering.add_done_callback(self._lingering.discard)
        if verdict is Verdict.REQUEUE:
            job.requeues += 1
            if job.requeues <= self.settings.requeue_limit:
                log.info("%s: requeued: %s", job.id, job.reason)
                self.requeue(job)
                return
            job.reason = f"aborted: requeued {self.settings.requeue_limit} times in a row, {job.reason}"
            self.append_error(job, f"=>> PBS: job {job.reason}\n")
            verdict = Verdict.DELIVER
        elif verdict is Verdict.AGAIN:
            job.requeues = 0
            self.requeue(job)
            return
        await self.finish(job, delivered=verdict is Verdict.DELIVER)

    def requeue(self, job: Job) -> None:
        """Back to the head of the queue; output so far is kept and added to."""
        job.phase, job.exit_status = Phase.QUEUED, None
        self.records.save(job)
        self._queue.appendleft(job.id)

    async def end_marks(self, job: Job) -> None:
        """End the sessions that are recorded for a job."""
        for mark in list(job.marks):
            await process.end_session(mark)
        if job.marks:
            job.marks = []
            self.records.save_if_possible(job)

    # --- the end of a job

    def append_error(self, job: Job, text: str) -> None:
        """Add a line to the job's standard error."""
        path = self.machine.layout.output_file(job.id, job.streams()[-1])
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, text.encode("utf-8", "backslashreplace"))
        finally:
            os.close(descriptor)

    async def finish(self, job: Job, *, delivered: bool) -> None:
        """Deliver the output and complete the job."""
        if delivered:
            job.phase = Phase.DELIVERY
            self.records.save(job)
            trouble = await deliver.send(
                self.machine,
                job,
                self.settings.deliver_timeout_s,
                record=functools.partial(self._mark, job),
                forget=functools.partial(self._unmark, job),
            )
            if trouble:
                log.warning("%s: %s", job.id, trouble)
                job.reason = "; ".join(filter(None, (job.reason, trouble)))
        self._complete(job)

    def _mark(self, job: Job, mark: process.Mark) -> None:
        job.marks.append(mark)
        self.records.save(job)

    def _unmark(self, job: Job, mark: process.Mark) -> None:
        job.marks = [known for known in job.marks if known != mark]
        self.records.save(job)

    def _complete(self, job: Job) -> None:
        job.phase, job.completed = Phase.COMPLETE, time.time()
        try:
            self._remove_files(job)
            self.records.save(job)
        except OSError:
            log.exception("%s: its end cannot be recorded", job.id)
        log.info("%s: complete, exit status %s %s", job.id, job.exit_status, job.reason)
        for waiter in self._waiters.pop(job.id, []):
            if not waiter.done():
                waiter.set_result(None)
        self.forget_later(job, self.settings.keep_completed_s)

    def _remove_files(self, job: Job) -> None:
        for path in (*map(Path, mom.files(self.machine, job)), self.records.script(job)):
            path.unlink(missing_ok=True)

    def forget_later(self, job: Job, delay_s: float) -> None:
        """Forget a completed job after a while."""
        asyncio.get_running_loop().call_later(delay_s, self._forget, job)

    def _forget(self, job: Job) -> None:
        """Drop a completed job, but not while a hook of it is still running."""
        if job.marks:
            self.forget_later(job, max(1.0, self.settings.keep_completed_s))
            return
        self.records.forget(job)

    # --- what clients want

    def refuse_if_stopping(self) -> None:
        """Raise Refused when no job can be taken any more."""
        if self._stopping:
            raise Refused(protocol.SYSTEM, "the batch server is stopping")

    def submit(self, job: Job) -> None:
        """Take a new job whose script is in place."""
        self.records.add(job)
        self._queue.append(job.id)
        self._wake.set()
        log.info("%s: queued by %s", job.id, job.owner.name)

    def delete(self, job: Job, delay_s: float) -> None:
        """End a job; `delay_s` lies between TERM and KILL. Raises Refused when it has ended or is being ended."""
        if job.phase is Phase.QUEUED:
            self._queue.remove(job.id)
            job.reason, job.exit_status = Why.DELETE.value, mom.DELETED
            self._complete(job)
        elif self._attempt is None or self._attempt.job is not job or not self._attempt.interrupt(Why.DELETE, delay_s):
            raise Refused(protocol.BAD_STATE, f"invalid state for job - {job.phase.name}")
        log.info("%s: deleted", job.id)

    def rerun(self, job: Job) -> None:
        """End a running job and queue it again. Raises Refused when it does not run."""
        if self._attempt is None or self._attempt.job is not job or not self._attempt.interrupt(Why.RERUN, 0.0):
            raise Refused(protocol.BAD_STATE, f"invalid state for job - {job.phase.name}")

    @contextlib.contextmanager
    def completion(self, job: Job) -> Iterator[asyncio.Future[None]]:
        """A future that is done when the job is complete and its output delivered."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if job.phase is Phase.COMPLETE:
            waiter.set_result(None)
        waiters = self._waiters.setdefault(job.id, [])
        waiters.append(waiter)
        try:
            yield waiter
        finally:
            waiters.remove(waiter)
            if not waiters and self._waiters.get(job.id) is waiters:
                del self._waiters[job.id]
