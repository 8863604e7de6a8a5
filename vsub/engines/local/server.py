"""The daemon of the embedded batch system: its queue, its answers to clients, its recovery after a crash.

Jobs run in the order of submission, one at a time. A job is stored before its submission is answered and at
every change of its phase; a daemon that was killed finds in these records which sessions are left to be
ended.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import json
import logging
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, Optional

from vsub.engines.local import deliver, mom, process, protocol
from vsub.engines.local.job import Account, Job, Phase, Submission, attributes, full_id
from vsub.engines.local.machine import Machine
from vsub.engines.local.mom import Attempt, Verdict, Why
from vsub.engines.local.protocol import Peer, ProtocolError, Refused
from vsub.engines.local.settings import Settings

log = logging.getLogger("vtorque-local")

REQUEST_TIMEOUT_S = 60.0
MAX_CONNECTIONS = 512
MAX_CONNECTIONS_PER_USER = 64
MAX_ARRIVING = 256
MAX_ARRIVING_PER_USER = 32
"""Scripts on their way at one time: half of a user's connections, so that a slow network leaves some for the rest."""
MAX_ARRIVING_BYTES = 1 << 30
"""Size of all scripts on their way. Those of one user count with the scripts that are there already."""
ABORTED_BY_RESTART = -4  # JOB_EXEC_INITABT

