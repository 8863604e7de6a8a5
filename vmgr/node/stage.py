"""The guest's disk on the node: a copy-on-write overlay, in a folder of bounded size. Nothing is copied."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image
from vmgr.node import record

MIB = 1 << 20


def reserve_overlay(config: Config, place: record.Place, image: Image, name: str) -> Path:
    """Room for an overlay of `image`, and its path, written to the record. Raises VTorqueError (VT-STAGE).

    An overlay may grow to the virtual size of its image, and that is what it is counted with: the bound holds
    whatever guests write. (A user who takes the descriptor out of QEMU, which runs as that user, can write past it;
    where that matters the folder is a file system of its own.) Counting and writing happen under the node's lock.
    """
    folder = config.images.overlays
    record.make_folder(folder, 0o700)
    with record.node_lock(config.paths, "overlays"):
        return _reserve(config, place, image, folder / f"{place.folder.parent.name}.{place.attempt}.{name}.qcow2")


def _reserve(config: Config, place: record.Place, image: Image, overlay: Path) -> Path:
    taken = sum(
        int(step["reserved"])
        for other in record.places(config.paths)
        for step in record.steps(other)
        if step.get("do") == "overlay"
    )
    bound = config.images.overlays_max * MIB
    if taken + image.virtual_size > bound:
        raise VTorqueError(
            f"an overlay of {image.virtual_size // MIB} MiB does not fit: "
            f"{taken // MIB} of {bound // MIB} MiB are given away",
            code=Code.STAGE,
            hint=f"images.overlays_max, {config.origin('images.overlays_max')}",
        )
    record.append(place, {"do": "overlay", "path": str(overlay), "reserved": image.virtual_size})
    return overlay


async def create_overlay(backing: Path, overlay: Path, *, backing_format: str) -> None:
    """Create the copy-on-write qcow2 `overlay` (root, 0600) on `backing`.

    The backing format is never probed: a guest could otherwise write a header into a raw disk that makes a later
    reader follow a backing file of the guest's choosing. Raises VTorqueError (VT-STAGE) when qemu-img fails.
    """
    child = await asyncio.create_subprocess_exec(
        "qemu-img", "create", "-q",
        "-f", "qcow2",
        "-F", backing_format,
        "-b", os.fspath(backing),
        os.fspath(overlay),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await child.communicate()
    if child.returncode:
        said = errors.decode("utf-8", "replace").strip()[-300:]
        raise VTorqueError(f"cannot create the overlay {overlay}: {said}", code=Code.STAGE)
