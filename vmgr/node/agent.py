"""The node agent: takes one attempt of a job from its record to a running guest, and back to nothing.

Started by the prologue hook with the attempt's folder, its lock on descriptor 3 and its listening socket on 4. It
lives as long as the attempt. Whenever it dies, its guest dies with it, and the record says what is left to undo.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from vmgr import logs
from vmgr.config import Config, load_config
from vmgr.errors import Code, VTorqueError
from vmgr.logs import LOGGER
from vmgr.node import process, record
from vmgr.node.allocation import over, short
from vmgr.node.attendance import Attendance
from vmgr.node.checkedjob import Call, allocation_of, checked_job
from vmgr.node.consolelogs import console_logs
from vmgr.node.control import Control
from vmgr.node.guestjob import Job
from vmgr.node.guestlives import GuestLives
from vmgr.node.orders import orders_of
from vmgr.node.othernodes import OtherNodes
from vmgr.node.reporting import Reporting, names_of
from vmgr.node.shown import shown
from vmgr.node.state import Progress
from vmgr.node.takeover import Takeover
from vmgr.node.undo import undo, undo_older
from vmgr.node.user import User, look_up
from vmgr.node.userchild import MAX_DESCRIPTORS
from vmgr.node.waiting import first
from vmgr.node.workspace import wipe_workspace
from vmgr.paths import installation
from vmgr.trust import check_trusted

if TYPE_CHECKING:
    from vmgr.node.leftovers import Leftovers

LOCK_FD, SOCKET_FD = 3, 4
LAST_ANSWER_SECONDS = 5.0


def main(argv: Sequence[str]) -> int:
    """Run the agent for the attempt in the folder `argv[0]`."""
    for fd in (LOCK_FD, SOCKET_FD):
        os.set_inheritable(fd, False)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(MAX_DESCRIPTORS, most), most))
    install = installation()
    config = load_config(install)
    place = next((p for p in record.places(config.paths) if str(p.folder) == argv[0]), None)
    if place is None:
        print(f"vtorque: {argv[0]} is no attempt's folder", file=sys.stderr)
        return 1
    me = process.identify(os.getpid())
    assert me is not None
    record.append(place, {"do": "process", "role": "agent", **me._asdict()})
    call = Call.of(record.begun(place))
    log = logs.set_up(
        config.logging, job=call.job_id, reader=_uid(call.user),
        lives=lambda job: record.newest_socket(config.paths, job) is not None,
    )  # fmt: skip
    if record.is_buried(config.paths, call.job_id, place):
        LOGGER.info("the job was deleted before its guest was started")
        undo(place)
        record.exhume(config.paths, call.job_id)
        return 0

    try:
        for folder in (config.paths.spool, config.paths.run):
            check_trusted(folder)
        listener = socket.socket(fileno=SOCKET_FD)
        asyncio.run(run_attempt(config, install.templates, place, call, log, listener))
    except Exception:
        LOGGER.exception("fault; what is left is undone by the epilogue or the next agent")
        return 1
    return 0


def _uid(user: str) -> Optional[int]:
    """Who may read what is logged of the job; None for nobody but root."""
    try:
        return look_up(user).uid
    except VTorqueError:
        return None


async def run_attempt(
    config: Config, templates: Path, place: record.Place, call: Call, log: Optional[Path], listener: socket.socket
) -> None:
    """An attempt's whole life on one node; returns when nothing of it is left.

    `log` is that of its job, None where none is kept; `listener` is the attempt's socket.
    """
    attendance = Attendance(config.timeouts.attach, awaited=call.node_index == 0)
    attendance.end_at_signals()
    names = names_of(short(os.uname().nodename))
    progress = Progress(place.start, {"job_id": call.job_id, "attempt": place.attempt, **names})
    progress.private["user"] = call.user
    progress.stage("agent")
    for failure in undo_older(config.paths, call.job_id, place):
        LOGGER.error("of an earlier attempt is left: %s", failure)
    try:
        user = look_up(call.user)
    except VTorqueError as err:
        LOGGER.error("%s", err)
        record.note_end(config.paths, call.job_id, place)
        undo(place)
        return
    await Agent(config, templates, place, call, log, user, listener, progress, attendance).run()


class Agent:
    """One attempt on one node, whose user is known, and of whose job nothing earlier is left to undo."""

    def __init__(
        self,
        config: Config,
        templates: Path,
        place: record.Place,
        call: Call,
        log: Optional[Path],
        user: User,
        listener: socket.socket,
        progress: Progress,
        attendance: Attendance,
    ) -> None:
        leads = call.node_index == 0
        self.config = config
        self.place = place
        self.call = call
        self.log = log
        self.user = user
        self.listener = listener
        self.progress = progress
        self.attendance = attendance
        self.job: Optional[Job] = None
        self.image_held: Optional[int] = None
        self.reporting = Reporting(config, place, call, user, log, progress)
        self.others = OtherNodes(config, user, place, call.job_id, call.directory.directory, progress)
        self.takeover = Takeover(config, user, place, call.job_id, progress, listener, leads=leads)
        self.guests = GuestLives(config, templates, call, progress, attendance, self.takeover)
        progress.now = self._now

    def _now(self) -> dict[str, Any]:
        return {} if self.job is None else {"members": shown(self.job, self.guests.crew, self.guests.ssh_ports)}

    @property
    def suspended(self) -> bool:
        """Whether the attempt ends without an end of its job, which is stored and queued again."""
        return self.guests.suspended or self.takeover.is_put_back

    async def run(self) -> None:
        """The attempt's life from its socket on; returns when nothing of it is left."""
        leftovers = self._leftovers()
        control = self._control(leftovers)
        server = await control.serve(self.listener)
        self.reporting.begin()
        await self._live_and_tell()
        self.takeover.stand_alone()
        await self.others.hear_of_the_end()
        if leftovers is not None:
            await leftovers.end()
        await self._wipe()
        self.others.dismiss_witness()
        record.note_end(self.config.paths, self.call.job_id, self.place)
        for failure in undo(self.place):
            LOGGER.error("left behind: %s", failure)
        if self.image_held is not None:
            os.close(self.image_held)
        await self.others.tell_of_the_end()
        self.progress.stage("gone", None if self.progress.error or self.suspended else "ended")
        await self.reporting.end()
        server.close()
        await control.drain(LAST_ANSWER_SECONDS)

    def _leftovers(self) -> Optional[Leftovers]:
        """Where the site ends what a job leaves running on the node: what ends it."""
        if not self.config.kill_user_processes:
            return None
        from vmgr.node.leftovers import Leftovers  # psutil takes its time

        return Leftovers(self.place, self.user.uid)

    def _control(self, leftovers: Optional[Leftovers]) -> Control:
        guests = self.guests
        return Control(
            self.progress,
            self.user.uid,
            over=self.attendance.over.set,
            attached=self.attendance.attached.set,
            joined=leftovers.join if leftovers else None,
            detached=guests.detached,
            started=self._started,
            named=self.reporting.note_member,
            orders=orders_of(
                lambda: guests.crew,
                lambda: self.job,
                self.config,
                self.progress.fail,
                suspension=lambda: guests.suspension,
                gate=guests.gate,
            ),
        )

    def _started(self, error: object) -> None:
        """The job's wrapper has started the script; that of a suspended job it has within reach, or says why not."""
        if self.job is None or self.job.resumption is None:
            self.progress.stage("job started", "running")
        else:
            self.takeover.note_within_reach(error)

    async def _live_and_tell(self) -> None:
        """Live; after a failure stay for as long as the job, so that its wrapper learns the reason."""
        try:
            await self._live()
            return
        except VTorqueError as err:
            problem = err
        except Exception as err:
            LOGGER.exception("fault")
            problem = VTorqueError(f"fault in the node agent: {err}", code=Code.INTERNAL)
        is_put_back = await self.takeover.put_back(problem, self.attendance, self.others.fellows)
        self.takeover.stand_alone()
        if is_put_back:
            await self.attendance.over.wait()
            return
        self.progress.fail(problem)
        await self.others.tell_failure()
        try:
            await first(self.attendance.unattended(), self.attendance.over.wait())
        except VTorqueError as err:
            LOGGER.error("%s", err)

    async def _live(self) -> None:
        """Learn which nodes the job has and what it asks for; then its guests live."""
        call, attendance = self.call, self.attendance
        allocation = await allocation_of(call, self.place.attempt, timeout_s=self.config.timeouts.boot)
        self.reporting.learn_nodes(allocation)
        fellows = self.others.meet(allocation)
        watchers = [asyncio.ensure_future(attendance.end_after(fellows.over()))]
        if len(allocation.nodes) > 1 and call.task_file is not None:
            watchers.append(asyncio.ensure_future(attendance.end_after(over(call.task_file, allocation.key))))
        try:
            self.job, self.image_held = await checked_job(
                call, self.config, self.place, self.user, allocation, stored=self.takeover.note_stored
            )
            self.reporting.learn_job(self.job)
            self.progress.stage("spec", "staging")
            with console_logs(self.log, self.user.uid) as logs_of_consoles:
                await self.guests.live(self.job, fellows, logs_of_consoles)
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)

    async def _wipe(self) -> None:
        """On the mother superior: wipe the job's workspace where the site says so, now that no node uses it."""
        path = None
        if self.job is not None and self.config.workspace.wipe and not self.suspended:
            path = workspace_to_wipe(self.job, is_stored=self.takeover.is_stored)
        if path is not None:
            try:
                await wipe_workspace(self.config, self.user, path)
            except VTorqueError as err:
                LOGGER.warning("%s", err)


def workspace_to_wipe(job: Job, *, is_stored: Optional[bool]) -> Optional[str]:
    """The workspace that ends with the attempt of a job, None for none: not that of one which is stored, or may be."""
    return None if job.allocation.node_index or is_stored else job.stands_for.workspace
