"""Whether there is room where guests' disks, records and logs lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.errors import VTorqueError
from vmgr.images.pool import Pool

MIB = 1 << 20
_find = finder("storage")


class Place(NamedTuple):
    """A folder, and what it must have room for: `least` MiB for a first guest, `promised` MiB in all."""

    key: str
    folder: Path
    least: int
    promised: int


class Room(NamedTuple):
    """What a file system has, in MiB, and how many more files may be made; None where it does not count them."""

    total: int
    free: int
    files: Optional[int]
    read_only: bool


def check(node: Node) -> Iterator[Finding]:
    for place in places(node):
        there = nearest(place.folder)
        try:
            room = measure(there)
        except OSError as err:
            yield _find(Level.FAILURE, f"{there} ({place.key}): {err.strerror}", "is its file system mounted?")
            continue
        yield from judge(place, room)


def places(node: Node) -> list[Place]:
    """Where the node writes, with what is needed there."""
    images, paths = node.config.images, node.config.paths
    found = [
        Place("images.overlays", images.overlays, _largest(node), images.overlays_max),
        Place("paths.spool", paths.spool, 64, 64),
        Place("paths.run", paths.run, 4, 4),
    ]
    if images.cache.folder is not None:
        found.append(Place("images.cache.folder", images.cache.folder, 0, images.cache.max))
    if node.config.logging.file is not None:
        rotate = node.config.logging.rotate
        found.append(Place("logging.file", Path(node.config.logging.file).parent, 16, rotate.size * (rotate.keep + 1)))
    return found


def _largest(node: Node) -> int:
    """What an overlay on the default image may grow to, in MiB."""
    default = node.config.policy["img"]["default"]
    try:
        return 0 if default is None else Pool(node.config.pool).get(default).virtual_size // MIB
    except VTorqueError:
        return 0  # the check of images tells


def nearest(folder: Path) -> Path:
    """The folder, or what is there of it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def measure(folder: Path) -> Room:
    """What the file system of a folder has. Raises OSError."""
    info = os.statvfs(folder)
    return Room(
        info.f_blocks * info.f_frsize // MIB,
        info.f_bavail * info.f_frsize // MIB,
        info.f_favail if info.f_files else None,
        bool(info.f_flag & os.ST_RDONLY),
    )


def judge(place: Place, room: Room) -> Iterator[Finding]:
    name, free = f"{place.folder} ({place.key})", f"{room.free} of {room.total} MiB are free"
    if room.read_only:
        yield _find(Level.FAILURE, f"{name} is read-only", "mount it to be written")
    elif room.free < max(place.least, 1):
        yield _find(Level.FAILURE, f"{name}: {free}, and {place.least} MiB are needed", "free or add space")
    elif room.files is not None and room.files < 100:
        yield _find(Level.FAILURE, f"{name}: {room.files} more files can be made", "free inodes")
    elif room.total < place.promised:
        yield _find(
            Level.WARNING, f"{name}: the file system has {room.total} MiB, and {place.promised} MiB are promised",
            "give it a larger one, or promise less",
        )  # fmt: skip
    elif room.free < place.promised:
        what = f"{name}: {free}; {place.promised} MiB are promised, what is used of it included"
        yield _find(Level.NOTE, what, "free space where others use it too, or promise less")
    else:
        yield _find(Level.OK, f"{name}: {free}")
