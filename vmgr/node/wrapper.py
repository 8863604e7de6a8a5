"""The job wrapper: runs as the job, in the batch system's own process tree, and stands for the script in the guest.

It waits for the guest, runs the user's VM prologue, the script and the user's VM epilogue in it over SSH, passes
streams, signals and the exit status through, and tells the agent when the job is over. An interactive job has the
batch system's terminal, and shows on it what it waits for. Whatever goes wrong is said here, in one line on the job's
own error stream, with an exit status from 70 to 79.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from vmgr.config import Config, load_config
from vmgr.errors import REFUSED, Code, VTorqueError
from vmgr.jobspec import parse_job_directory
from vmgr.node.batch import facts
from vmgr.node.client import AgentLink, failure, no_agent
from vmgr.node.hookcall import OwnJob
from vmgr.node.jobfiles import JobFiles, own_name
from vmgr.node.kept import KeptSession
from vmgr.node.keptjob import KeptJob, Suspended
from vmgr.node.process import given_environment
from vmgr.node.session import GuestSession, run_file
from vmgr.node.submitted import job_directory
from vmgr.node.terminal import Terminal
from vmgr.node.terminfo import terminfo_lines
from vmgr.paths import installation

PASSED_ON = tuple(
    getattr(signal, f"SIG{name}") for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "TSTP", "CONT")
)
ENDING = (signal.SIGTERM, signal.SIGHUP)
"""What ends a job, and a session on a terminal; all other signals are keys there."""

MAX_SCRIPT_BYTES = 1 << 27


def main(argv: Sequence[str]) -> int:
    """Run the job in its guest; gives its exit status. `argv`: see `vmgr.node.submitted`."""
    try:
        config = load_config(installation())
        return asyncio.run(_run_job(config, job_directory(argv)))
    except VTorqueError as err:
        _say(err)
        return _status(err)


async def _run_job(config: Config, directory: str) -> int:
    batch = facts(config.engine)
    try:
        own = batch.own_job(os.environ)
    except ValueError as err:
        raise no_agent(f"this process belongs to no job: {err}") from None
    if not own.leads:
        return 0
    environment = batch.passed(given_environment())
    return await JobWrapper(config, own, directory, environment).run()  # before Python 3.10 its events are the loop's


def _status(problem: VTorqueError) -> int:
    """The job's exit status for a failure of ours; what `vsub` would have refused is a specification not legal."""
    return problem.code.status if problem.code.status > REFUSED else Code.SPEC.status


def _say(text: object) -> None:
    """Say a line on the job's own error stream, which may be a terminal that has been hung up.

    Nothing is kept in a buffer, which could not be written at the program's end either, and change its status.
    """
    data = memoryview(f"{text}\n".encode("utf-8", "replace"))
    try:
        while data:
            data = data[os.write(2, data) :]
    except OSError:
        pass


def _say_lost(err: OSError) -> None:
    _say(f"vtorque: some of the job's output is lost: {err.strerror}")


