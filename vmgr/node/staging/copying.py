"""Copying an image: shared blocks where the file system can, holes stay holes, and what was written is read back.

Runs in a child of the agent. Raises OSError with the kernel's reason, VTorqueError (VT-STAGE) when what was copied is
not what the pool says it is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from pathlib import Path
from typing import Callable, NamedTuple

from vmgr.errors import Code, VTorqueError
from vmgr.images.holes import data_ranges
from vmgr.images.pool import Image

KEY = r"[0-9a-f]{64}"
"""A SHA-256 as it is written."""
_FICLONE = 0x40049409
"""ioctl_ficlone(2), from <linux/fs.h>; the same number on all machines that QEMU guests run on."""
_CHUNK = 8 << 20
_BLOCK = 1 << 20
_SECONDS = 0.25
_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ETXTBSY}
"""What copy_file_range(2) says where it cannot copy between two files that reading and writing can."""


class Original(NamedTuple):
    """A file of an image in the pool, as its image.yaml describes it."""

    path: Path
    size: int
    sha256: str


def original(image: Image, part: str) -> Original:
    """The file of the part `part` (disk, kernel, initrd). Raises VTorqueError (VT-IMAGE)."""
    path = image.path(part)
    facts = image.files.get(path.name, {})
    size, sha256 = facts.get("size"), facts.get("sha256")
    if not isinstance(size, int) or not isinstance(sha256, str) or not re.fullmatch(KEY, sha256):
        raise VTorqueError(
            f"{image.directory}/image.yaml does not tell size and SHA-256 of {path.name}",
            code=Code.IMAGE,
            hint="build or add the image anew",
        )
    return Original(path, size, sha256)


def copy_image(source: int, target: int, what: Original, tell: Callable[[str], None]) -> bool:
    """Make the empty file `target` a copy of the open `source`, and read it back: it has to be as image.yaml says.

    Gives whether the two share their blocks.
    """
    found = os.fstat(source).st_size
    if found != what.size:
        raise _altered(what, f"{found} bytes, not {what.size}")
    shares = _clone(source, target)
    if not shares:
        copy_data(source, target, what.size, percent("copying", what.size, tell))
    digest = _digest(target, percent("checking", what.size, tell))
    if digest != what.sha256:
        raise _altered(what, f"the SHA-256 {digest[:16]}…, not {what.sha256[:16]}…")
    return shares


def _altered(what: Original, found: str) -> VTorqueError:
    return VTorqueError(
        f"the copy of {what.path} has {found} as its image.yaml says",
        code=Code.STAGE,
        hint="the pool's file is damaged, or the way from there: build or add the image anew",
    )


def _clone(source: int, target: int) -> bool:
    """Whether the file system made `target` share the blocks of `source`. What else is wrong shows when copying."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def copy_data(source: int, target: int, size: int, progress: Callable[[int], None]) -> None:
    """Make the empty file `target` the first `size` bytes of `source`; `progress` gets how many there are by now."""
    os.ftruncate(target, size)
    in_kernel = True
    for start, end in data_ranges(source, size):
        at = start
        while at < end:
            done = _copy_range(source, target, at, min(_CHUNK, end - at)) if in_kernel else 0
            in_kernel = done > 0
            at += done or _copy_block(source, target, at, min(_BLOCK, end - at))
            progress(at)


def _copy_range(source: int, target: int, at: int, count: int) -> int:
    """Bytes that the kernel, or the file server, has copied by itself; 0 where it cannot."""
    try:
        return os.copy_file_range(source, target, count, at, at)
    except OSError as err:
        if err.errno in _NOT_HERE:
            return 0
        raise


def _copy_block(source: int, target: int, at: int, count: int) -> int:
    block = os.pread(source, count, at)
    if not block:
        raise OSError(errno.EIO, "the file ends early")
    return os.pwrite(target, block, at)


def _digest(fd: int, progress: Callable[[int], None]) -> str:
    """The SHA-256 of a file, read from where it lies: what of it is only in the page cache is written and dropped."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    digest, block, at = hashlib.sha256(), bytearray(_BLOCK), 0
    while count := os.preadv(fd, [block], at):
        digest.update(memoryview(block)[:count])
        at += count
        progress(at)
    return digest.hexdigest()


def percent(verb: str, size: int, tell: Callable[[str], None]) -> Callable[[int], None]:
    """What tells how far something has come, now and then."""
    following = 0.0

    def progress(done: int) -> None:
        nonlocal following
        if time.monotonic() >= following:
            following = time.monotonic() + _SECONDS
            tell(f"{verb} {100 * done // size} %")

    return progress
