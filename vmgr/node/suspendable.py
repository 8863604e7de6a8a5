"""What a job that can be suspended needs for that, on each of its nodes."""

from __future__ import annotations

import asyncio
from typing import Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.node.crew import Crew
from vmgr.node.fellows import Fellows
from vmgr.node.gate import Gate
from vmgr.node.guestjob import Job
from vmgr.node.standin import StandIn
from vmgr.node.state import Progress
from vmgr.node.suspending import NodeGuests, Storing
from vmgr.node.suspension import Follower, Leader, Means, Suspension
from vmgr.node.workspace import keep_workspace
from vmgr.reach import batch
from vmgr.suspended.entry import Entry
from vmgr.suspended.store import Store


def suspension_of(
    job: Job, spec_sha256: str, crew: Crew, fellows: Fellows, config: Config, progress: Progress, gate: Gate,
    stand_in: Optional[StandIn],
) -> Suspension:  # fmt: skip
    """This node's part in suspending a job whose guests run. `stand_in`: the mother superior's."""
    store, save_s = store_of(config, job), float(config.timeouts.suspend)
    guests = NodeGuests(job, crew, store, save_s=save_s)
    path = job.stands_for.workspace if config.workspace.wipe else None

    def keep(kept: bool) -> None:
        if path is not None:
            try:
                keep_workspace(job.place, job.user, path, kept=kept)
            except OSError as err:
                raise VTorqueError(f"the record of the job cannot be written: {err}", code=Code.INTERNAL) from err

    async def requeue_job(job_id: str) -> None:
        await asyncio.get_running_loop().run_in_executor(None, requeue, config, job_id)

    def attend(entry: Optional[Entry]) -> None:
        if stand_in is not None and entry is not None:
            stand_in.call(entry)
        elif stand_in is not None:
            stand_in.dismiss()

    means = Means(job, spec_sha256, guests, store, fellows, gate, save_s, requeue_job, keep, attend)
    return Leader(means, progress) if fellows.leads else Follower(means, progress)


def store_of(config: Config, job: Job) -> Storing:
    """Where the job is stored; what is being written there goes when the attempt is undone."""
    return Store(config, job.user, job.place)


def requeue(config: Config, job_id: str) -> None:
    """Have the batch system end the job's attempt, and queue it again. Raises VTorqueError (VT-ENGINE, VT-ACCESS)."""
    batch.requeue(config, job_id)
