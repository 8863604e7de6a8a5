"""A node's cache of the pool's images, for pools that lie on a slow file system.

    <images.cache.folder>/<sha256>        a file of an image, verified; its time of change is that of its last use
    <images.cache.folder>/.<sha256>.tmp   one that is being copied, of its full length from the start

Whoever finds a file missing copies it, under a lock of the file's own on which the others wait; the lock ends with its
holder, so a temporary file that is found under it was left by one that died. What is in use is named in the record of
an attempt on this node, and stays. Which files go for another, and which one is taken, is decided under one lock. When
there is no room the pool is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from vmgr.config import Config
from vmgr.errors import VTorqueError
from vmgr.logs import LOGGER
from vmgr.node import record
from vmgr.node.staging.child import Channel, in_child
from vmgr.node.staging.copying import KEY, Original, copy_image, original
from vmgr.node.staging.model import StageRequest
from vmgr.node.staging.overlay import CREATE, MIB
from vmgr.trust import check_trusted

_LOCK = "cache"
MAX_NAMED = 64
"""Evicted files that are named in the log: more would not go through the channel."""
NOT_THERE = "is not there"
_MODES = {"disk": 0o400, "kernel": 0o444, "initrd": 0o444}
"""QEMU, which is the user's, opens kernel and initial RAM disk by their paths; the disk it gets as a descriptor."""


class Entry(NamedTuple):
    """A file of an image, and where it lies in the cache once it is there."""

    folder: Path
    original: Original
    mode: int

    @property
    def path(self) -> Path:
        return self.folder / self.original.sha256

    @property
    def temporary(self) -> Path:
        return self.folder / f".{self.original.sha256}.tmp"

    @property
    def lock(self) -> str:
        return lock_name(self.original.sha256)


class Held(NamedTuple):
    """What lies in the cache: name, bytes, and when it was used last, in nanoseconds."""

    name: str
    size: int
    used_ns: int


def lock_name(sha256: str) -> str:
    """The node's lock under which a file is copied into the cache."""
    return f"{_LOCK}-{sha256[:32]}"


async def nearest(request: StageRequest, part: str) -> Path:
    """Where the image's `part` (disk, kernel, initrd) is best read: in the node's cache, filled first, or in the pool.

    What it names in the cache stays as long as the attempt. Raises VTorqueError (VT-STAGE) when what comes from the
    pool is not what its image.yaml says; VT-TRUST when others than root could write the cache.
    """
    config, image = request.config, request.image
    source = image.path(part)
    if config.images.cache.folder is None:
        return source
    entry = Entry(config.images.cache.folder, original(image, part), _MODES[part])
    try:
        record.make_folder(entry.folder, 0o711)
        check_trusted(entry.folder)
        record.append(request.place, {"do": "cached", "path": str(entry.path)})
        missing = take(config, entry)
        if missing is None:
            return entry.path
        if missing != NOT_THERE:
            LOGGER.warning("%s %s: it is copied again", entry.path, missing)
        reason = await _fill(request, entry) or take(config, entry)
        if reason is None:
            return entry.path
    except OSError as err:
        reason = f"{err.filename or entry.folder}: {err.strerror}"
    LOGGER.warning("%s is not copied into the node's cache, and read in the pool: %s", source, reason)
    return source


def take(config: Config, entry: Entry) -> Optional[str]:
    """Count the entry as used now. Gives what is wrong with it, None when it is there, whole.

    One of the wrong length is removed. Raises OSError.
    """
    with record.node_lock(config.paths, _LOCK):
        try:
            size = entry.path.lstat().st_size
        except FileNotFoundError:
            return NOT_THERE
        if size != entry.original.size:
            entry.path.unlink()
            return f"has {size} bytes, not {entry.original.size}"
        os.utime(entry.path, follow_symlinks=False)
        return None


