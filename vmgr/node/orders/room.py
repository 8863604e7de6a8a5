"""Room on a disk, had before it is needed: what a guest writes must not fail because a copy of its disk has none."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.node import record
from vmgr.node.staging.overlay import MIB, reserved, write_overlay

_libc = ctypes.CDLL(None, use_errno=True)
_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE of fallocate(2), from <linux/falloc.h>."""
_TABLES = 4096
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def most_bytes(virtual_size: int) -> int:
    """What a qcow2 file may take whose disk of `virtual_size` bytes is full."""
    return virtual_size + virtual_size // _TABLES + 4 * MIB


def have_room(fd: int, size: int) -> None:
    """Have the file system set `size` bytes aside for an open file, whose length stays. Raises OSError (ENOSPC).

    Where it cannot do that, it has at least to say that it has as much.
    """
    if _libc.fallocate(fd, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return
    number = ctypes.get_errno()
    if number in _CANNOT:
        info = os.fstatvfs(fd)
        number = 0 if info.f_bavail * info.f_frsize >= size else errno.ENOSPC
    if number:
        raise OSError(number, f"{os.strerror(number)} ({-(-size // MIB)} MiB are needed)")


@contextmanager
def unnamed_disk(config: Config, place: record.Place, name: str, empty: bytes, size: int) -> Iterator[int]:
    """An open file of root's with the content `empty`, in the node's folder for overlays, which may grow to `size`.

    It has no name, so it is gone with its last descriptor, whatever dies first. It counts as an overlay does as long
    as it is used; then it is emptied, because QEMU keeps the descriptors of a paused guest, and its user may have taken
    one out of it. Raises VTorqueError (VT-STAGE).
    """
    path = config.images.overlays / f"{place.folder.parent.name}.{place.attempt}.{name}.copy"
    step = {"do": "overlay", "path": str(path)}
    record.make_folder(config.images.overlays, 0o700)
    with record.node_lock(config.paths, "overlays"):
        taken, bound = reserved(config, "overlay"), config.images.overlays_max * MIB
        if taken + size > bound:
            raise VTorqueError(
                f"a copy of the disk, up to {size // MIB} MiB, does not fit: "
                f"{taken // MIB} of {bound // MIB} MiB are given away",
                code=Code.STAGE,
                hint=f"images.overlays_max, {config.origin('images.overlays_max')}",
            )
        record.append(place, {**step, "reserved": size})
    try:
        try:
            fd = write_overlay(os.fspath(path), empty)
            path.unlink()
        except OSError as err:
            raise _no_copy(path.parent, err) from err
        try:
            try:
                have_room(fd, size)
            except OSError as err:
                raise _no_copy(path.parent, err) from err
            yield fd
        finally:
            os.ftruncate(fd, 0)
            os.close(fd)
    finally:
        record.append(place, {**step, "reserved": -size})


def _no_copy(folder: object, err: OSError) -> VTorqueError:
    return VTorqueError(f"no copy of the disk can be made in {folder}: {err.strerror}", code=Code.STAGE)
