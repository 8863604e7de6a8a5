"""fs_type=sharedfs: a copy of the image for each node, and the overlays on it, in the job's workspace.

The workspace is the user's, on a file system that may squash root: everything there is made, copied, opened and
removed by children with the user's rights.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from vmgr.errors import Code, VTorqueError
from vmgr.node import record
from vmgr.node.staging.chain import names_of
from vmgr.node.staging.child import Channel, in_child
from vmgr.node.staging.copying import Original, copy_image, original
from vmgr.node.staging.model import Disk, Source, StageRequest, disk_of
from vmgr.node.staging.overlay import CREATE, MIB, write_overlay


async def stage_shared(request: StageRequest, sources: Sequence[Source], empty: bytes) -> list[Disk]:
    """The disks, their files in a new folder of the workspace. Raises VTorqueError (VT-STAGE)."""
    originals, user = [original(source.image, "disk") for source in sources], request.user
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
        lambda channel: _fill(channel, request, sources, originals, folder, empty),
        keep=[source.fd for source in sources],
        tell=request.tell,
        silence_s=request.config.timeouts.boot,
    )
    fds, each = outcome.descriptors, 1 + len(sources)
    return [disk_of(fds[at : at + each], sources) for at in range(0, len(fds), each)]


def _fill(
    channel: Channel,
    request: StageRequest,
    sources: Sequence[Source],
    originals: Sequence[Original],
    folder: str,
    empty: bytes,
) -> None:
    """In the child: the copies, the overlays, and all of them opened."""
    what, copies = folder, names_of([source.image for source in sources])
    try:
        os.mkdir(folder, 0o700)  # noqa: PTH102
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        for source, disk, name in zip(sources, originals, copies):
            what = f"{folder}/{name}"
            copy = os.open(name, CREATE, 0o600, dir_fd=at)
            copy_image(source.fd, copy, disk, channel.tell)
            os.close(copy)
        for guest in request.names:
            what = f"{folder}/{guest}.qcow2"
            _give(channel, write_overlay(f"{guest}.qcow2", empty, folder=at))
            for name in copies:
                _give(channel, os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at))
    except OSError as err:
        full, size = err.errno in (errno.ENOSPC, errno.EDQUOT), sum(disk.size for disk in originals)
        raise VTorqueError(
            f"cannot write {what}: {err.strerror}",
            code=Code.STAGE,
            hint=f"the copy of the image takes {-(-size // MIB)} MiB there on each node" if full else None,
        ) from err


def _give(channel: Channel, fd: int) -> None:
    channel.give(fd)
    os.close(fd)
