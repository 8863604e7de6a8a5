"""`vsub --wait`: follows a job's stages, waits for its end, gives its exit status. It serves every engine.

Two sources, neither needed: the files in the job directory (progress and result; watched by inotify and
read again every second, since NFS tells nothing of other machines' writes), and the batch system, which
alone knows that a job has ended: a job that is deleted while queued never writes anything.
"""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Optional

from inotify_simple import INotify, flags

from vmgr.errors import printable
from vsub.engines import Engine, JobState
from vsub.jobdir import remove_tree
from vsub.report import debug, say
from vsub.status import NodeStatus, Result, Stage, read_result, read_statuses

if TYPE_CHECKING:
    import socket

LOOK_AGAIN_S = 1.0
ASK_FIRST_S = 1.0
ASK_AT_MOST_S = 10.0
ASK_AFTER_RESULT_S = 0.5
SILENT_AT_MOST = 20
"""Times that a batch system may leave unanswered how a job is whose result is there."""
INTERRUPTED = 130
NO_STATUS = 1
"""Exit status when a job is gone and nobody knows how it ended."""
_MAX_LINE = 64 * 1024


class Follower:
    """Follows one job. `directory` is None for a job without guests; `started` is when the submission began."""

    def __init__(self, engine: Engine, job_id: str, directory: Optional[str], started: float) -> None:
        self.engine = engine
        self.job_id = job_id
        self.directory = directory
        self.started = started
        self.phase = ""
        self.seen: dict[str, tuple[str, int]] = {}
        self.doing: dict[str, Optional[str]] = {}
        self.failed: set[tuple[str, str]] = set()
        self.disk: Optional[str] = None
        self.result: Optional[Result] = None

    def run(self) -> int:
        """Wait; gives the job's exit status. The job directory is removed at the end of the job."""
        try:
            state = self._wait()
            self._look()
        except KeyboardInterrupt:
            kept = f"; its files stay in {self.directory}" if self.directory else ""
            shows, deletes = self.engine.commands
            say(f"interrupted; job {self.job_id} keeps running: `{shows} {self.job_id}` shows it, "
                f"`{deletes} {self.job_id}` ends it{kept}")  # fmt: skip
            return INTERRUPTED
        status = self._status(state)
        self._timeline(status)
        if self.directory:
            remove_tree(self.directory)
            remove_tree(self.directory.rsplit("/", 1)[0])
        return status

    def _wait(self) -> JobState:
        """Until the batch system says that the job has ended."""
        watch = self._watch()
        completion = self.engine.completion(self.job_id)
        try:
            return self._loop(watch, completion)
        finally:
            if watch is not None:
                watch.close()
            if completion is not None:
                completion.close()

    def _watch(self) -> Optional[INotify]:
        if self.directory is None:
            return None
        try:
            watch = INotify()
            watch.add_watch(self.directory, flags.MOVED_TO | flags.CLOSE_WRITE)
        except OSError as err:
            debug(f"no inotify on {self.directory}: {err.strerror}")
            return None
        return watch

    def _loop(self, watch: Optional[INotify], completion: Optional[socket.socket]) -> JobState:
        pause, ask_at, line, silence = ASK_FIRST_S, 0.0, b"", 0
        while True:
            self._look()
            if self.result is not None:  # the end is near
                pause = ASK_AFTER_RESULT_S
                ask_at = min(ask_at, time.monotonic() + pause)
            if completion is None and time.monotonic() >= ask_at:
                state = self.engine.state(self.job_id)
                self._say_phase(state)
                silence = silence + 1 if state.phase == "unknown" else 0
                if state.ended or (self.result is not None and silence >= SILENT_AT_MOST):
                    return state
                ask_at = time.monotonic() + pause
                pause = min(pause * 1.5, ASK_AT_MOST_S)
            sources = [source for source in (watch, completion) if source is not None]
            ready = select.select(sources, [], [], self._patience(completion, ask_at))[0]
            if watch is not None and watch in ready:
                watch.read(timeout=0)
            if completion is not None and completion in ready:
                more = completion.recv(_MAX_LINE)
                line += more
                if b"\n" in line or not more or len(line) > _MAX_LINE:
                    state = self.engine.read_completion(line)
                    if state.ended:
                        return state
                    debug(f"the batch system's end of the connection is gone after {line[:80]!r}")
                    completion = None

    def _patience(self, completion: Optional[socket.socket], ask_at: float) -> float:
        """How long to wait for an event before looking again."""
        asking = max(0.0, ask_at - time.monotonic()) if completion is None else LOOK_AGAIN_S
        return min(asking, LOOK_AGAIN_S) if self.directory else asking

    def _say_phase(self, state: JobState) -> None:
        if state.phase != self.phase and state.phase in ("queued", "held", "waiting", "running"):
            say(f"{self.job_id}  {state.phase}")
        if state.phase != self.phase and state.phase == "unknown":
            say(f"{self.job_id}  the batch system does not answer; asking again")
        self.phase = state.phase

    def _look(self) -> None:
        """Read the job directory and tell what is new."""
        if self.directory is None:
            return
        for status in read_statuses(self.directory):
            self._tell(status)
        self.result = read_result(self.directory) or self.result

    def _tell(self, status: NodeStatus) -> None:
        attempt, count = self.seen.get(status.node, (status.attempt, 0))
        if attempt != status.attempt:
            say(f"{self.job_id}  started again")
            count = 0
        for stage in status.stages[count:]:
            say(f"{self.job_id}  {stage.t:+.2f} s  {stage.name}")
        if status.doing != self.doing.get(status.node):
            self.doing[status.node] = status.doing
            if status.doing:
                say(f"{self.job_id}  {status.doing}")
        self.seen[status.node] = (status.attempt, max(count, len(status.stages)))
        if status.disk is not None and status.disk != self.disk:
            self.disk = status.disk
            say(f"{self.job_id}  persistent disk: {status.disk}")
        if status.state == "failed" and (status.node, status.attempt) not in self.failed:
            self.failed.add((status.node, status.attempt))
            say(f"{self.job_id}  failed on {status.node}: {status.code or 'no code'}: {status.reason or 'no reason'}")

    def _status(self, state: JobState) -> int:
        if state.exit_status is not None:
            return state.exit_status
        if self.result is not None:
            return self.result.status
        say(f"job {self.job_id} is gone and left no exit status; was it deleted?")
        return NO_STATUS

    def _timeline(self, status: int) -> None:
        """One line a stage with its duration, and the whole."""
        if self.directory:
            for node in read_statuses(self.directory):
                for name, seconds in durations(node.stages):
                    say(f"timeline: {printable(name)}  {seconds:.2f} s")
        total = time.monotonic() - self.started
        say(f"timeline: {total:.2f} s from submission to end, exit status {status}")


def durations(stages: tuple[Stage, ...]) -> list[tuple[str, float]]:
    """How long each stage took: the time since the one before it."""
    before = 0.0
    lasted = []
    for stage in stages:
        lasted.append((stage.name, max(0.0, stage.t - before)))
        before = max(before, stage.t)
    return lasted