class JobWrapper:
    """One run of a job. `environment` is what its script has in the guest."""

    def __init__(self, config: Config, own: OwnJob, directory: str, environment: Mapping[str, str]) -> None:
        self._config = config
        self._own = own
        self._job_id = own.job_id
        self._environment = environment
        self._directory = Path(directory)
        path = parse_job_directory(directory)
        self._files = JobFiles(path, own.member) if path is not None else None
        self._terminal = Terminal.open()
        self._snapshot: dict[str, Any] = {}
        self._changed = asyncio.Event()
        self._session: Optional[GuestSession] = None
        self._signalled: Optional[signal.Signals] = None
        self._told_to_end = False
        self._on_terminal = False
        self._kept: Optional[KeptJob] = None
        self._suspended = False
        self._is_to_go_on = False
        self._said_returned = False

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for sig in PASSED_ON:
            loop.add_signal_handler(sig, self._signal, sig)
        sizes = self._follow_sizes()
        status, code = 0, None
        try:
            status = await self._run()
        except Suspended:
            return 128 + (self._signalled or signal.SIGTERM)  # the job directory is for the next attempt
        except VTorqueError as err:
            _say(err)
            status, code = _status(err), err.code.text
        except Exception as err:  # a full quota, a program that is missing: it has a reason and a status too
            problem = VTorqueError(f"fault in the job wrapper: {err}", code=Code.INTERNAL)
            _say(problem)
            status, code = _status(problem), problem.code.text
        finally:
            if sizes is not None:
                sizes.cancel()
        await self._end(status, code)
        return status

    def _follow_sizes(self) -> Optional[asyncio.Task[None]]:
        if self._terminal is None:
            return None
        asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, self._resized)
        return asyncio.ensure_future(self._terminal.follow_size(self._directory, self._resized))

    def _resized(self) -> None:
        if self._session is not None:
            self._session.resized()

    async def _run(self) -> int:
        if self._files is None:
            raise VTorqueError(f"{str(self._directory)!r} is no job directory", code=Code.SPEC)
        link = await AgentLink.open(self._config.paths, self._job_id)
        watcher = asyncio.ensure_future(self._watch(link))
        status: Optional[int] = None
        try:
            await self._until("ready", "running")
            self._end_progress()
            if self._signalled:
                if self._snapshot.get("resumed") is True:  # its next start, if it has one, needs the directory
                    raise Suspended
                return 128 + self._signalled
            if self._snapshot["directory"] != str(self._directory):
                raise VTorqueError("the node agent serves another submission of this job", code=Code.SPEC)
            status = await self._in_guest(link)
        except VTorqueError as err:
            status = _status(err)
            raise
        except Suspended:
            await self._until_own_end()
            raise
        finally:
            if not self._suspended:
                link.send("end", status=status)
                await self._until("ended", "failed", "", quiet=True)
            watcher.cancel()
            link.close()
        problem = failure(self._snapshot)
        if problem is not None:
            self._print_output()
            _say(problem)
            return status or _status(problem)
        return status

    async def _in_guest(self, link: AgentLink) -> int:
        """The user's VM prologue, the script, the user's VM epilogue. Gives the script's exit status."""
        spec, ssh = self._snapshot["spec"], self._snapshot["ssh"]
        resumed = self._snapshot.get("resumed") is True
        for name in ("vm_epilogue",) if resumed else ("script", "vm_prologue", "vm_epilogue"):
            self._check_file(name, spec[name])
        tag = own_name(self._snapshot["node"], self._own.member, self._snapshot["attempt"])
        way = (self._directory, tag, self._snapshot["guest"], ssh["port"], ssh["host_key"])
        self._session = session = KeptSession(*way, _say_lost) if spec.get("suspend") else GuestSession(*way)
        answering = self._answer_wishes(link, session)
        try:
            described = run_file(spec, self._environment)
            if spec["vm_prologue"] and not resumed:
                status = await self._alive(session.run(described, self._directory / "vm_prologue"))
                if status:
                    raise VTorqueError(f"the VM prologue of the job's own ended with status {status}", code=Code.HOOK)
            if not resumed:
                link.send("started")
            status = await self._job(session, spec, described, link if resumed else None)
            if spec["vm_epilogue"]:
                ended = await self._alive(session.run(described, self._directory / "vm_epilogue"))
                if ended:
                    _say(VTorqueError(f"the VM epilogue of the job's own ended with status {ended}", code=Code.HOOK))
                    status = status or Code.HOOK.status
            return status
        finally:
            if answering is not None:
                answering.cancel()

    def _answer_wishes(self, link: AgentLink, session: GuestSession) -> Optional[asyncio.Task[None]]:
        """Where the job can be suspended: answer the agent whenever it wants the script to be let go of."""
        if not isinstance(session, KeptSession):
            return None

        def answer(number: int, error: Optional[str]) -> None:
            link.send("detached", **{"try": number}, **({} if error is None else {"error": error}))

        self._kept = KeptJob(session, lambda: self._snapshot, lambda: self._changed, answer)
        return asyncio.ensure_future(self._kept.follow())

    async def _job(
        self, session: GuestSession, spec: dict[str, Any], described: str, resumed_by: Optional[AgentLink]
    ) -> int:
        """The job itself: its script, or for an interactive job a login shell. Gives its exit status.

        `resumed_by` is the agent that has to let a suspended job go on.
        """
        script = self._directory / "script"
        if self._kept is not None:
            kept = self._kept
            if resumed_by is not None:
                return await self._alive(self._go_on(kept, resumed_by))
            return await self._alive(kept.run(described, script, spec["arguments"]))
        if not spec["interactive"]:
            return await self._alive(session.run(described, script, spec["arguments"]))
        if self._terminal is None:
            raise VTorqueError("an interactive job needs a terminal", code=Code.SPEC, hint="submit it by vsub -I")
        described += terminfo_lines(os.environ)
        self._on_terminal = True
        named = script if spec["script"] else None
        try:
            status = await self._alive(session.run_on_terminal(described, named, spec["arguments"], self._terminal))
        except VTorqueError as err:
            if self._signalled is None or err.code is not Code.CONNECT:
                raise
        finally:
            self._on_terminal = False
        if self._signalled is not None:
            _say(f"vtorque: the session was ended by {self._signalled.name}")
            return 128 + self._signalled
        return status

    async def _go_on(self, kept: KeptJob, link: AgentLink) -> int:
        """Let the script of a suspended job go on, once it is within reach and the agent agrees: what is stored of the
        job is gone then. Where it is not within reach the agent says what becomes of the job.
        """

        async def allowed() -> None:
            link.send("started")
            await self._until_running()

        self._is_to_go_on = True
        try:
            return await kept.go_on(allowed)
        except VTorqueError as err:
            if not self._is_to_go_on:
                raise
            link.send("started", error=err.message)
            await self._until_running()
            raise
        finally:
            self._is_to_go_on = False

    async def _until_running(self) -> None:
        await self._until("running")
        if self._snapshot.get("state") != "running":  # ended before it went on: its next start needs the directory
            raise Suspended
        self._is_to_go_on = False
        sig, self._signalled = self._signalled, None
        if sig is not None and self._session is not None:
            self._session.signal(sig)

    async def _alive(self, running: Coroutine[Any, Any, int]) -> int:
        """The status of something that runs in the guest; raises when the guest, or its agent, dies first."""
        task = asyncio.ensure_future(running)
        death = asyncio.ensure_future(self._until("failed", ""))
        try:
            await asyncio.wait([task, death], return_when=asyncio.FIRST_COMPLETED)
            if death.done() and not task.done():
                death.result()
                raise Suspended  # it was told to end before it went on
            try:
                return int(await task)
            except VTorqueError:
                # the connection broke: the agent knows soon whether that was because the guest died
                if self._signalled is None:
                    await asyncio.wait([death], timeout=2.0)
                if death.done():
                    death.result()
                raise
        finally:
            for unfinished in (task, death):
                unfinished.cancel()
            await asyncio.gather(task, death, return_exceptions=True)

    async def _until_own_end(self) -> None:
        """Wait until the batch system ends this process: the job goes on elsewhere. The agent's end is the latest."""
        self._suspended = True
        if isinstance(self._session, KeptSession):  # it may have said so before the agent did
            for sig in self._session.waiting:
                self._signal(sig)
        while self._signalled is None and self._snapshot.get("state") != "":
            await self._changed.wait()

    async def _watch(self, link: AgentLink) -> None:
        try:
            await self._follow(link)
            await self._follow_stand_in()
            self._snapshot = {**self._snapshot, "state": ""}  # the agent is gone
        except VTorqueError as err:
            self._snapshot = {**self._snapshot, "state": "failed", "code": err.code.text, "reason": err.detail}
        self._wake()

    async def _follow(self, link: AgentLink) -> None:
        named = {} if self._own.member is None or self._own.marked is None else {"member": self._own.marked}
        async for snapshot in link.follow("attach", **named):
            self._snapshot = {**self._snapshot, **snapshot}
            if self._terminal is not None:
                self._terminal.progress(snapshot)
            self._wake()

    async def _follow_stand_in(self) -> None:
        """Follow what stands in for an agent that has died, where something does; it knows less than the agent did."""
        try:
            link = await AgentLink.open(self._config.paths, self._job_id)
        except VTorqueError:
            return
        try:
            await self._follow(link)
        finally:
            link.close()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, *states: str, quiet: bool = False) -> None:
        """Wait for one of the states, or a signal before the guest is ready; raises on a failure unless `quiet`."""
        while self._snapshot.get("state") not in states:
            changed = self._changed
            if not quiet:
                returned = self._is_returned()
                if returned and self._snapshot["state"] in ("suspended", ""):
                    raise Suspended
                self._raise_failure()
                if self._signalled and (self._session is None or self._is_to_go_on) and not returned:
                    return
            await changed.wait()
        if not quiet:
            self._raise_failure()

    def _is_returned(self) -> bool:
        """Whether the job goes back to where it was, which is said at once: this may be ended any moment."""
        reason = self._snapshot.get("returned")
        if reason and not self._said_returned:
            self._said_returned = True
            _say(f"vtorque: the job does not go on here, and is to wait again, held: {reason}")
        return bool(reason)

    def _end_progress(self) -> None:
        if self._terminal is not None:
            self._terminal.end_progress()

    def _raise_failure(self) -> None:
        if self._snapshot.get("state") == "":
            self._end_progress()
            raise no_agent(f"the node agent of job {self._job_id} has ended")
        problem = failure(self._snapshot)
        if problem is not None:
            self._end_progress()
            self._print_output()
            raise problem

    def _print_output(self) -> None:
        if self._snapshot.get("output"):
            _say(str(self._snapshot["output"]).rstrip("\n"))
            self._snapshot = {**self._snapshot, "output": ""}

    def _check_file(self, name: str, sha256: Optional[str]) -> None:
        if sha256 is None:
            return
        path = self._directory / name
        try:
            with open(path, "rb") as stream:
                digest = hashlib.sha256(stream.read(MAX_SCRIPT_BYTES)).hexdigest()
        except OSError as err:
            raise VTorqueError(f"cannot read {path}: {err.strerror}", code=Code.SPEC) from err
        if digest != sha256:
            raise VTorqueError(f"{path} was altered after submission", code=Code.SPEC, hint="submit again by vsub")

    def _signal(self, sig: signal.Signals) -> None:
        self._told_to_end = self._told_to_end or sig in ENDING
        if self._session is None or self._suspended or (self._is_to_go_on and sig in ENDING):
            if sig not in (signal.SIGTSTP, signal.SIGCONT):
                self._signalled = sig
                self._wake()
        elif not self._on_terminal:
            self._session.signal(sig)
        elif sig in ENDING:
            self._signalled = sig
            self._session.hang_up()

    async def _end(self, status: int, code: Optional[str]) -> None:
        """Leave nothing of the job but its result.

        One that may start again needs its directory, and root the way to that. Where it does not, a later `vsub` takes
        the directory away.
        """
        if not (self._own.may_come_back and (self._told_to_end or self._signalled is not None)):
            self._leave(status, code)
            await self._give_back()

    def _leave(self, status: int, code: Optional[str]) -> None:
        """Take the job directory away, or leave the result in it for the `vsub` that follows the job."""
        if self._files is not None:
            try:
                self._files.leave(status, code)
            except OSError as err:
                _say(f"vtorque: cannot write the result: {err}")

    async def _give_back(self) -> None:
        """Give back to the user what the way to the job directory was in. No failure of that is the job's."""
        if self._own.marked is None:
            return
        from vmgr.reach import batch  # of no other batch system's jobs

        with contextlib.suppress(VTorqueError):
            await asyncio.get_running_loop().run_in_executor(None, batch.give_back, self._config, self._own.marked)
