"""What stands in for a node agent that dies while its job is stored: the job then waits again, held and queued.

Between the moment in which all of a suspended job is stored and its requeue, and of a job that goes on until nothing of
it is stored any more, the job's end would leave an entry without a job. So for that time the agent has a process
beside it (`vmgr.node.survivor`), which serves its socket when it dies, and does what the agent itself does with a job
that cannot go on (`vmgr.node.returning`). Where nothing is stored, it ends at once.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.logs import LOGGER
from vmgr.node import record
from vmgr.node.control import Control
from vmgr.node.returning import Means, means_of, put_back
from vmgr.node.state import Progress
from vmgr.node.survivor import Survivor
from vmgr.node.user import User
from vmgr.suspended.entry import SETTLED, Entry
from vmgr.suspended.store import Store

LAST_ANSWER_SECONDS = 5.0


class StandIn:
    """What stands in for the agent of one attempt, while that is wanted. `listener` is the agent's socket."""

    def __init__(self, config: Config, user: User, place: record.Place, job_id: str, listener: socket.socket) -> None:
        self._config = config
        self._user = user
        self._place = place
        self._job_id = job_id
        self._listener = listener
        self._survivor = Survivor(config, user, place, job_id, keep=[listener.fileno()])

    def call(self, entry: Optional[Entry] = None) -> None:
        """Have one from now on, for this entry of the job, or any. Raises VTorqueError (VT-INTERNAL)."""
        self._survivor.call(lambda: self._stand_in(entry))

    def dismiss(self) -> None:
        """Have none any more; fine when there is none."""
        self._survivor.dismiss()

    async def _stand_in(self, entry: Optional[Entry]) -> None:
        attached, over = asyncio.Event(), asyncio.Event()
        means = means_of(self._config, self._user, self._job_id, attached, over, None)
        if not await _is_stored(means, entry):
            return
        if entry is not None:
            with suppress(VTorqueError):  # it has been undone by now
                Store(self._config, self._user, self._place).mark(self._job_id, entry, SETTLED)
        node = os.uname().nodename.partition(".")[0]
        facts = {"job_id": self._job_id, "attempt": self._place.attempt, "node": node}
        progress = Progress(self._place.start, facts)
        control = Control(progress, self._user.uid, over=over.set, attached=attached.set)
        server = await control.serve(self._listener)
        problem = VTorqueError("the node agent has died", code=Code.AGENT, hint="the node's log may say more")
        if not await put_back(means, progress, problem, is_stored=True):
            progress.fail(problem)
        server.close()
        await control.drain(LAST_ANSWER_SECONDS)


async def _is_stored(means: Means, entry: Optional[Entry]) -> bool:
    if means.store is None:
        return False
    try:
        found = await means.store.find(means.job_id)
    except VTorqueError as err:
        LOGGER.warning("whether the job was suspended is not known: %s", err)
        return False
    return found is not None and entry in (None, found[0])