Answer = dict[str, Any]


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file in one step; what was there before survives a crash."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb", opener=functools.partial(os.open, mode=0o600)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Server:
    """All jobs of one spool directory."""

    def __init__(self, machine: Machine, name: str, settings: Settings) -> None:
        self._machine = machine
        self._layout = machine.layout
        self._name = name
        self._settings = settings
        self._jobs: dict[str, Job] = {}
        self._queue: collections.deque[str] = collections.deque()
        self._attempt: Optional[Attempt] = None
        self._wake = asyncio.Event()
        self._stopping = False
        self._lingering: set[asyncio.Task[int]] = set()
        self._connections: dict[int, int] = {}
        self._arriving: list[tuple[int, int]] = []
        self._waiters: dict[str, list[asyncio.Future[None]]] = {}

    # --- records

    def _record_path(self, job_id: str) -> Path:
        return self._layout.records / f"{job_id}.json"

    def _save(self, job: Job) -> None:
        if job.id in self._jobs:
            write_whole(self._record_path(job.id), json.dumps(job.to_json()).encode("ascii"))

    def _save_if_possible(self, job: Job) -> None:
        """What must go on without its record: the end of what runs."""
        try:
            self._save(job)
        except OSError:
            log.exception("%s: cannot be recorded", job.id)

    def _load(self) -> None:
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
            self._jobs[job.id] = job
            if job.phase is Phase.QUEUED:
                self._queue.append(job.id)
        for path in self._layout.records.glob("*.SC"):
            if path.stem not in self._jobs:
                path.unlink()

    def _next_number(self) -> int:
        path = self._layout.private / "seq"
        try:
            number = int(path.read_text(encoding="ascii")) + 1
        except FileNotFoundError:
            number = 1
        write_whole(path, str(number).encode("ascii"))
        return number

    # --- running jobs

    async def serve(self, listener: Any, stop: asyncio.Event, ready: Callable[[], None]) -> None:
        """Answer clients and run jobs until `stop` is set; then end what runs."""
        self._load()
        server = await asyncio.start_unix_server(self._connected, sock=listener, limit=protocol.MAX_REQUEST)
        runner = asyncio.create_task(self._run_jobs())
        ready()
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({stopped, runner}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        self._stopping = True
        server.close()
        if self._attempt is not None:
            self._attempt.interrupt(Why.STOP, self._settings.kill_delay_s)
        self._wake.set()
        try:
            await runner
        finally:
            for task in self._lingering:
                task.cancel()
            for job in list(self._jobs.values()):
                await self._end_marks(job)
        log.info("stopped")

    async def _run_jobs(self) -> None:
        for job in [job for job in self._jobs.values() if job.phase is not Phase.QUEUED]:
            await self._guarded(job, self._recover)
        while True:
            while not self._queue and not self._stopping:
                self._wake.clear()
                await self._wake.wait()
            if self._stopping:
                return
            await self._guarded(self._jobs[self._queue.popleft()], self._run)

    async def _guarded(self, job: Job, what: Callable[[Job], Awaitable[None]]) -> None:
        """A fault in one job must not stop the others: it is logged and the job ends, its epilogues included."""
        try:
            await what(job)
        except Exception as error:  # the last line of defence of a daemon
            log.exception("%s: fault", job.id)
            job.exit_status = mom.RETRY if job.exit_status is None else job.exit_status
            job.reason = f"fault of the batch server: {error}"
            for step in (self._end_marks, self._epilogues_after_fault):
                try:
                    await step(job)
                except Exception:
                    log.exception("%s: fault after a fault", job.id)
            self._complete(job)

    async def _epilogues_after_fault(self, job: Job) -> None:
        """End what the prologues of the job began, if they had their turn and the epilogues had not."""
        if job.phase in (Phase.PROLOGUE, Phase.RUNNING, Phase.EPILOGUE):
            job.phase = Phase.EPILOGUE
            attempt = Attempt(self._machine, job, self._settings, self._name, self._save_if_possible)
            await attempt.epilogues_after_fault()

    async def _run(self, job: Job) -> None:
        """One attempt and what follows from it."""
        self._attempt = attempt = Attempt(self._machine, job, self._settings, self._name, self._save)
        try:
            verdict = await attempt.run()
        finally:
            self._attempt = None
            if attempt.lingering is not None:
                self._lingering.add(attempt.lingering)
                attempt.lingering.add_done_callback(self._lingering.discard)
        if verdict is Verdict.REQUEUE:
            job.requeues += 1
            if job.requeues <= self._settings.requeue_limit:
                log.info("%s: requeued: %s", job.id, job.reason)
                self._requeue(job)
                return
            job.reason = f"aborted: requeued {self._settings.requeue_limit} times in a row, {job.reason}"
            self._append_error(job, f"=>> PBS: job {job.reason}\n")
            verdict = Verdict.DELIVER
        elif verdict is Verdict.AGAIN:
            job.requeues = 0
            self._requeue(job)
            return
        await self._finish(job, delivered=verdict is Verdict.DELIVER)

    def _requeue(self, job: Job) -> None:
        """Back to the head of the queue; output so far is kept and added to."""
        job.phase, job.exit_status = Phase.QUEUED, None
        self._save(job)
        self._queue.appendleft(job.id)

    def _append_error(self, job: Job, text: str) -> None:
        path = self._layout.output_file(job.id, job.streams()[-1])
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, text.encode("utf-8", "backslashreplace"))
        finally:
            os.close(descriptor)

    async def _finish(self, job: Job, *, delivered: bool) -> None:
        """Deliver the output and complete the job."""
        if delivered:
            job.phase = Phase.DELIVERY
            self._save(job)
            trouble = await deliver.send(
                self._machine,
                job,
                self._settings.deliver_timeout_s,
                record=functools.partial(self._mark, job),
                forget=functools.partial(self._unmark, job),
            )
            if trouble:
                log.warning("%s: %s", job.id, trouble)
                job.reason = "; ".join(filter(None, (job.reason, trouble)))
        self._complete(job)

    def _mark(self, job: Job, mark: process.Mark) -> None:
        job.marks.append(mark)
        self._save(job)

    def _unmark(self, job: Job, mark: process.Mark) -> None:
        job.marks = [known for known in job.marks if known != mark]
        self._save(job)

    def _complete(self, job: Job) -> None:
        job.phase, job.completed = Phase.COMPLETE, time.time()
        try:
            self._remove_files(job)
            self._save(job)
        except OSError:
            log.exception("%s: its end cannot be recorded", job.id)
        log.info("%s: complete, exit status %s %s", job.id, job.exit_status, job.reason)
        for waiter in self._waiters.pop(job.id, []):
            if not waiter.done():
                waiter.set_result(None)
        self._forget_later(job, self._settings.keep_completed_s)

    def _remove_files(self, job: Job) -> None:
        for path in (*map(Path, mom.files(self._machine, job)), self._layout.records / f"{job.id}.SC"):
            path.unlink(missing_ok=True)

    def _forget_later(self, job: Job, delay_s: float) -> None:
        asyncio.get_running_loop().call_later(delay_s, self._forget, job)

    def _forget(self, job: Job) -> None:
        """Drop a completed job, but not while a hook of it is still running."""
        if job.marks:
            self._forget_later(job, max(1.0, self._settings.keep_completed_s))
            return
        self._jobs.pop(job.id, None)
        self._record_path(job.id).unlink(missing_ok=True)

    # --- after a crash

    async def _end_marks(self, job: Job) -> None:
        for mark in list(job.marks):
            await process.end_session(mark)
        if job.marks:
            job.marks = []
            self._save_if_possible(job)

    async def _recover(self, job: Job) -> None:
        """End what is left of a job that an earlier daemon ran, then requeue, abort or complete it."""
        if job.marks:
            log.warning("%s: ending what an earlier daemon left of it", job.id)
        await self._end_marks(job)
        if job.phase is Phase.COMPLETE:
            age = time.time() - (job.completed or 0.0)
            self._forget_later(job, max(0.0, self._settings.keep_completed_s - age))
            return
        if job.phase is not Phase.DELIVERY:
            if job.phase is Phase.RUNNING:
                job.exit_status, job.reason = ABORTED_BY_RESTART, "aborted: the batch server was restarted"
            job.phase = Phase.EPILOGUE
            self._save(job)
            attempt = Attempt(self._machine, job, self._settings, self._name, self._save)
            await attempt.resume_epilogues()
        if not job.script_started and job.exit_status in (None, mom.RETRY):
            log.info("%s: requeued after a restart", job.id)
            self._requeue(job)
            return
        if job.exit_status is None or job.exit_status == ABORTED_BY_RESTART:
            job.exit_status = ABORTED_BY_RESTART
            self._append_error(job, f"=>> PBS: job {job.reason or 'aborted'}\n")
        await self._finish(job, delivered=job.exit_status != mom.ABORTED)

    # --- clients

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: one request, one answer."""
        peer = protocol.peer_of(writer.get_extra_info("socket"))
        count = self._connections.get(peer.uid, 0)
        self._connections[peer.uid] = count + 1
        try:
            if sum(self._connections.values()) > MAX_CONNECTIONS or (count >= MAX_CONNECTIONS_PER_USER and peer.uid):
                raise Refused(protocol.TOO_MANY, "too many connections")
            answer = await self._answer(reader, writer, peer)
        except Refused as refusal:
            answer = {"error": refusal.code, "detail": refusal.detail}
        except (
            ProtocolError,
            asyncio.TimeoutError,
            asyncio.IncompleteReadError,
            ConnectionError,
            ValueError,
        ):
            answer = {"error": protocol.INVALID, "detail": "the request cannot be understood"}
        except Exception as error:  # a daemon answers; the fault is in its log
            log.exception("fault while answering uid %d", peer.uid)
            answer = {"error": protocol.SYSTEM, "detail": type(error).__name__}
        finally:
            self._connections[peer.uid] -= 1
            if not self._connections[peer.uid]:
                del self._connections[peer.uid]
        try:
            writer.write(protocol.encode(answer))
            await asyncio.wait_for(writer.drain(), REQUEST_TIMEOUT_S)
        except (ConnectionError, asyncio.TimeoutError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: Peer) -> Answer:
        line = await asyncio.wait_for(reader.readline(), REQUEST_TIMEOUT_S)
        if not line.endswith(b"\n"):
            raise ProtocolError("the line has no end")
        message = protocol.decode(line)
        operation = message.get("op")
        if operation == "submit":
            return await asyncio.wait_for(self._submit(message, reader, peer), REQUEST_TIMEOUT_S)
        if operation == "stat":
            return self._stat(message, peer)
        if operation == "delete":
            return self._delete(self._own(message, peer), message)
        if operation == "rerun":
            return self._rerun(self._own(message, peer))
        if operation == "wait":
            return await self._wait(self._own(message, peer), reader)
        raise Refused(protocol.INVALID, "unknown operation")

    async def _submit(self, message: Mapping[str, Any], reader: asyncio.StreamReader, peer: Peer) -> Answer:
        owner = Account.of(peer.uid)
        asked = Submission.read(message)
        size = message.get("script_size")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= protocol.MAX_SCRIPT:
            raise Refused(protocol.BAD_VALUE, f"script: larger than {protocol.MAX_SCRIPT} bytes")
        temporary = self._layout.records / f".script-{secrets.token_hex(8)}"
        try:
            with self._admitted(owner, size):
                await _receive(reader, size, temporary)
            self._refuse_if_stopping()
            number = self._next_number()
            job = Job(f"{number}.{self._name}", number, owner, asked, time.time())
            job.processors = len(self._machine.allocate(job.node_request))
            temporary.rename(self._layout.records / f"{job.id}.SC")
        finally:
            temporary.unlink(missing_ok=True)
        self._jobs[job.id] = job
        self._save(job)
        self._queue.append(job.id)
        self._wake.set()
        log.info("%s: queued by %s", job.id, owner.name)
        return {"job": job.id}

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise Refused(protocol.SYSTEM, "the batch server is stopping")

    @contextlib.contextmanager
    def _admitted(self, owner: Account, size: int) -> Iterator[None]:
        """While this lasts, a script of `size` bytes is on its way. Raises Refused, before any of it is read."""
        self._refuse_if_stopping()
        sizes = [coming for uid, coming in self._arriving if uid == owner.uid]
        if len(sizes) >= MAX_ARRIVING_PER_USER or len(self._arriving) >= MAX_ARRIVING:
            raise Refused(protocol.TOO_MANY, "too many scripts on their way")
        if sum(coming for _, coming in self._arriving) + size > MAX_ARRIVING_BYTES:
            raise Refused(protocol.TOO_MANY, "the scripts on their way are too large together")
        self._admit(owner, size, sizes)
        arrival = (owner.uid, size)
        self._arriving.append(arrival)
        try:
            yield
        finally:
            self._arriving.remove(arrival)

    def _admit(self, owner: Account, size: int, arriving: list[int]) -> None:
        """Refuse what would let one user fill the spool; `arriving` are the sizes of their scripts on their way."""
        theirs = [job for job in self._jobs.values() if job.owner.uid == owner.uid and job.phase is not Phase.COMPLETE]
        total = size + sum(arriving)
        for job in theirs:
            try:
                total += (self._layout.records / f"{job.id}.SC").stat().st_size
            except FileNotFoundError:
                pass
        if len(theirs) + len(arriving) >= self._settings.max_jobs_per_user:
            raise Refused(protocol.TOO_MANY, f"user {owner.name} has {len(theirs)} jobs")
        if total > self._settings.max_script_bytes_per_user:
            raise Refused(protocol.TOO_MANY, f"the scripts of user {owner.name} are too large together")

    def _own(self, message: Mapping[str, Any], peer: Peer) -> Job:
        """The job of the request. Raises Refused when there is none or it is another user's."""
        text = message.get("job")
        job_id = full_id(text, self._name) if isinstance(text, str) else None
        job = self._jobs.get(job_id) if job_id is not None else None
        if job is None:
            raise Refused(protocol.UNKNOWN_JOB)
        if peer.uid not in (0, job.owner.uid):
            raise Refused(protocol.PERMISSION)
        return job

    def _stat(self, message: Mapping[str, Any], peer: Peer) -> Answer:
        if message.get("job") is not None:
            jobs = [self._own(message, peer)]
        else:
            jobs = [job for job in self._jobs.values() if peer.uid in (0, job.owner.uid)]
        return {"jobs": [self._shown(job) for job in jobs]}

    def _shown(self, job: Job) -> tuple[str, list[tuple[str, str]]]:
        return job.id, attributes(job, self._name, self._machine.name)

    def _delete(self, job: Job, message: Mapping[str, Any]) -> Answer:
        delay = message.get("delay")
        if delay is None:
            delay = self._settings.kill_delay_s
        if not isinstance(delay, (int, float)) or isinstance(delay, bool) or not 0 <= delay <= 86400:
            raise Refused(protocol.BAD_VALUE, "delay")
        if job.phase is Phase.QUEUED:
            self._queue.remove(job.id)
            job.reason, job.exit_status = Why.DELETE.value, mom.DELETED
            self._complete(job)
        elif self._attempt is None or self._attempt.job is not job or not self._attempt.interrupt(Why.DELETE, delay):
            raise Refused(protocol.BAD_STATE, f"invalid state for job - {job.phase.name}")
        log.info("%s: deleted", job.id)
        return {"ok": True}

    def _rerun(self, job: Job) -> Answer:
        if self._attempt is None or self._attempt.job is not job or not self._attempt.interrupt(Why.RERUN, 0.0):
            raise Refused(protocol.BAD_STATE, f"invalid state for job - {job.phase.name}")
        return {"ok": True}

    async def _wait(self, job: Job, reader: asyncio.StreamReader) -> Answer:
        """Answer when the job is complete and its output delivered; give up when the client has gone."""
        if job.phase is not Phase.COMPLETE:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.setdefault(job.id, []).append(waiter)
            gone = asyncio.create_task(reader.read(1))
            both: set[asyncio.Future[Any]] = {waiter, gone}
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not waiter.done():
                    raise ConnectionResetError("the client has gone")
            finally:
                gone.cancel()
                if waiter in self._waiters.get(job.id, []):
                    self._waiters[job.id].remove(waiter)
        return {"exit_status": job.exit_status, "reason": job.reason}


async def _receive(reader: asyncio.StreamReader, size: int, path: Path) -> None:
    """Write the script that follows a request to a new file. Raises ProtocolError when it ends early."""
    with open(path, "xb", opener=functools.partial(os.open, mode=0o600)) as file:
        left = size
        while left:
            data = await reader.read(min(left, 1 << 20))
            if not data:
                raise ProtocolError("the script has no end")
            file.write(data)
            left -= len(data)


def stop_on_signals() -> asyncio.Event:
    """An event that TERM and INT set."""
    event = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, event.set)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return event
