"""A copy of a running guest's disk as it is at one moment: a backup job of QEMU's into a descriptor of ours.

What the guest writes meanwhile goes to its own disk; QEMU copies what would be overwritten first. All that QEMU says
is the user's word: it decides how long is waited and what is shown, no more.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.logs import LOGGER
from vmgr.node.monitor import Monitor

NAME = "save"
"""The job and the node of the target in QEMU."""
_FD_SETS = itertools.count(100)
"""A set of descriptors for each copy: QEMU keeps those of a paused guest until it runs again, and opens the oldest."""
FIRST_LOOK_S, LAST_LOOK_S = 0.05, 1.0
END_SECONDS = 20.0


class Copied(NamedTuple):
    """How far a copy is, in bytes, by QEMU's word."""

    so_far: int
    total: int


@asynccontextmanager
async def disk_copy(monitor: Monitor, target: int, *, whole: bool) -> AsyncIterator[AsyncIterator[Copied]]:
    """Copy the guest's disk, as it is when this is entered, into the empty qcow2 file that is open as `target`.

    `whole` copies all that the guest sees; else what its overlay has, so that the copy is one more layer on what the
    overlay lies on. Iterate what this gives until the copy is complete. Afterwards QEMU has let go of `target`,
    whatever happened. Raises VTorqueError (VT-GUEST) with what QEMU says.
    """
    fd_set = next(_FD_SETS)
    try:
        await _begin(monitor, target, fd_set, whole)
        yield _follow(monitor)
    finally:
        try:
            await asyncio.shield(asyncio.wait_for(_end(monitor, fd_set), END_SECONDS))
        except asyncio.TimeoutError:
            LOGGER.warning("QEMU does not let go of the copy of a disk")


async def overlay_bytes(monitor: Monitor) -> int:
    """Bytes that the guest's overlay takes by QEMU's word, 0 where it does not tell. Raises VTorqueError (VT-GUEST)."""
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    for node in nodes if isinstance(nodes, list) else []:
        if isinstance(node, dict) and node.get("node-name") == "overlay":
            image = node.get("image")
            return max(0, _number(image, "actual-size")) if isinstance(image, dict) else 0
    return 0


async def _begin(monitor: Monitor, target: int, fd_set: int, whole: bool) -> None:
    await monitor.execute("add-fd", {"fdset-id": fd_set, "opaque": NAME}, fd=target)
    await monitor.execute(
        "blockdev-add",
        {
            "driver": "qcow2",
            "node-name": NAME,
            "discard": "unmap",
            "file": {"driver": "file", "filename": f"/dev/fdset/{fd_set}", "locking": "off"},
            # with what lies below it known, nothing that is zero in the overlay alone can be taken for not there
            "backing": None if whole else "backing",
        },
    )
    await monitor.execute(
        "blockdev-backup",
        {
            "job-id": NAME,
            "device": "overlay",
            "target": NAME,
            "sync": "full" if whole else "top",
            "auto-dismiss": False,
        },
    )


async def _follow(monitor: Monitor) -> AsyncIterator[Copied]:
    """How far it is, now and then, until it is complete: QEMU says that only when it is asked."""
    pause = FIRST_LOOK_S
    while True:
        job = await _job(monitor)
        if job is None or job.get("status") == "null":
            raise VTorqueError("QEMU has given up the copy of the disk", code=Code.GUEST)
        concluded = job.get("status") == "concluded"
        if concluded and "error" in job:
            raise VTorqueError(f"the copy of the disk failed: {str(job['error'])[:300]}", code=Code.GUEST)
        yield Copied(_number(job, "current-progress"), _number(job, "total-progress"))
        if concluded:
            return
        await asyncio.sleep(pause)
        pause = min(2 * pause, LAST_LOOK_S)


async def _job(monitor: Monitor) -> Optional[dict[str, Any]]:
    jobs = await monitor.execute("query-jobs")
    listed = jobs if isinstance(jobs, list) else []
    return next((job for job in listed if isinstance(job, dict) and job.get("id") == NAME), None)


def _number(job: dict[str, Any], key: str) -> int:
    value = job.get(key)
    return value if type(value) is int else 0


async def _end(monitor: Monitor, fd_set: int) -> None:
    """Have QEMU end the job, if it still runs, and let go of its target; where QEMU has gone there is nothing to do."""
    try:
        job = await _job(monitor)
        if job is not None and job.get("status") != "concluded":
            await _try(monitor, "job-cancel", {"id": NAME})  # it may have come to its end by itself meanwhile
            with suppress(VTorqueError):  # cancelled: that is what it says
                async for _ in _follow(monitor):
                    pass
    except VTorqueError as err:
        LOGGER.debug("the copy of a disk: %s", err)
        return
    if job is not None:
        await _try(monitor, "job-dismiss", {"id": NAME})
    await _try(monitor, "blockdev-del", {"node-name": NAME})
    await _try(monitor, "remove-fd", {"fdset-id": fd_set})


async def _try(monitor: Monitor, command: str, arguments: Mapping[str, Any]) -> None:
    try:
        await monitor.execute(command, arguments)
    except VTorqueError as err:
        LOGGER.debug("the copy of a disk: %s", err)
