"""A suspended job that goes on: it stays stored until the attempt has taken it over, and goes back where that fails."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError, printable
from vmgr.logs import LOGGER
from vmgr.node import record
from vmgr.node.attendance import Attendance
from vmgr.node.fellows import Fellows
from vmgr.node.guestjob import Job
from vmgr.node.resuming import Resumption
from vmgr.node.state import Progress
from vmgr.node.user import User
from vmgr.node.workspace import keep_workspace

if TYPE_CHECKING:
    from vmgr.node.standin import StandIn

MAX_REASON = 500


class Takeover:
    """Whether one attempt's job is stored, so that its next start goes on from where this one did.

    Where `leads` (on the mother superior) somebody stands in for the agent while it is; the agent's socket `listener`
    is what that serves then. Made in the loop in which it is used.
    """

    def __init__(
        self,
        config: Config,
        user: User,
        place: record.Place,
        job_id: str,
        progress: Progress,
        listener: socket.socket,
        *,
        leads: bool,
    ) -> None:
        self._config = config
        self._user = user
        self._place = place
        self._job_id = job_id
        self._progress = progress
        self._listener = listener
        self._leads = leads
        self._within_reach: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.stand_in: Optional[StandIn] = None
        """The mother superior's, for a job that can be suspended, where the site stores such jobs."""
        self.is_stored: Optional[bool] = None
        """None: that is not known yet."""
        self.is_put_back = False

    def note_stored(self, is_stored: bool) -> None:
        """Note that the job is stored, or may be, or is not. Raises VTorqueError (VT-INTERNAL)."""
        self.is_stored = is_stored
        if not is_stored:
            self.stand_alone()
        elif self._leads and self._config.suspended.folder is not None:
            if self.stand_in is None:
                from vmgr.node.standin import StandIn  # few jobs can be suspended

                self.stand_in = StandIn(self._config, self._user, self._place, self._job_id, self._listener)
            self.stand_in.call()

    def stand_alone(self) -> None:
        """Have nobody stand in for the agent any more; fine when nobody does."""
        if self.stand_in is not None:
            self.stand_in.dismiss()

    def note_within_reach(self, error: object) -> None:
        """The job's wrapper has the script within reach, or says why not; its first word counts."""
        if not self._within_reach.done():
            self._within_reach.set_result(error)

    async def let_go_on(self, job: Job, found: Resumption) -> None:
        """On the mother superior: let the script go on when its wrapper has it within reach, and nothing is stored of
        the job any more. Raises VTorqueError: VT-CONNECT when it is not within reach, and as `take_over`.

        This does not return.
        """
        error = await self._within_reach
        if error is not None:
            raise VTorqueError(printable(str(error)[:MAX_REASON]), code=Code.CONNECT)
        await self.take_over(job, found)
        self.stand_alone()
        self._progress.stage("job started", "running")
        await asyncio.Event().wait()

    async def take_over(self, job: Job, found: Resumption) -> None:
        """Have the job be this attempt's alone: nothing of it is stored any more, and its workspace ends with it.

        Its script has not gone on yet, so that the job's next start can try again when this fails. Raises VTorqueError
        (VT-SUSPEND).
        """
        await found.stored.drop(job.job_id)  # what others have left takes its time
        claiming = asyncio.ensure_future(found.stored.claim(job.job_id))
        try:
            await asyncio.wait([claiming])
        finally:  # it is known, also when this is given up
            await asyncio.wait([claiming])
            self.is_stored = claiming.exception() is not None or not claiming.result()
        if not claiming.result():
            raise VTorqueError(
                "what was stored of the job has been deleted meanwhile", code=Code.SUSPEND,
                hint="it starts from its beginning when it is released",
            )  # fmt: skip
        if job.stands_for.workspace is not None and self._config.workspace.wipe:
            keep_workspace(self._place, job.user, job.stands_for.workspace, kept=False)
        try:
            await found.stored.remove(job.job_id)
        except VTorqueError as err:
            LOGGER.warning("%s", err)

    async def is_still_stored(self, job: Job) -> bool:
        """Whether the job's next start goes on from where this one did.

        Its guests are not shut down then: nothing of theirs, such as a script that ends, is to change what its shares
        hold. A sister learns from the store whether the mother superior has taken the job over.
        """
        if job.resumption is None or job.allocation.node_index == 0:
            return bool(self.is_stored)
        try:
            found = await job.resumption.stored.find(job.job_id)
        except (VTorqueError, OSError) as err:
            LOGGER.warning("%s", err)
            return False
        return found is not None and found[0] == job.resumption.entry

    async def put_back(self, problem: VTorqueError, attendance: Attendance, fellows: Optional[Fellows]) -> bool:
        """On the mother superior: whether a job that was suspended, and has not gone on, waits again to be released."""
        if not self._leads or self.is_stored is False:
            return False
        if attendance.over.is_set() or self._progress.error is not None:
            return False
        from vmgr.node.returning import means_of, put_back  # few jobs go on

        try:
            means = means_of(self._config, self._user, self._job_id, attendance.attached, attendance.over, fellows)
            self.is_put_back = await put_back(means, self._progress, problem, is_stored=self.is_stored)
        except Exception:
            LOGGER.exception("fault")
        return self.is_put_back
