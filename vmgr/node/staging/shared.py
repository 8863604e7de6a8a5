"""fs_type=sharedfs: a copy of the image for each node, and the overlays on it, in the job's workspace.

The workspace is the user's, on a file system that may squash root: everything there is made, copied, opened and
removed by children with the user's rights.
"""

from __future__ import annotations

import errno
import os

from vmgr.errors import Code, VTorqueError
from vmgr.node import record
from vmgr.node.staging.child import Channel, in_child
from vmgr.node.staging.copying import Original, copy_image, original
from vmgr.node.staging.model import Disk, StageRequest
from vmgr.node.staging.overlay import CREATE, MIB, write_overlay

_COPY = "image"


async def stage_shared(request: StageRequest, source: int, empty: bytes) -> list[Disk]:
    """The disks, their files in a new folder of the workspace. Raises VTorqueError (VT-STAGE)."""
    disk, user = original(request.image, "disk"), request.user
    if request.workspace is None:
        raise VTorqueError(
            "fs_type=sharedfs needs a workspace on a shared file system, and this site has none",
            code=Code.STAGE,
            hint="ask for fs_type=overlay",
        )
    folder = f"{request.workspace}/.vtorque-{os.uname().nodename.partition('.')[0]}-{request.place.attempt}"
    step = {"do": "shared", "path": folder, "uid": user.uid, "gid": user.gid, "gids": user.gids}
    record.append(request.place, step)
    outcome = await in_child(
        request.place,
        user,
        lambda channel: _fill(channel, request, source, disk, folder, empty),
        keep=[source],
        tell=request.tell,
        silence_s=request.config.timeouts.boot,
    )
    fds = outcome.descriptors
    return [Disk(*pair, request.image.disk_format) for pair in zip(fds[::2], fds[1::2])]


def _fill(channel: Channel, request: StageRequest, source: int, disk: Original, folder: str, empty: bytes) -> None:
    """In the child: the copy, the overlays, and all of them opened."""
    what = folder
    try:
        os.mkdir(folder, 0o700)  # noqa: PTH102
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        what = f"{folder}/{_COPY}"
        copy = os.open(_COPY, CREATE, 0o600, dir_fd=at)
        copy_image(source, copy, disk, channel.tell)
        for name in request.names:
            what = f"{folder}/{name}.qcow2"
            overlay = write_overlay(f"{name}.qcow2", empty, folder=at)
            channel.give(overlay, os.open(_COPY, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at))
            os.close(overlay)
    except OSError as err:
        full = err.errno in (errno.ENOSPC, errno.EDQUOT)
        raise VTorqueError(
            f"cannot write {what}: {err.strerror}",
            code=Code.STAGE,
            hint=f"the copy of the image takes {-(-disk.size // MIB)} MiB there on each node" if full else None,
        ) from err
