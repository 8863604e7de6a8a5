"""The node agent: takes one attempt of a job from its record to a running guest, and back to nothing.

Started by the prologue hook with the attempt's folder, its lock on descriptor 3 and its listening socket on 4. It
lives as long as the attempt. Whenever it dies, its guest dies with it, and the record says what is left to undo.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, Optional

from vmgr import logs
from vmgr.checks import check_spec
from vmgr.config import Config, load_config
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image
from vmgr.jobspec import MAX_SPEC_BYTES, Spec, SpecPath, as_plain, parse_spec
from vmgr.logs import LOGGER
from vmgr.node import abilities, process, record
from vmgr.node.boot import Job, boot
from vmgr.node.control import Control
from vmgr.node.guest import first
from vmgr.node.jobfiles import status_name
from vmgr.node.reap import reap
from vmgr.node.state import Progress, publish
from vmgr.node.undo import undo
from vmgr.node.userio import User, look_up, primary_group, read_file
from vmgr.paths import installation
from vmgr.policy import Subject
from vmgr.trust import check_trusted

LOCK_FD, SOCKET_FD = 3, 4
LAST_ANSWER_SECONDS = 5.0


class Call(NamedTuple):
    """What the prologue hook wrote down about the attempt."""

    job_id: str
    user: str
    directory: SpecPath
    node_index: int
    queue: Optional[str]


def main(argv: Sequence[str]) -> int:
    """Run the agent for the attempt in the folder `argv[0]`."""
    for fd in (LOCK_FD, SOCKET_FD):
        os.set_inheritable(fd, False)
    install = installation()
    config = load_config(install)
    place = next((p for p in record.places(config.paths) if str(p.folder) == argv[0]), None)
    if place is None:
        print(f"vtorque: {argv[0]} is no attempt's folder", file=sys.stderr)
        return 1
    me = process.identify(os.getpid())
    assert me is not None
    record.append(place, {"do": "process", "role": "agent", **me._asdict()})
    facts = record.begun(place)
    call = Call(**{**{key: facts[key] for key in Call._fields}, "directory": SpecPath(*facts["directory"])})
    log = logs.set_up(config.logging, job=call.job_id)
    if record.is_buried(config.paths, call.job_id, place):
        LOGGER.info("the job was deleted before its guest was started")
        undo(place)
        record.exhume(config.paths, call.job_id)
        return 0

    async def live() -> None:  # before Python 3.10 an event belongs to the loop in which it is made
        await Agent(config, install.templates, place, call, log).run(socket.socket(fileno=SOCKET_FD))

    try:
        for folder in (config.paths.spool, config.paths.run):
            check_trusted(folder)
        asyncio.run(live())
    except Exception:
        LOGGER.exception("fault; what is left is undone by the epilogue or the next agent")
        return 1
    return 0


def _reap(config: Config) -> None:
    try:
        for line in reap(config):
            LOGGER.warning("left by another job, removed: %s", line)
    except Exception:
        LOGGER.exception("the janitor failed")


class Agent:
    """One attempt on one node."""

    def __init__(self, config: Config, templates: Path, place: record.Place, call: Call, log: Optional[Path]) -> None:
        self.config = config
        self.templates = templates
        self.place = place
        self.call = call
        self.log = log
        self.node = os.uname().nodename.partition(".")[0]
        self.guest_name = f"v{self.node}-1"
        self.attached = asyncio.Event()
        self.job_over = asyncio.Event()
        self.progress = Progress(
            place.start,
            {"job_id": call.job_id, "attempt": place.attempt, "node": self.node, "guest": self.guest_name},
        )

    async def run(self, listener: socket.socket) -> None:
        """The attempt's whole life; returns when nothing of it is left."""
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(sig, self.job_over.set)
        self.progress.stage("agent")
        self._undo_older()
        try:
            user = look_up(self.call.user)
        except VTorqueError as err:
            LOGGER.error("%s", err)
            undo(self.place)
            return
        control = Control(self.progress, user.uid, over=self.job_over.set, attached=self.attached.set)
        server = await control.serve(listener)
        status = f"{self.call.directory.directory}/{status_name(self.call.job_id, self.node)}"
        patience = self.config.timeouts.user_file
        publisher = asyncio.ensure_future(publish(self.progress, user, status, timeout_s=patience))
        await self._live_and_tell(user)
        for failure in undo(self.place):
            LOGGER.error("left behind: %s", failure)
        record.note_end(self.config.paths, self.call.job_id, self.place)
        self.progress.stage("gone", None if self.progress.error else "ended")
        await asyncio.gather(publisher, return_exceptions=True)
        server.close()
        await control.drain(LAST_ANSWER_SECONDS)

    async def _live_and_tell(self, user: User) -> None:
        """Live; after a failure stay for as long as the job, so that its wrapper learns the reason."""
        try:
            await self._live(user)
            return
        except VTorqueError as err:
            self.progress.fail(err)
        except Exception as err:
            LOGGER.exception("fault")
            self.progress.fail(VTorqueError(f"fault in the node agent: {err}", code=Code.INTERNAL))
        try:
            await first(self._unattended(), self.job_over.wait())
        except VTorqueError as err:
            LOGGER.error("%s", err)

    async def _unattended(self) -> None:
        """Raise VTorqueError (VT-AGENT) when no job wrapper comes in time: its job is over, or never was one.

        Wherever the batch system's epilogue is lost, this and the end of the wrapper's connection end the guest.
        """
        limit = self.config.timeouts.attach
        await first(self.attached.wait(), asyncio.sleep(limit))
        if not self.attached.is_set():
            raise VTorqueError(f"no job has come for the guest within {limit} s", code=Code.AGENT)
        await asyncio.Event().wait()

    async def _live(self, user: User) -> None:
        """Boot the guest, wait for the end of the job, shut the guest down."""
        spec, image = await self._specification(user)
        self.progress.private = {"spec": as_plain(spec), "directory": self.call.directory.directory}
        self.progress.stage("spec", "staging")
        job = Job(self.call.job_id, self.place, user, spec, image, self.guest_name, self.node)
        with self._console_log() as console_log:
            guest, host_key = await boot(job, self.config, self.templates, self.progress, console_log)
            try:
                await first(guest.ready(self.config.timeouts.boot), self.job_over.wait())
                if not self.job_over.is_set():
                    self.progress.private["ssh"] = {"port": guest.ssh_port, "host_key": host_key.public}
                    self.progress.stage("ready", "ready")
                    asyncio.get_running_loop().run_in_executor(None, _reap, self.config)
                    await first(guest.died(), self._unattended(), self.job_over.wait())
                self.progress.stage("job ended", "ending")
                await guest.shut_down(self.config.timeouts)
            except VTorqueError as err:
                self.progress.fail(err, guest.hook_output)
                raise
            finally:
                await guest.kill()

    async def _specification(self, user: User) -> tuple[Spec, Image]:
        """What the user asks for, read with the user's rights, and checked as if `vsub` had never seen it."""
        directory = self.call.directory
        if self.call.node_index:
            raise VTorqueError("guest jobs of more than one node are not possible yet", code=Code.NODE)
        if directory.home != user.home:
            raise VTorqueError(f"{directory.home} is not the home of {user.name} ({user.home})", code=Code.SPEC)
        source = f"{directory.directory}/spec.json"
        data = await read_file(user, source, limit=MAX_SPEC_BYTES, timeout_s=self.config.timeouts.user_file)
        spec = parse_spec(data, sha256=directory.sha256, source=source)
        subject = Subject(user.name, primary_group(user), self.call.queue)
        image = check_spec(spec, self.config, subject, source)
        abilities.check(spec)
        return spec, image

    @contextmanager
    def _console_log(self) -> Iterator[Optional[BinaryIO]]:
        if self.log is None:
            yield None
            return
        try:
            stream = self.log.with_suffix(".console").open("wb", buffering=0)
        except OSError as err:
            LOGGER.warning("the console is not logged: %s", err)
            yield None
            return
        with stream:
            yield stream

    def _undo_older(self) -> None:
        """A requeued job keeps its id: what an earlier attempt left, its epilogue lost or late, goes first."""
        for other in record.places(self.config.paths, self.call.job_id):
            if other.attempt < self.place.attempt or not other.is_of_this_boot:
                for failure in undo(other):
                    LOGGER.error("of an earlier attempt is left: %s", failure)
