"""Making the disks of a node's guests ready, as `fs_type` says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

from vmgr.errors import Code, VTorqueError
from vmgr.node.staging.model import BootFiles, Disk, StageRequest
from vmgr.node.staging.overlay import empty_overlay, reserve_overlays, write_overlay


async def stage(request: StageRequest) -> list[Optional[Disk]]:
    """The disks of the guests `request.names`, in order; None for each where the image has no disk.

    Every step is written to the record before the deed; what was made until a failure or a cancellation stands there,
    and no descriptor of it is left open. Raises VTorqueError (VT-STAGE).
    """
    image = request.image
    if image.disk is None:
        return [None for _ in request.names]
    if request.own_disk is not None:
        return [*(await _stage_overlay(request, request.own_disk))]
    path = await _nearest(request, "disk")
    try:
        source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as err:
        raise VTorqueError(f"cannot read {path}: {err.strerror}", code=Code.STAGE) from err
    try:
        if request.fs_type == "overlay":
            return [*(await _stage_overlay(request, source))]
        empty = await empty_overlay(image.virtual_size)
        if request.fs_type == "sharedfs":
            from vmgr.node.staging.shared import stage_shared  # what copies is loaded by those who copy

            return [*(await stage_shared(request, source, empty))]
        from vmgr.node.staging.ramdisk import stage_ramdisk

        return [*(await stage_ramdisk(request, source, empty))]
    finally:
        os.close(source)


async def boot_files(request: StageRequest) -> BootFiles:
    """Where QEMU finds what it boots: in the node's cache, where the site has one and there is room, or in the pool.

    Nowhere where the image boots from its own disk. Raises VTorqueError (VT-STAGE, VT-IMAGE).
    """
    image = request.image
    return BootFiles(
        await _nearest(request, "kernel") if image.kernel else None,
        await _nearest(request, "initrd") if image.initrd else None,
    )


async def _nearest(request: StageRequest, part: str) -> Path:
    if request.config.images.cache.folder is None:
        return request.image.path(part)
    from vmgr.node.staging.cache import nearest  # few sites have one

    return await nearest(request, part)


async def _stage_overlay(request: StageRequest, source: int) -> list[Disk]:
    """Overlays in the node's folder on the pool's image itself: nothing is copied."""
    paths = reserve_overlays(request.config, request.place, request.image, request.names)
    empty = await empty_overlay(request.image.virtual_size)
    disks: list[Disk] = []
    try:
        for path in paths:
            overlay = write_overlay(os.fspath(path), empty)
            disks.append(Disk(overlay, -1, request.image.disk_format))
            again = os.dup(source) if request.own_disk is not None else _open_again(source)
            disks[-1] = disks[-1]._replace(backing=again)
    except OSError as err:
        for disk in disks:
            close_disk(disk)
        folder = request.config.images.overlays
        raise VTorqueError(f"cannot make an overlay in {folder}: {err.strerror}", code=Code.STAGE) from err
    return disks


def _open_again(source: int) -> int:
    """The same file opened once more: each QEMU has its own position, flags and locks."""
    return os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_CLOEXEC)


def close_disk(disk: Optional[Disk]) -> None:
    """Close what QEMU has inherited by now, or what was made for nothing."""
    for fd in (disk.overlay, disk.backing) if disk is not None else ():
        if fd >= 0:
            os.close(fd)
