"""Runs one job once: hooks, script, signals and limits, in the order and with the statuses of a mom."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import resource
import secrets
import signal
import time
from collections.abc import Iterator
from typing import Callable, NamedTuple, Optional

from vsub.engines.local import hooks, process, resources, workspace
from vsub.engines.local.hooks import Hook, Kind
from vsub.engines.local.job import Job, Phase
from vsub.engines.local.machine import Cluster, Machine, exec_host
from vsub.engines.local.process import Child, Mark, Program, Streams
from vsub.engines.local.settings import Settings
from vsub.engines.local.terminal import Terminal

log = logging.getLogger("vtorque-local")

ABORTED = -2  # JOB_EXEC_FAIL2
RETRY = -3  # JOB_EXEC_RETRY
DELETED = 256 + signal.SIGTERM
ALARM = -4
"""Status of a hook that prologalarm ended."""
SISTER_BLOCKS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""What the epilogues of sisters do not get."""


class Verdict(enum.Enum):
    """What becomes of a job after an attempt."""

    DELIVER = "deliver"
    DISCARD = "discard"  # aborted by a prologue: complete, output not delivered
    REQUEUE = "requeue"  # a prologue failed
    AGAIN = "again"  # wanted by somebody: does not count as a failure


class Why(enum.Enum):
    """Who ends an attempt early."""

    DELETE = "deleted"
    GONE = "its qsub has gone"
    RERUN = "rerun"
    STOP = "batch server stopped"


class Interrupt(NamedTuple):
    """A wish to end the attempt; `delay_s` is the time between TERM and KILL."""

    why: Why
    delay_s: float


def alarm_limit(prologalarm_s: float) -> float:
    """How long a hook may take: TORQUE fires ten seconds early when there are more than ten."""
    return prologalarm_s - 10 if prologalarm_s > 10 else prologalarm_s


def limits(job: Job) -> tuple[tuple[int, int], ...]:
    """The process limits that follow from the job's resources."""
    found: dict[int, int] = {}
    for name, which, read in (
        ("file", resource.RLIMIT_FSIZE, resources.size_bytes),
        ("pcput", resource.RLIMIT_CPU, resources.seconds),
        ("cput", resource.RLIMIT_CPU, resources.seconds),
        ("pmem", resource.RLIMIT_DATA, resources.size_bytes),
        ("pvmem", resource.RLIMIT_AS, resources.size_bytes),
    ):
        text = job.resource(name)
        if text is not None:
            value = read(text)
            found[which] = min(value, found.get(which, value))
    return tuple(found.items())


