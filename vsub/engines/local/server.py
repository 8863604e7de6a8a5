"""The daemon of the embedded batch system: runs its jobs one after another and completes them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
from collections.abc import Awaitable, Iterable
from typing import Callable, Optional

from vsub.engines.local import deliver, mom, process, protocol, workspace
from vsub.engines.local.arrays import Array
from vsub.engines.local.endings import Endings
from vsub.engines.local.job import Job, Phase
from vsub.engines.local.machine import Cluster, Machine
from vsub.engines.local.mom import Attempt, Verdict, Why
from vsub.engines.local.protocol import Refused
from vsub.engines.local.records import Records, write_whole
from vsub.engines.local.schedule import Schedule, Thing, jobs_of
from vsub.engines.local.settings import Settings
from vsub.engines.local.terminal import Terminal

log = logging.getLogger("vtorque-local")

Recovery = Callable[["Server", Job], Awaitable[None]]
"""What is done with a job that an earlier daemon had begun."""


class Server:
    """All jobs of one spool directory."""

    def __init__(self, cluster: Cluster, name: str, settings: Settings) -> None:
        self.cluster = cluster
        self.name = name
        self.settings = settings
        self.records = Records(cluster.layout)
        self.schedule = Schedule(self.records, name)
        self.endings = Endings(cluster, settings, self.records, self.schedule)
        self._attempt: Optional[Attempt] = None
        self._wake = asyncio.Event()
        self._stopping = False
        self._lingering: set[asyncio.Task[None]] = set()

    # --- running jobs

    def load(self) -> None:
        """Read what an earlier daemon left. Interactive jobs have ended with it: their qsub has gone."""
        self.records.load()
        with contextlib.suppress(FileNotFoundError):
            self._know_offline(json.loads(self.cluster.layout.offline.read_bytes()))
        jobs = [job for job in self.records.jobs.values() if job.asked.interactive]
        self.endings.end_queued(jobs, Why.STOP.value)

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
        self.endings.end_queued([self.records.jobs[name] for name in self.endings.terminals], Why.STOP.value)
        try:
            await runner
        finally:
            for task in self._lingering:
                task.cancel()
            await asyncio.gather(*self._lingering, *self.endings.farewells, return_exceptions=True)
            for job in list(self.records.jobs.values()):
                await self.end_marks(job)
        log.info("stopped")

    async def _run_jobs(self, recover: Recovery) -> None:
        for job in [job for job in self.records.jobs.values() if job.phase is not Phase.QUEUED]:
            await self._guarded(job, functools.partial(recover, self))
        for thing in self.schedule.dependent():
            self.endings.settle(thing)
        while not self._stopping:
            self._wake.clear()
            ready = self.schedule.next(self.cluster)
            if ready is not None:
                await self._guarded(ready, self._run)
            else:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self.schedule.pause_s())

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
            self.endings.complete(job)

    async def _epilogues_after_fault(self, job: Job) -> None:
        """End what the prologues of the job began, if they had their turn and the epilogues had not."""
        if job.phase in (Phase.PROLOGUE, Phase.RUNNING, Phase.EPILOGUE):
            job.phase = Phase.EPILOGUE
            attempt = Attempt(self.cluster, job, self.settings, self.name, self.records.save_if_possible)
            await attempt.epilogues_after_fault()

    def attempt(self, job: Job, terminal: Optional[Terminal] = None) -> Attempt:
        """One start of a job."""
        return Attempt(self.cluster, job, self.settings, self.name, self.records.save, terminal)

    async def _run(self, job: Job) -> None:
        """One attempt and what follows from it."""
        terminal = self.endings.terminals.pop(job.id, None)
        self._attempt = attempt = self.attempt(job, terminal)
        try:
            attempt.prepare()
            for thing in self.schedule.dependents({job.id}):
                self.endings.settle(thing)
            verdict = await attempt.run()
        finally:
            self._attempt = None
            if attempt.lingering is None:
                await attempt.close()
            else:
                self._lingering.add(attempt.lingering)
                attempt.lingering.add_done_callback(self._lingering.discard)
        if verdict is Verdict.REQUEUE:
            job.requeues += 1
            if job.requeues <= self.settings.requeue_limit:
                log.info("%s: requeued: %s", job.id, job.reason)
                self.requeue(job)
                return
            job.reason = f"aborted: requeued {self.settings.requeue_limit} times in a row, {job.reason}"
            workspace.append_error(self.superior(job), job, f"=>> PBS: job {job.reason}\n")
            verdict = Verdict.DELIVER
        elif verdict is Verdict.AGAIN:
            job.requeues = 0
            self.requeue(job)
            return
        await self.finish(job, delivered=verdict is Verdict.DELIVER)

    def requeue(self, job: Job) -> None:
        """Back to where the job was in the queue, held if it is to be; output so far is kept and added to."""
        workspace.leave(self.cluster.layout.records, self.cluster.of_job(job.exec_host), job)
        job.phase, job.exit_status, job.exec_host, job.rerun = Phase.QUEUED, None, "", False
        self.records.save(job)

    async def end_marks(self, job: Job) -> None:
        """End the sessions that are recorded for a job."""
        for mark in list(job.marks):
            await process.end_session(mark)
        if job.marks:
            job.marks = []
            self.records.save_if_possible(job)

    def superior(self, job: Job) -> Machine:
        """The job's mother superior."""
        return self.cluster.of_job(job.exec_host)[0]

    # --- the end of a job

    async def finish(self, job: Job, *, delivered: bool) -> None:
        """Deliver the output and complete the job."""
        if delivered and not job.asked.interactive:
            job.phase = Phase.DELIVERY
            self.records.save(job)
            trouble = await deliver.send(
                self.superior(job),
                job,
                self.settings.deliver_timeout_s,
                record=functools.partial(self._mark, job),
                forget=functools.partial(self._unmark, job),
            )
            if trouble:
                log.warning("%s: %s", job.id, trouble)
                job.reason = "; ".join(filter(None, (job.reason, trouble)))
        self.endings.complete(job)

    def _mark(self, job: Job, mark: process.Mark) -> None:
        job.marks.append(mark)
        self.records.save(job)

    def _unmark(self, job: Job, mark: process.Mark) -> None:
        job.marks = [known for known in job.marks if known != mark]
        self.records.save(job)

    # --- what clients want

    def refuse_if_stopping(self) -> None:
        """Raise Refused when no job can be taken any more."""
        if self._stopping:
            raise Refused(protocol.SYSTEM, "the batch server is stopping")

    def submit(self, thing: Thing, terminal: Optional[Terminal] = None) -> None:
        """Take a new job or array whose script is in place; the qsub of an interactive job gets its answer."""
        self.records.add(thing)
        if terminal is not None:
            terminal.answer({"job": thing.id})
            self.endings.terminals[thing.id] = terminal
        log.info("%s: queued by %s", thing.id, thing.owner.name)
        if thing.depends:
            self.endings.settle(thing)
        self._wake.set()

    def delete(self, thing: Thing, delay_s: float) -> None:
        """End a job, or all members of an array; `delay_s` lies between TERM and KILL.

        Raises Refused when it has ended or is being ended.
        """
        if not self._delete_jobs(jobs_of(thing), Why.DELETE, delay_s):
            phase = thing.phase.name if isinstance(thing, Job) else "COMPLETE"
            raise Refused(protocol.BAD_STATE, f"invalid state for job - {phase}")
        log.info("%s: deleted", thing.id)

    def _delete_jobs(self, jobs: list[Job], why: Why, delay_s: float) -> int:
        """End what can be ended; how many jobs that was."""
        count = self.endings.end_queued(jobs, why.value)
        if self._attempt is not None and any(job is self._attempt.job for job in jobs):
            count += self._attempt.interrupt(why, delay_s)
        self._wake.set()  # others may have waited for them
        return count

    def qsub_gone(self, job: Job) -> None:
        """The qsub of an interactive job has gone, which ends the job."""
        if self._delete_jobs([job], Why.GONE, self.settings.kill_delay_s):
            log.info("%s: its qsub has gone", job.id)

    def rerun(self, thing: Thing, *, operator: bool) -> None:
        """End a running job and queue it again; nothing is done for one that is queued.

        That it is to be queued again is recorded first, and outlives this daemon. Raises Refused, in this order, when
        the job is in another state, when it is not an operator who asks, when the job may not run again.
        """
        if isinstance(thing, Array):
            raise Refused(protocol.INVALID, "an array cannot be rerun, only its members")
        if thing.letter == "Q":
            return
        attempt = self._attempt
        if attempt is None or attempt.job is not thing or not attempt.interruptible:
            raise Refused(protocol.BAD_STATE, f"job {thing.id} is in a bad state")
        if not operator:
            raise Refused(protocol.PERMISSION, "only root, as an operator, may rerun jobs")
        if not thing.asked.rerunnable:
            raise Refused(protocol.NO_RERUN, f"job {thing.id} not rerunnable")
        thing.rerun = True
        try:
            self.records.save(thing)
        except OSError:
            thing.rerun = False
            raise
        attempt.interrupt(Why.RERUN, 0.0)
        log.info("%s: to be queued again", thing.id)

    def set_offline(self, node: object, offline: bool) -> None:
        """Give no more jobs to a node, or give it jobs again; what runs there goes on. Raises Refused, OSError."""
        if node not in {machine.name for machine in self.cluster.machines}:
            raise Refused(protocol.UNKNOWN_NODE, f"{node!r}")
        names = self.cluster.offline | {str(node)} if offline else self.cluster.offline - {str(node)}
        write_whole(self.cluster.layout.offline, json.dumps(sorted(names)).encode("ascii"))
        self._know_offline(names)
        log.info("node %s is %s", node, "offline" if offline else "online")
        self._wake.set()

    def _know_offline(self, names: Iterable[str]) -> None:
        self.cluster = self.cluster._replace(offline=frozenset(names))

    def release(self, thing: Thing) -> None:
        """Let held jobs start. Raises Refused when nothing holds them."""
        self.schedule.release(thing)
        self._wake.set()
