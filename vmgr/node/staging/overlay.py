"""Overlays: made empty by qemu-img once for all guests of a node, and written wherever they are to lie."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image
from vmgr.node import record

MIB = 1 << 20
_BLOCK = 4096
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
"""How a file of ours is made, by whomever: it was not there before, and is no link."""


async def empty_overlay(virtual_size: int) -> bytes:
    """The content of a qcow2 file of `virtual_size` bytes with nothing in it. Raises VTorqueError (VT-STAGE)."""
    memory = os.memfd_create("overlay", os.MFD_CLOEXEC)
    try:
        child = await asyncio.create_subprocess_exec(
            "qemu-img", "create", "-q",
            "-f", "qcow2",
            f"/proc/self/fd/{memory}",
            str(virtual_size),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=[memory],
        )  # fmt: skip
        _, errors = await child.communicate()
        if child.returncode:
            said = errors.decode("utf-8", "replace").strip()[-300:]
            raise VTorqueError(f"qemu-img cannot make an overlay: {said}", code=Code.STAGE)
        return os.pread(memory, os.fstat(memory).st_size, 0)
    except OSError as err:
        raise VTorqueError(f"qemu-img cannot make an overlay: {err.strerror}", code=Code.STAGE) from err
    finally:
        os.close(memory)


def write_overlay(path: str, empty: bytes, *, folder: Optional[int] = None) -> int:
    """Make the overlay `path` (0600, below the open `folder` where one is given); gives it open. Raises OSError."""
    fd = os.open(path, CREATE, 0o600, dir_fd=folder)
    try:
        fill_overlay(fd, empty)
    except BaseException:
        os.close(fd)
        raise
    return fd


def fill_overlay(fd: int, empty: bytes) -> None:
    """Make an open, empty file the overlay. Raises OSError."""
    os.ftruncate(fd, len(empty))
    for at in range(0, len(empty), _BLOCK):
        block = empty[at : at + _BLOCK]
        if block.strip(b"\0"):
            os.pwrite(fd, block, at)


def reserve_overlays(config: Config, place: record.Place, image: Image, names: Sequence[str]) -> list[Path]:
    """Room for an overlay of `image` for each of `names`, and their paths, written to the record.

    An overlay may grow to the virtual size of its image, and that is what it is counted with: the bound holds
    whatever guests write. (A user who takes the descriptor out of QEMU, which runs as that user, can write past it;
    where that matters the folder is a file system of its own.) Counting and writing happen under the node's lock.
    Raises VTorqueError (VT-STAGE).
    """
    folder = config.images.overlays
    record.make_folder(folder, 0o700)
    with record.node_lock(config.paths, "overlays"):
        taken, bound = reserved(config, "overlay"), config.images.overlays_max * MIB
        if taken + len(names) * image.virtual_size > bound:
            raise VTorqueError(
                f"{len(names)} overlays of {image.virtual_size // MIB} MiB do not fit: "
                f"{taken // MIB} of {bound // MIB} MiB are given away",
                code=Code.STAGE,
                hint=f"images.overlays_max, {config.origin('images.overlays_max')}",
            )
        paths = [folder / f"{place.folder.parent.name}.{place.attempt}.{name}.qcow2" for name in names]
        for path in paths:
            record.append(place, {"do": "overlay", "path": str(path), "reserved": image.virtual_size})
    return paths


def reserved(config: Config, kind: str) -> int:
    """Bytes that steps of this kind have reserved on the node, together.

    An attempt that is dead counts with what it has left, not with what its record still names: that stays until
    everything could be undone.
    """
    total = 0
    for place in record.places(config.paths):
        held = record.is_held(place)
        for step in record.steps(place):
            if step.get("do") == kind and (held or Path(str(step.get("path", ""))).is_file()):
                total += int(step["reserved"])
    return total