class Attempt:
    """One start of one job. `run` does it; `interrupt` ends it early."""

    def __init__(
        self,
        cluster: Cluster,
        job: Job,
        settings: Settings,
        server: str,
        save: Callable[[Job], None],
        terminal: Optional[Terminal] = None,
    ) -> None:
        self.job = job
        self._terminal = terminal
        self.lingering: Optional[asyncio.Task[None]] = None
        self._cluster = cluster
        self._absent: set[int] = set()
        self._failed = "prologue"
        self._settings = settings
        self._server = server
        self._save = save
        self._interrupt: Optional[Interrupt] = None
        self._interrupted = asyncio.Event()
        self._limit_s = alarm_limit(settings.prologalarm_s)
        self._streams = Streams(-1, -1, -1)

    @property
    def _machines(self) -> tuple[Machine, ...]:
        """The job's nodes, the mother superior first."""
        return self._cluster.of_job(self.job.exec_host)

    @property
    def _superior(self) -> Machine:
        return self._machines[0]

    @property
    def interruptible(self) -> bool:
        """Whether the end can still be asked for, and nobody has."""
        return self._interrupt is None and self.job.phase in (Phase.PROLOGUE, Phase.RUNNING)

    def interrupt(self, why: Why, delay_s: float) -> bool:
        """Ask for the end; False when it is too late or was asked for already."""
        if not self.interruptible:
            return False
        self._interrupt = Interrupt(why, delay_s)
        self._interrupted.set()
        return True

    # --- the whole of it

    async def run(self) -> Verdict:
        """Hooks, script, hooks, after `prepare`. A prologue of a deleted job may still run then: see `lingering`."""
        prologues = asyncio.create_task(self._prologues())
        try:
            await self._first(prologues)
            if self._interrupt is not None and self._interrupt.why is Why.STOP:
                await self._kill_sessions()
                await prologues
            if self._interrupt is not None:
                verdict = self._interrupted_early(self._interrupt)
            elif prologues.result() == 0:
                verdict = await self._script()
            else:
                verdict = self._prologue_failed(prologues.result())
            self._advance(Phase.EPILOGUE)
            await self._leave_terminal(drain=prologues.done())
            await self.epilogues()
            if verdict is Verdict.AGAIN:
                await prologues  # two starts of one job never overlap
            return verdict
        finally:
            if prologues.done():
                await self.close()
            else:
                self.lingering = asyncio.ensure_future(self._linger(prologues))

    async def _linger(self, prologues: asyncio.Task[int]) -> None:
        try:
            await prologues
        finally:
            await self.close()

    async def resume_epilogues(self) -> None:
        """The epilogues of an attempt that an earlier daemon began."""
        self._open_streams()
        try:
            await self.epilogues()
        finally:
            await self.close()

    async def epilogues_after_fault(self) -> None:
        """The epilogues as far as they can run: nothing that goes wrong keeps the next one from its turn."""
        try:
            self._open_streams()
        except OSError as error:
            log.error("%s: its epilogues have no output: %s", self.job.id, error)
            self._streams = workspace.nowhere()
        try:
            await self._leave_sisters()
            arguments = hooks.epilogue_arguments(self._superior, self.job)
            for hook in hooks.epilogues(self._superior.hooks, self.job):
                try:
                    await self._hook(hook, arguments, 0o022, self._limit_s)
                except OSError:
                    log.exception("%s: %s cannot be run", self.job.id, hook.path)
            self._remove_task_files()
        finally:
            await self.close()

    async def _first(self, task: asyncio.Task[int]) -> None:
        """Wait for the end of `task` or for an interrupt."""
        interrupted = asyncio.ensure_future(self._interrupted.wait())
        await asyncio.wait({task, interrupted}, return_when=asyncio.FIRST_COMPLETED)
        interrupted.cancel()

    def _interrupted_early(self, interrupt: Interrupt) -> Verdict:
        if interrupt.why is not Why.DELETE and not self.job.asked.interactive:
            return Verdict.AGAIN
        self.job.exit_status, self.job.reason = DELETED, interrupt.why.value
        return Verdict.DELIVER

    def _prologue_failed(self, status: int) -> Verdict:
        """What a prologue's status means: an interactive job is never queued again."""
        aborted = (status == 1 and not self._absent) or self.job.asked.interactive
        self.job.exit_status = ABORTED if aborted else RETRY
        what = "was ended by prologalarm" if status == ALARM else f"ended with {status}"
        self.job.reason = f"{self._failed} {what}"
        return Verdict.DISCARD if aborted else Verdict.REQUEUE

    # --- files

    def prepare(self) -> None:
        """Record the start and make its files: script, node file, output. Raises OSError."""
        job = self.job
        lines = self._cluster.allocate(job.node_request, now=True)
        job.exec_host, job.processors = exec_host(lines), len(lines)
        job.cookie = secrets.token_hex(16).upper()
        job.attempts += 1
        job.script_started, job.session, job.started, job.used = False, 0, None, {}
        job.exit_status, job.reason = None, ""
        self._advance(Phase.PROLOGUE)
        workspace.make(self._cluster.layout.records, self._superior, job, lines)
        self._open_streams()

    def _open_streams(self) -> None:
        wish = self.job.asked.terminal
        if wish is None:
            self._streams = workspace.open_output(self._cluster.layout.records, self._superior, self.job)
            return
        self._streams = workspace.nowhere()
        if self._terminal is not None:
            slave = self._terminal.open(wish, self.job.owner)
            self._streams = Streams(self._streams.stdin, slave, slave)

    async def _leave_terminal(self, *, drain: bool) -> None:
        """Let qsub go; what is still written goes nowhere. TORQUE's epilogues do not reach the terminal either."""
        if self._terminal is None:
            return
        null, slave = self._streams.stdin, self._streams.stdout
        self._streams = Streams(null, null, null)
        os.close(slave)
        await self._terminal.finish(drain=drain)

    async def close(self) -> None:
        """Let go of the job's streams and terminal."""
        for descriptor in {*self._streams} - {-1}:
            os.close(descriptor)
        self._streams = Streams(-1, -1, -1)
        if self._terminal is not None:
            await self._terminal.close()

    def _advance(self, phase: Phase) -> None:
        self.job.phase = phase
        self._save(self.job)

    # --- processes

    def _record(self, mark: Mark) -> None:
        self.job.marks.append(mark)
        self._save(self.job)

    def _forget(self, mark: Mark) -> None:
        self.job.marks = [known for known in self.job.marks if known != mark]
        self._save(self.job)

    async def _kill_sessions(self) -> None:
        for mark in list(self.job.marks):
            await process.end_session(mark)

    async def _hook(
        self,
        hook: Hook,
        arguments: tuple[str, ...],
        umask: int,
        limit_s: float,
        *,
        index: int = 0,
        blocked: tuple[signal.Signals, ...] = (),
    ) -> int:
        """Run one hook on a node of the job; its exit status, ALARM when it took too long, 0 when there is none."""
        job, begun, machine = self.job, time.monotonic(), self._machines[index]
        if hook.kind is not Kind.JOB_USER and not os.path.lexists(hook.find()):
            return 0
        root = hook.kind is Kind.ROOT
        program = Program(
            path=hook.path,
            argv=(hook.path, *arguments),
            environment=tuple(hooks.environment(self._machines, index, job).items()),
            directory=os.fspath(machine.layout.mom_priv) if root else job.owner.home,
            umask=umask,
            blocked=blocked,
            find=hook.find,
            check=lambda path: hook.check(path, job.owner.uid),
        )
        with self._streams_on(index) as streams:
            child = process.start(
                process.become(program),
                identity=process.ROOT if root else job.owner.identity,
                streams=streams,
                record=self._record,
                place=machine.place,
            )
        ended = await child.wait(limit_s)
        if ended is None:
            status = ALARM
            await process.end_session(child.mark)
            await child.wait(5)
        else:
            status = ended.status
        if child.ended:
            self._forget(child.mark)
        where = f"{machine.name}: " if machine.place else ""
        log.info("%s: %s%s: status %d after %.3f s", job.id, where, hook.path, status, time.monotonic() - begun)
        return status

    @contextlib.contextmanager
    def _streams_on(self, index: int) -> Iterator[Streams]:
        """The streams of a hook: the job's on the mother superior, on sisters they lead nowhere."""
        streams = workspace.nowhere() if index else self._streams
        try:
            yield streams
        finally:
            if index:
                os.close(streams.stdin)

    async def _prologues(self) -> int:
        """All prologues until one fails; their time in all is bounded too. A deleted job's go on."""
        deadline = time.monotonic() + self._limit_s
        if len(self._machines) > 1:
            status = await self._join_sisters(deadline)
            if status != 0:
                return status
        arguments = hooks.prologue_arguments(self._superior, self.job)
        for hook in hooks.prologues(self._superior.hooks, self.job):
            if self._interrupt is not None and self._interrupt.why is Why.STOP:
                return RETRY
            status = await self._hook(hook, arguments, 0o077, max(0.0, deadline - time.monotonic()))
            if status != 0:
                return status
        return 0

    async def epilogues(self) -> None:
        """All epilogues, whatever they end with: the sisters', then the mother superior's."""
        await self._leave_sisters()
        arguments = hooks.epilogue_arguments(self._superior, self.job)
        for hook in hooks.epilogues(self._superior.hooks, self.job):
            await self._hook(hook, arguments, 0o022, self._limit_s)
        self._remove_task_files()

    # --- sisters

    async def _join_sisters(self, deadline: float) -> int:
        """The prologues of all sisters, beside each other, then the task files; 0 or the status of one that failed.

        When the attempt is to end, the mother superior's prologues have no turn any more, and no task file appears.
        """
        ended = await asyncio.gather(*(self._join(index, deadline) for index in range(1, len(self._machines))))
        if self._interrupt is not None:
            return RETRY
        failed = next((status for status in ended if status != 0), 0)
        if failed == 0:
            for machine in reversed(self._machines):
                workspace.write_task_file(machine, self.job)
        return failed

    async def _join(self, index: int, deadline: float) -> int:
        """The prologues of one sister until one fails, after which she has no epilogues."""
        machine = self._machines[index]
        arguments = hooks.prologue_arguments(machine, self.job)
        for hook in hooks.sister_prologues(machine.hooks, self.job):
            if self._interrupt is not None and self._interrupt.why is Why.STOP:
                return RETRY
            try:
                status = await self._hook(hook, arguments, 0o022, max(0.0, deadline - time.monotonic()), index=index)
            except OSError as error:
                log.error("%s: %s: %s: %s", self.job.id, machine.name, hook.path, error)
                status = RETRY
            if status != 0:
                if self._interrupt is None:
                    self._absent.add(index)
                    self._failed = f"{hook.path.rpartition('/')[2]} on {machine.name}"
                return status
        return 0

    async def _leave_sisters(self) -> None:
        """The epilogues of all sisters that have joined, beside each other, whatever they end with."""
        sisters = set(range(1, len(self._machines))) - self._absent
        await asyncio.gather(*(self._leave(index) for index in sisters))

    async def _leave(self, index: int) -> None:
        machine = self._machines[index]
        arguments = hooks.epilogue_arguments(machine, self.job, sister=True)
        for hook in hooks.sister_epilogues(machine.hooks, self.job):
            try:
                await self._hook(hook, arguments, 0o022, self._limit_s, index=index, blocked=SISTER_BLOCKS)
            except OSError as error:
                log.error("%s: %s: %s: %s", self.job.id, machine.name, hook.path, error)

    def _remove_task_files(self) -> None:
        """Those of a job with several nodes go with each attempt, those of others with the job."""
        if len(self._machines) > 1:
            for machine in self._machines:
                workspace.task_file(machine, self.job).unlink(missing_ok=True)

    # --- the script

    def _program(self) -> Program:
        """The job's shell, which reads the script's name from its input, or is the user's with `qsub -I`."""
        job = self.job
        shell, nice = job.asked.shell or job.owner.shell, job.resource("nice")
        return Program(
            path=shell,
            argv=(f"-{shell.rpartition('/')[2]}", *(("-c", job.asked.command) if job.asked.command else ())),
            environment=tuple(hooks.job_environment(self._superior, job, self._server).items()),
            directory=job.asked.init_dir or job.owner.home,
            umask=job.asked.umask,
            limits=limits(job),
            nice=int(nice) if nice else 0,
            ignore_sigpipe=False,
            terminal=job.asked.interactive,
        )

    def _start_script(self) -> Child:
        job = self.job
        script = self._superior.layout.jobs / f"{job.prefix}.SC"
        line = f"{script} {job.asked.arguments}".rstrip(" ") if job.asked.arguments else os.fspath(script)

        def record(mark: Mark) -> None:
            job.session, job.script_started, job.started = mark.pid, True, time.time()
            job.phase = Phase.RUNNING
            self._record(mark)

        def begin(stdin: int) -> Child:
            streams = self._streams._replace(stdin=stdin)
            return process.start(
                process.become(self._program()),
                identity=job.owner.identity,
                streams=streams,
                record=record,
                place=self._superior.place,
            )

        if job.asked.interactive:
            return begin(self._streams.stdout)
        stdin, feed = os.pipe()
        try:
            os.write(feed, os.fsencode(line) + b"\n")
            os.close(feed)
            return begin(stdin)
        finally:
            os.close(stdin)

    async def _script(self) -> Verdict:
        """Run the job's script to its end, by itself, by its walltime or by an interrupt."""
        job, begun = self.job, time.monotonic()
        if len(self._machines) == 1:
            workspace.write_task_file(self._superior, job)
        child = self._start_script()
        log.info("%s: script started, session %d", job.id, child.mark.pid)
        walltime = job.resource("walltime")
        limit = resources.seconds(walltime) if walltime is not None else None
        ended = asyncio.ensure_future(child.wait())
        interrupted = asyncio.ensure_future(self._interrupted.wait())
        timeout = None if limit is None else limit + 1  # TORQUE counts whole seconds and kills beyond the limit
        await asyncio.wait({ended, interrupted}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not child.ended:
            if self._interrupt is not None:
                await self._cancel(child, self._interrupt)
            else:
                spent = int(time.monotonic() - begun)
                job.reason = f"walltime {spent} exceeded limit {limit}"
                self._tell(f"=>> PBS: job killed: {job.reason}\n")
                await self._terminate(child, self._settings.kill_delay_s)
        interrupted.cancel()
        await process.end_session(child.mark)
        result = await child.wait(5)
        ended.cancel()
        wall = time.monotonic() - begun
        if result is None:
            log.error("%s: process %d cannot be killed", job.id, child.mark.pid)
            result = process.Ended(128 + signal.SIGKILL, signal.SIGKILL, 0.0, 0)
        else:
            self._forget(child.mark)
        job.exit_status = 256 + result.signal if result.signal else result.status
        job.used = {
            "cput": resources.clock(result.cpu_s),
            "mem": f"{result.memory_kib}kb",
            "vmem": "0kb",
            "walltime": resources.clock(wall),
        }
        again = self._interrupt is not None and self._interrupt.why is Why.RERUN
        return Verdict.AGAIN if again else Verdict.DELIVER

    async def _cancel(self, child: Child, interrupt: Interrupt) -> None:
        """End a running script because somebody wants it."""
        self.job.reason = interrupt.why.value
        if interrupt.why is Why.RERUN:
            await process.end_session(child.mark)
            return
        if interrupt.why is Why.DELETE:
            arguments = hooks.epilogue_arguments(self._superior, self.job)
            await self._hook(hooks.precancel(self._superior.hooks, self.job), arguments, 0o022, self._limit_s)
        number = signal.SIGHUP if interrupt.why is Why.GONE else signal.SIGTERM
        await self._terminate(child, interrupt.delay_s, number)

    async def _terminate(self, child: Child, delay_s: float, number: int = signal.SIGTERM) -> None:
        """TERM to the session, and time for all of it to end by itself: the shell around a script dies at once."""
        process.signal_session(child.mark, number)
        await process.session_ended(child.mark, delay_s)

    def _tell(self, text: str) -> None:
        """A line for whoever reads the job's standard error; a terminal is never waited for."""
        if self._terminal is not None:
            self._terminal.say(text)
        else:
            os.write(self._streams.stderr, text.encode())
