"""What becomes of a job that an earlier daemon was killed with."""

from __future__ import annotations

import logging

from vsub.engines.local import mom, workspace
from vsub.engines.local.job import Job, Phase
from vsub.engines.local.server import Server

log = logging.getLogger("vtorque-local")

ABORTED_BY_RESTART = -4  # JOB_EXEC_INITABT


async def recover(server: Server, job: Job) -> None:
    """End what is left of a job that an earlier daemon ran, then requeue, abort or complete it."""
    if job.marks:
        log.warning("%s: ending what an earlier daemon left of it", job.id)
    await server.end_marks(job)
    if job.phase is Phase.COMPLETE:
        server.endings.forget_when_old(job)
        return
    if job.phase is not Phase.DELIVERY:
        if (job.phase is Phase.RUNNING and not job.rerun) or job.asked.interactive:
            job.exit_status, job.reason = ABORTED_BY_RESTART, "aborted: the batch server was restarted"
        job.phase = Phase.EPILOGUE
        server.records.save(job)
        await server.attempt(job).resume_epilogues()
    unstarted = not job.script_started and job.exit_status in (None, mom.RETRY)
    if (unstarted or job.rerun) and not job.asked.interactive:
        log.info("%s: requeued after a restart", job.id)
        server.requeue(job)
        return
    if job.exit_status is None or job.exit_status == ABORTED_BY_RESTART:
        job.exit_status = ABORTED_BY_RESTART
        workspace.append_error(server.superior(job), job, f"=>> PBS: job {job.reason or 'aborted'}\n")
    await server.finish(job, delivered=job.exit_status != mom.ABORTED)
