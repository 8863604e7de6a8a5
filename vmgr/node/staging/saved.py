"""Overlays of guests that go on: copied from where the suspended job is stored into the place of fresh ones.

The stored files are the user's, and so is the child that reads them. What was copied is looked at where it lies now,
which only QEMU and root have open: it has to be an overlay of this disk that names nothing else. What it lies on QEMU
is told.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Callable, NamedTuple

from vmgr.errors import Code, VTorqueError
from vmgr.images.header import check_qcow2
from vmgr.node.staging.child import Channel, in_child
from vmgr.node.staging.copying import copy_data, percent
from vmgr.node.staging.model import StageRequest

_HINT = "it was altered; `vmgr delete suspended` removes it, and the job starts from its beginning then"


class SavedOverlay(NamedTuple):
    """A stored overlay: its file, open for reading, its length in bytes, and how messages call it."""

    fd: int
    size: int
    shown_as: str


async def restore_overlays(request: StageRequest, targets: Sequence[int], saved: Sequence[SavedOverlay]) -> None:
    """Make each of the `targets`, staged and empty, a copy of the stored overlay of the same guest.

    Raises VTorqueError (VT-STAGE).
    """
    virtual_size = request.image.virtual_size

    def fill(channel: Channel) -> None:
        for target, overlay in zip(targets, saved):
            _fill(target, overlay, virtual_size, channel.tell)

    keep = [*targets, *(overlay.fd for overlay in saved)]
    silence_s = request.config.timeouts.boot
    await in_child(request.place, request.user, fill, keep=keep, tell=request.tell, silence_s=silence_s)


def _fill(target: int, overlay: SavedOverlay, virtual_size: int, tell: Callable[[str], None]) -> None:
    """In the child. Raises OSError, VTorqueError."""
    os.ftruncate(target, 0)
    try:
        copy_data(overlay.fd, target, overlay.size, percent("copying the suspended disk", overlay.size, tell))
    except OSError as err:
        raise VTorqueError(f"cannot copy {overlay.shown_as}: {err.strerror}", code=Code.STAGE) from err
    check_overlay(target, overlay.shown_as, virtual_size)


def check_overlay(fd: int, shown_as: str, virtual_size: int) -> None:
    """Refuse what is no overlay of a disk of this size that stands for itself. Raises VTorqueError (VT-STAGE)."""
    with open(fd, "rb", closefd=False) as disk:
        disk.seek(0)
        try:
            size = check_qcow2(disk, shown_as=shown_as, bound=virtual_size)
        except VTorqueError as err:
            raise VTorqueError(err.message, code=Code.STAGE, hint=_HINT) from None
    if size != virtual_size:
        raise VTorqueError(
            f"{shown_as} is a disk of {size} bytes, not of {virtual_size}", code=Code.STAGE, hint=_HINT
        )  # fmt: skip
