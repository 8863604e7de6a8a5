"""The job wrapper: runs as the job, in the batch system's own process tree, and stands for the script in the guest.

It waits for the guest, runs the user's VM prologue, the script and the user's VM epilogue in it over SSH, passes
streams, signals and the exit status through, and tells the agent when the job is over. Whatever goes wrong is said
here, in one line on the job's own error stream, with an exit status from 70 to 79.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from vmgr.config import Config, load_config
from vmgr.errors import REFUSED, Code, VTorqueError
from vmgr.jobspec import parse_job_directory
from vmgr.node.client import AgentLink, failure, no_agent
from vmgr.node.session import GuestSession, run_file
from vmgr.node.submitted import job_directory
from vmgr.paths import installation

PASSED_ON = tuple(
    getattr(signal, f"SIG{name}") for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "TSTP", "CONT")
)
MAX_SCRIPT_BYTES = 1 << 27
REMOVE_TRIES = 40
REMOVE_PAUSE_SECONDS = 0.025


def main(argv: Sequence[str]) -> int:
    """Run the job in its guest; gives its exit status. `argv`: see `vmgr.node.submitted`."""
    job_id = os.environ.get("PBS_JOBID", "")
    try:
        config = load_config(installation())
        return asyncio.run(_run_job(config, job_id, job_directory(argv)))
    except VTorqueError as err:
        print(err, file=sys.stderr)
        return _status(err)


async def _run_job(config: Config, job_id: str, directory: str) -> int:
    return await JobWrapper(config, job_id, directory).run()  # before Python 3.10 its events belong to the loop


def _status(problem: VTorqueError) -> int:
    """The job's exit status for a failure of ours; what `vsub` would have refused is a specification not legal."""
    return problem.code.status if problem.code.status > REFUSED else Code.SPEC.status


class JobWrapper:
    """One run of a job."""

    def __init__(self, config: Config, job_id: str, directory: str) -> None:
        self._config = config
        self._job_id = job_id
        self._directory = Path(directory)
        self._path = parse_job_directory(directory)
        self._snapshot: dict[str, Any] = {}
        self._changed = asyncio.Event()
        self._session: Optional[GuestSession] = None
        self._signalled: Optional[signal.Signals] = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for sig in PASSED_ON:
            loop.add_signal_handler(sig, self._signal, sig)
        status, code = 0, None
        try:
            status = await self._run()
        except VTorqueError as err:
            print(err, file=sys.stderr, flush=True)
            status, code = _status(err), err.code.text
        except Exception as err:  # a full quota, a program that is missing: it has a reason and a status too
            problem = VTorqueError(f"fault in the job wrapper: {err}", code=Code.INTERNAL)
            print(problem, file=sys.stderr, flush=True)
            status, code = _status(problem), problem.code.text
        self._leave(status, code)
        return status

    async def _run(self) -> int:
        if self._path is None:
            raise VTorqueError(f"{str(self._directory)!r} is no job directory", code=Code.SPEC)
        link = await AgentLink.open(self._config.paths, self._job_id)
        watcher = asyncio.ensure_future(self._watch(link))
        try:
            await self._until("ready", "running")
            if self._signalled:
                return 128 + self._signalled
            if self._snapshot["directory"] != str(self._directory):
                raise VTorqueError("the node agent serves another submission of this job", code=Code.SPEC)
            status = await self._in_guest(link)
        finally:
            link.send("end")
            await self._until("ended", "failed", "", quiet=True)
            watcher.cancel()
            link.close()
        problem = failure(self._snapshot)
        if problem is not None:
            self._print_output()
            print(problem, file=sys.stderr, flush=True)
            return status or _status(problem)
        return status

    async def _in_guest(self, link: AgentLink) -> int:
        """The user's VM prologue, the script, the user's VM epilogue. Gives the script's exit status."""
        spec, ssh = self._snapshot["spec"], self._snapshot["ssh"]
        for name in ("script", "vm_prologue", "vm_epilogue"):
            self._check_file(name, spec[name])
        self._session = session = GuestSession(
            self._directory, self._snapshot["attempt"], self._snapshot["guest"], ssh["port"], ssh["host_key"]
        )
        described = run_file(spec, os.environ)
        if spec["vm_prologue"]:
            status = await self._alive(session.run(described, self._directory / "vm_prologue"))
            if status:
                raise VTorqueError(f"the VM prologue of the job's own ended with status {status}", code=Code.HOOK)
        link.send("started")
        status = await self._alive(session.run(described, self._directory / "script"))
        if spec["vm_epilogue"]:
            ended = await self._alive(session.run(described, self._directory / "vm_epilogue"))
            if ended:
                print(
                    VTorqueError(f"the VM epilogue of the job's own ended with status {ended}", code=Code.HOOK),
                    file=sys.stderr,
                )
                status = status or Code.HOOK.status
        return status

    async def _alive(self, running: Any) -> int:
        """The status of something that runs in the guest; raises when the guest, or its agent, dies first."""
        task = asyncio.ensure_future(running)
        death = asyncio.ensure_future(self._until("failed", ""))
        try:
            await asyncio.wait([task, death], return_when=asyncio.FIRST_COMPLETED)
            if death.done() and not task.done():
                death.result()
            try:
                return int(await task)
            except VTorqueError:
                # the connection broke: the agent knows soon whether that was because the guest died
                await asyncio.wait([death], timeout=2.0)
                if death.done():
                    death.result()
                raise
        finally:
            for unfinished in (task, death):
                unfinished.cancel()
            await asyncio.gather(task, death, return_exceptions=True)

    async def _watch(self, link: AgentLink) -> None:
        try:
            async for snapshot in link.follow("attach"):
                self._snapshot = snapshot
                self._wake()
            self._snapshot = {**self._snapshot, "state": ""}  # the agent is gone
        except VTorqueError as err:
            self._snapshot = {**self._snapshot, "state": "failed", "code": err.code.text, "reason": err.detail}
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, *states: str, quiet: bool = False) -> None:
        """Wait for one of the states, or a signal before the guest is ready; raises on a failure unless `quiet`."""
        while self._snapshot.get("state") not in states:
            changed = self._changed
            if not quiet:
                self._raise_failure()
                if self._signalled and self._session is None:
                    return
            await changed.wait()
        if not quiet:
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._snapshot.get("state") == "":
            raise no_agent(f"the node agent of job {self._job_id} has ended")
        problem = failure(self._snapshot)
        if problem is not None:
            self._print_output()
            raise problem

    def _print_output(self) -> None:
        if self._snapshot.get("output"):
            print(str(self._snapshot["output"]).rstrip("\n"), file=sys.stderr, flush=True)
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
        if self._session is not None:
            self._session.signal(sig)
        elif sig not in (signal.SIGTSTP, signal.SIGCONT):
            self._signalled = sig
            self._wake()

    def _leave(self, status: int, code: Optional[str]) -> None:
        """Take the job directory away, or leave the result in it for the `vsub --wait` that follows the job."""
        if self._path is None:
            return
        if self._snapshot.get("spec", {}).get("keep"):
            try:
                temporary = self._directory / f".result.{os.getpid()}"
                temporary.write_text(json.dumps({"v": 1, "status": status, "code": code}))
                temporary.replace(self._directory / "result.json")
            except OSError as err:
                print(f"vtorque: cannot write the result: {err}", file=sys.stderr)
            return
        _remove(self._directory.parent)


def _remove(folder: Path) -> None:
    """Take a job's folder away. The agent may be writing its last status into it, so it can take a second try."""
    for _ in range(REMOVE_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return
        time.sleep(REMOVE_PAUSE_SECONDS)
