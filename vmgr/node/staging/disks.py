"""Making the disks of a node's guests ready, as `fs_type` says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Pool
from vmgr.node.staging.chain import chain_of
from vmgr.node.staging.model import BootFiles, Disk, Source, StageRequest, disk_of
from vmgr.node.staging.overlay import empty_overlay, reserve_overlays, write_overlay


async def stage(request: StageRequest) -> list[Optional[Disk]]:
    """The disks of the guests `request.names`, in order; None for each where the image has no disk.

    Every step is written to the record before the deed; what was made until a failure or a cancellation stands there,
    and no descriptor of it is left open. Raises VTorqueError (VT-STAGE; VT-IMAGE for a layer without its parents).
    """
    image = request.image
    if image.disk is None:
        return [None for _ in request.names]
    if request.own_disk is not None:
        return [*(await _stage_overlay(request, [Source(image, request.own_disk)]))]
    sources: list[Source] = []
    try:
        for each in chain_of(Pool(request.config.images.pool), image):
            sources.append(await _open_nearest(request._replace(image=each)))
        if request.fs_type == "overlay":
            return [*(await _stage_overlay(request, sources))]
        empty = await empty_overlay(image.virtual_size)
        if request.fs_type == "sharedfs":
            from vmgr.node.staging.shared import stage_shared  # what copies is loaded by those who copy

            return [*(await stage_shared(request, sources, empty))]
        from vmgr.node.staging.ramdisk import stage_ramdisk

        return [*(await stage_ramdisk(request, sources, empty))]
    finally:
        for source in sources:
            os.close(source.fd)


async def _open_nearest(request: StageRequest) -> Source:
    path = await _nearest(request, "disk")
    try:
        return Source(request.image, os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    except OSError as err:
        raise VTorqueError(f"cannot read {path}: {err.strerror}", code=Code.STAGE) from err


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


async def _stage_overlay(request: StageRequest, sources: Sequence[Source]) -> list[Disk]:
    """Overlays in the node's folder on the pool's image itself: nothing is copied."""
    paths = reserve_overlays(request.config, request.place, request.image, request.names)
    empty = await empty_overlay(request.image.virtual_size)
    opened: list[list[int]] = []
    try:
        for path in paths:
            opened.append([write_overlay(os.fspath(path), empty)])
            for source in sources:
                again = os.dup(source.fd) if request.own_disk is not None else _open_again(source.fd)
                opened[-1].append(again)
    except OSError as err:
        for fd in (fd for fds in opened for fd in fds):
            os.close(fd)
        folder = request.config.images.overlays
        raise VTorqueError(f"cannot make an overlay in {folder}: {err.strerror}", code=Code.STAGE) from err
    return [disk_of(fds, sources) for fds in opened]


def _open_again(source: int) -> int:
    """The same file opened once more: each QEMU has its own position, flags and locks."""
    return os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_CLOEXEC)


def close_disk(disk: Optional[Disk]) -> None:
    """Close what QEMU has inherited by now, or what was made for nothing."""
    if disk is not None:
        for fd in (disk.overlay, disk.backing, *(layer.fd for layer in disk.parents)):
            os.close(fd)