async def _fill(request: StageRequest, entry: Entry) -> Optional[str]:
    """Have the entry copied from the pool, by us or by another job. Gives why that cannot be, None when it is there."""
    source = os.open(entry.original.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        lock = request.config.paths.run / f"{entry.lock}.lock"
        record.append(request.place, {"do": "filling", "path": str(entry.temporary), "lock": str(lock)})
        outcome = await in_child(
            request.place,
            None,
            lambda channel: fill(channel, request.config, entry, source),
            keep=[source],
            tell=request.tell,
            silence_s=request.config.timeouts.boot,
        )
    finally:
        os.close(source)
    reason, going = outcome.result
    for name in going:
        LOGGER.info("not used for longest, and gone from the node's cache of images: %s", name)
    return None if reason is None else str(reason)


def fill(channel: Channel, config: Config, entry: Entry, source: int) -> tuple[Optional[str], list[str]]:
    """In the child: copy the entry unless it is there by now.

    Gives why it cannot be, None when it is there, and the names of the files that went for it. Nothing is logged here:
    the log is not open in the child.
    """
    channel.wait("waiting for the image cache")
    going: list[str] = []
    with record.node_lock(config.paths, entry.lock):
        if take(config, entry) is None:
            return None, going
        channel.tell("copying the image into the node's cache")
        entry.temporary.unlink(missing_ok=True)
        try:
            target, going = _make_room(config, entry)
            if target is None:
                most = config.images.cache.max
                return (
                    f"there is no room: images.cache.max is {most} MiB, what is in use stays, or the disk is full",
                    going,
                )
            copy_image(source, target, entry.original, channel.tell)
            os.fchmod(target, entry.mode)
            os.close(target)
            entry.temporary.rename(entry.path)
        except OSError as err:
            entry.temporary.unlink(missing_ok=True)
            return f"{entry.folder}: {err.strerror}", going
        except VTorqueError:
            entry.temporary.unlink(missing_ok=True)
            raise
    return None, going


def _make_room(config: Config, entry: Entry) -> tuple[Optional[int], list[str]]:
    """The temporary file, of its full length, which is what it is counted with, and the names of what went for it.

    None when it cannot have the room.
    """
    with record.node_lock(config.paths, _LOCK):
        _remove_dead(config, entry.folder)
        held = _held(entry.folder)
        taken = sum(each.size for each in held)
        info = os.statvfs(entry.folder)
        bound = min(config.images.cache.max * MIB, taken + info.f_bavail * info.f_frsize)
        going = choose_evicted(held, entry.original.size, bound, _in_use(config, entry.folder))
        if going is None:
            return None, []
        for name in going:
            (entry.folder / name).unlink(missing_ok=True)
        del going[MAX_NAMED:]
        target = os.open(entry.temporary, CREATE, 0o600)
        os.ftruncate(target, entry.original.size)
        return target, going


def choose_evicted(held: Sequence[Held], needed: int, bound: int, in_use: Collection[str]) -> Optional[list[str]]:
    """Which files go so that `needed` more bytes stay within `bound`: those not used for longest, none that is in use.

    None when that is not enough; then none goes.
    """
    excess, going = sum(each.size for each in held) + needed - bound, []
    for each in sorted(held, key=lambda each: each.used_ns):
        if excess <= 0:
            break
        if re.fullmatch(KEY, each.name) and each.name not in in_use:
            excess -= each.size
            going.append(each.name)
    return going if excess <= 0 else None


def _held(folder: Path) -> list[Held]:
    found = []
    for path in folder.iterdir():
        if re.fullmatch(rf"{KEY}|\.{KEY}\.tmp", path.name):
            info = path.lstat()
            found.append(Held(path.name, info.st_size, info.st_mtime_ns))
    return found


def _in_use(config: Config, folder: Path) -> set[str]:
    """The names of the files that living attempts on this node use, or are about to."""
    paths = [
        Path(str(step["path"]))
        for place in record.places(config.paths)
        if record.is_held(place)
        for step in record.steps(place)
        if step.get("do") == "cached"
    ]
    return {path.name for path in paths if path.parent == folder}


def _remove_dead(config: Config, folder: Path) -> None:
    """Remove the temporary files of those that died."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(rf"\.{KEY}\.tmp", path.name):
            name = lock_name(path.name[1:65])
            remove_unfinished({"path": str(path), "lock": str(config.paths.run / f"{name}.lock")})


def remove_unfinished(step: dict[str, Any]) -> None:
    """Remove the temporary file that a recorded step `filling` names, unless another is at it; idempotent.

    Raises OSError; KeyError for a step that is none.
    """
    path, lock = Path(str(step["path"])), Path(str(step["lock"]))
    if not os.path.lexists(path):
        return
    record.make_folder(lock.parent, 0o755)
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    finally:
        os.close(fd)
