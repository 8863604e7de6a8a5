"""The user prologue: waits, as the job's user, until the guest is ready or is known not to come up.

TORQUE does not charge this time to the job. It always ends with 0, because another status would requeue the job for
ever or lose its output: the job wrapper waits again, and tells the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from vmgr.config import Config, load_config
from vmgr.errors import VTorqueError
from vmgr.node.client import AgentLink
from vmgr.paths import installation


def main(argv: Sequence[str]) -> int:
    """Called with the arguments of a prologue, the job's id first."""
    try:
        config = load_config(installation())
        asyncio.run(_wait(config, argv[0]))
    except (VTorqueError, OSError, asyncio.TimeoutError, IndexError):
        pass  # the job wrapper finds the same and says it on the job's own error stream
    return 0


async def _wait(config: Config, job_id: str) -> None:
    await asyncio.wait_for(_until_settled(config, job_id), config.timeouts.barrier)


async def _until_settled(config: Config, job_id: str) -> None:
    link = await AgentLink.open(config.paths, job_id)
    async for snapshot in link.follow():
        if snapshot["state"] not in ("starting", "staging", "booting"):
            return
