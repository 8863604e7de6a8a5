"""What the agent of one node tells those of the job's other nodes, and awaits of them, from its start to its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.node import record
from vmgr.node.allocation import Allocation
from vmgr.node.fellows import Fellows
from vmgr.node.meeting import FAILED, GONE
from vmgr.node.state import Progress
from vmgr.node.user import User

if TYPE_CHECKING:
    from vmgr.node.survivor import Survivor


class OtherNodes:
    """The other nodes of one attempt, met in the job's directory; nobody before it is known which they are.

    A sister has a witness beside it: a process that tells the mother superior when the agent dies, which ends the job.
    """

    def __init__(
        self, config: Config, user: User, place: record.Place, job_id: str, directory: str, progress: Progress
    ) -> None:
        self._config = config
        self._user = user
        self._place = place
        self._job_id = job_id
        self._directory = directory
        self._progress = progress
        self._witness: Optional[Survivor] = None
        self.fellows: Optional[Fellows] = None

    def meet(self, allocation: Allocation) -> Fellows:
        """The agents of these nodes; on a sister the witness stands by from now on.

        Raises VTorqueError (VT-INTERNAL) when there can be none.
        """
        timeout_s = self._config.timeouts.user_file
        self.fellows = fellows = Fellows(self._directory, allocation, self._user, timeout_s=timeout_s)
        if not fellows.leads:
            self._call_witness(fellows)
        return fellows

    async def tell_failure(self) -> None:
        """On the mother superior: end the job on all nodes; on a sister: have her do so."""
        if self.fellows is None:
            return
        if self.fellows.leads:
            await self.fellows.call_over()
        else:
            await self.fellows.tell(FAILED, self._progress.failure())

    async def hear_of_the_end(self) -> None:
        """On the mother superior: end the job on all nodes, and wait until nothing is left on the others.

        The record is to be there still, so that an epilogue that comes meanwhile ends the waiting.
        """
        if self.fellows is not None:
            await self.fellows.call_over()
            timeouts = self._config.timeouts
            problem = await self.fellows.all_gone(timeouts.vm_epilogue + timeouts.shutdown)
            if problem is not None:
                self._progress.fail(problem)

    def dismiss_witness(self) -> None:
        """Have none any more; fine when there is none."""
        if self._witness is not None:
            self._witness.dismiss()

    async def tell_of_the_end(self) -> None:
        """On a sister: tell that nothing is left here. On any node nothing is heard of the others any more."""
        if self.fellows is not None:
            if not self.fellows.leads:
                await self.fellows.tell(GONE, self._progress.failure())
            await self.fellows.close()

    def _call_witness(self, fellows: Fellows) -> None:
        from vmgr.node.survivor import Survivor  # few jobs have several nodes

        async def tell() -> None:
            progress = Progress(self._place.start, {})
            progress.fail(VTorqueError("the node agent has died", code=Code.AGENT, hint="see the log of that node"))
            await fellows.tell(FAILED, progress.failure())

        self._witness = Survivor(self._config, self._user, self._place, self._job_id, role="witness")
        self._witness.call(tell)
