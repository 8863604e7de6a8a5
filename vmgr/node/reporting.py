"""What is told of an attempt beside its work: to its user's status file, to the job's report, to the node's counts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from vmgr.config import Config
from vmgr.jobspec import as_plain
from vmgr.logs import LOGGER
from vmgr.node import record
from vmgr.node.allocation import Allocation, guest_name
from vmgr.node.checkedjob import Call
from vmgr.node.guestjob import Job
from vmgr.node.jobfiles import status_name
from vmgr.node.state import Progress, publish
from vmgr.node.user import User

REPORT_SECONDS = 1.0
"""So long after an attempt's start its report begins, when its guests are not there before."""


class Reporting:
    """Tells of one attempt. `log` is that of its job, None where no logs are kept, and with them no report.

    The node's name stands in `progress` already, and its guests' as far as one can know them.
    """

    def __init__(
        self, config: Config, place: record.Place, call: Call, user: User, log: Optional[Path], progress: Progress
    ) -> None:
        self._config = config
        self._place = place
        self._call = call
        self._user = user
        self._log = log
        self._progress = progress
        self._learned: dict[str, Any] = {"user": call.user, "node_index": call.node_index}
        self._is_noted = False
        self._telling: list[asyncio.Future[None]] = []

    def begin(self) -> None:
        """Tell from now on, until the attempt's last stage."""
        self._telling = [asyncio.ensure_future(tell) for tell in (self._publish(), self._report(), self._count())]

    async def end(self) -> None:
        """Wait until the attempt's last stage has been told; there is one."""
        await asyncio.gather(*self._telling, return_exceptions=True)

    def learn_nodes(self, allocation: Allocation) -> None:
        """The job has these nodes. A sister's part of the report names the mother superior alone."""
        self._progress.facts.update(names_of(allocation.name))
        self._learned.update(key=allocation.key, node_index=allocation.node_index)
        self._learned["nodes"] = list(allocation.nodes[:1] if allocation.node_index else allocation.nodes)

    def learn_job(self, job: Job) -> None:
        """This is what the guests are for."""
        progress, allocation = self._progress, job.allocation
        progress.facts.update(names_of(allocation.name, [member.name for member in job.own]))
        self._learned["first_rank"] = allocation.node_index * job.group.per_node
        progress.private.update(
            spec=as_plain(job.spec), directory=self._call.directory.directory,
            nodes=allocation.nodes, image=job.image.reference, resumed=job.resumption is not None,
        )  # fmt: skip
        LOGGER.info("%simage %s", "suspended, goes on; " if job.resumption else "", job.image.reference)
        if job.spec.disk is not None and allocation.node_index == 0:
            from vmgr.node.datadisk import disk_path  # few jobs have one

            progress.facts["disk"] = disk_path(job.spec, job.job_id)

    def note_member(self, name: object) -> None:
        """Note which member of a job array this is, once, where it has a number of its own; its wrapper's word."""
        if name is None or self._log is None or self._is_noted:
            return
        from vmgr.report.members import note  # few jobs are members

        self._is_noted = True
        note(self._log.parent, name, self._call.job_id, self._user.uid)

    async def _publish(self) -> None:
        """Keep the status file of the job current: the mother superior's, which knows of all nodes' failures."""
        if self._call.node_index == 0:
            path = f"{self._call.directory.directory}/{status_name(self._call.tag, self._progress.facts['node'])}"
            await publish(self._progress, self._user, path, timeout_s=self._config.timeouts.user_file)

    async def _report(self) -> None:
        """Keep the node's part of the job's report current, where logs are kept.

        It begins while a disk is made or a guest boots, or when all is over: loading it would hold up the start.
        """
        if self._log is not None:
            await _come_to(self._progress, "pinned and running", within_s=REPORT_SECONDS)
            from vmgr.report.keep import keep

            await keep(self._progress, self._log, self._user.uid, self._learned)

    async def _count(self) -> None:
        """Tell the node's counts of the attempt, from when there is something to tell."""
        await _come_to(self._progress, "guests ready", "ready", "failed")
        from vmgr.metrics.watch import count  # as above

        await count(self._progress, self._config.paths, self._place)


def names_of(node: str, guests: Optional[Sequence[str]] = None) -> dict[str, Any]:
    """What is told of who this node and its guests are; that there are several of these may not be known yet."""
    names = list(guests) if guests else [guest_name(node, 1)]
    return {"node": node, "guest": names[0], "guests": names}


async def _come_to(progress: Progress, *stages: str, within_s: Optional[float] = None) -> None:
    """Wait for one of these stages, the attempt's last one, or the time."""

    async def wait() -> None:
        async for _ in progress.changes():
            if any(stage["name"] in (*stages, "gone") for stage in progress.stages):
                return

    waiting = asyncio.ensure_future(wait())
    await asyncio.wait([waiting], timeout=within_s)
    waiting.cancel()
