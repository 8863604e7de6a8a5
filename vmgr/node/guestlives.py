"""The lives of a node's guests: they boot, become ready, are there for the job, and end with it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from vmgr.config import Config
from vmgr.errors import VTorqueError
from vmgr.logs import LOGGER
from vmgr.node import record
from vmgr.node.attendance import Attendance
from vmgr.node.boot import ConsoleLogs, boot
from vmgr.node.checkedjob import Call
from vmgr.node.crew import Crew
from vmgr.node.fellows import Fellows
from vmgr.node.gate import Gate
from vmgr.node.guestjob import Job
from vmgr.node.meeting import READY
from vmgr.node.readiness import all_ready, checked_ports, own_ready, said_of
from vmgr.node.state import Progress
from vmgr.node.takeover import Takeover
from vmgr.node.waiting import all_of, first

if TYPE_CHECKING:
    from vmgr.node.suspension import Suspension


class GuestLives:
    """The guests of one attempt on this node, and what of them is there now."""

    def __init__(
        self,
        config: Config,
        templates: Path,
        call: Call,
        progress: Progress,
        attendance: Attendance,
        takeover: Takeover,
    ) -> None:
        self._config = config
        self._templates = templates
        self._call = call
        self._progress = progress
        self._attendance = attendance
        self._takeover = takeover
        self.gate = Gate()
        self.crew: Optional[Crew] = None
        """The running guests, while there are some."""
        self.ssh_ports: list[int] = []
        """The port of 127.0.0.1 that leads to SSH of each guest, by its number; empty before they are ready."""
        self.suspension: Optional[Suspension] = None
        """This node's part in suspending the job, while that can be asked for; it stays when the job is suspended."""
        self.suspended = False
        """Whether they have ended because the job is suspended."""

    def detached(self, number: object, error: object) -> None:
        """The job's wrapper has left its session, so that the guests can be suspended, or says why it cannot."""
        if self.suspension is not None:
            self.suspension.detached(number, error)

    async def live(self, job: Job, fellows: Fellows, console_logs: ConsoleLogs) -> None:
        """From the guests' boot to their end. Raises VTorqueError for what ends them before the job is over."""
        crew = await self._boot(job, console_logs)
        if crew is None:
            return
        self.crew = crew
        try:
            if job.spec.suspend:
                self.suspension = self._suspension(job, crew, fellows)
            await first(self._become_ready(job, crew, fellows), fellows.failure(), self._attendance.over.wait())
            if not self._attendance.over.is_set():
                await self._until_over(job, crew, fellows)
            if await self._is_suspended():
                return
            await self._end(job, crew, fellows)
        except VTorqueError as err:
            if await self._is_suspended():  # the batch system has ended more of it than was asked for
                return
            if not self._takeover.is_stored:  # else the job may go back to where it was
                self._progress.fail(err)
            raise
        finally:
            self.crew = None
            if not self.suspended:  # else it says so, whoever asks
                self.suspension = None
            await crew.kill()

    async def _boot(self, job: Job, console_logs: ConsoleLogs) -> Optional[Crew]:
        """The node's running guests; None when the job was over before: what is copied for a guest takes its time."""
        booting = asyncio.ensure_future(boot(job, self._config, self._templates, self._progress, console_logs))
        over = asyncio.ensure_future(self._attendance.over.wait())
        try:
            await asyncio.wait([booting, over], return_when=asyncio.FIRST_COMPLETED)
            return await booting if booting.done() else None
        finally:
            for task in (booting, over):
                task.cancel()
            await asyncio.gather(booting, over, return_exceptions=True)

    def _suspension(self, job: Job, crew: Crew, fellows: Fellows) -> Suspension:
        from vmgr.node.suspendable import suspension_of  # few jobs can be

        sha256, stand_in = self._call.directory.sha256, self._takeover.stand_in
        return suspension_of(job, sha256, crew, fellows, self._config, self._progress, self.gate, stand_in)

    async def _become_ready(self, job: Job, crew: Crew, fellows: Fellows) -> None:
        """Return when the guests of this node, and on the mother superior those of all nodes, are ready."""
        boot_s, facts = self._config.timeouts.boot, self._progress.facts
        await own_ready(job, crew, fellows, boot_s)
        self.ssh_ports = await crew.open_ssh()
        self._progress.private["ssh"] = {"port": self.ssh_ports[0], "host_key": crew.host_key.public}
        facts["ssh_ports"] = crew.ssh_ports()
        await fellows.tell(READY, said_of(job, crew))
        if len(job.allocation.nodes) > 1:
            self._progress.stage("guests ready")
            for node, said in enumerate(await all_ready(fellows, boot_s)):
                facts["ssh_ports"].update(checked_ports(job, node, said))

    async def _until_over(self, job: Job, crew: Crew, fellows: Fellows) -> None:
        """Be there for the job until it is over, or suspended. Raises VTorqueError for what ends it before."""
        self._progress.stage("ready", "ready")
        asyncio.get_running_loop().run_in_executor(None, _reap, self._config)
        ends = [*(guest.died() for guest in crew.guests), fellows.failure(), self._attendance.unattended()]
        if self.suspension is not None:
            ends.append(self.suspension.run())
        if job.resumption is not None and fellows.leads:
            ends.append(self._takeover.let_go_on(job, job.resumption))
        await first(*ends, self._attendance.over.wait())

    async def _is_suspended(self) -> bool:
        """Whether the attempt ends because its job is suspended; what has been begun of that is ended."""
        if self.suspension is not None and await self.suspension.settle():
            self.suspended = True
            if self._progress.state != "suspended":  # a sister, or a failure that is none
                self._progress.stage("suspended", "suspended")
        return self.suspended

    async def _end(self, job: Job, crew: Crew, fellows: Fellows) -> None:
        """The job is over: tell the other nodes, and shut the guests down, unless they may start again as they were."""
        self._progress.stage("job ended", "ending")
        if self._call.nodes is not None and not fellows.leads:
            with suppress(OSError):
                record.append(job.place, {"do": "over"})
        await fellows.call_over()
        if not await self._takeover.is_still_stored(job):
            await all_of(*(guest.shut_down(self._config.timeouts) for guest in crew.guests))


def _reap(config: Config) -> None:
    from vmgr.node.reap import reap  # needed only when the guests are there

    try:
        for line in reap(config):
            LOGGER.warning("left by another job, removed: %s", line)
    except Exception:
        LOGGER.exception("the janitor failed")
