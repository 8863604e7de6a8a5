"""Files as the installer looks at them and writes them: whole, beside, flushed to the disk, then renamed.

The names beside begin with a dot: in `mom_priv` a user could have a file run that is called `prologue.…` (`qsub -T`).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

_CHUNK = 1 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Seen(NamedTuple):
    """What lies at a path: `kind` is file, link, folder, other, or an empty text for nothing; links are not followed.

    `digest` is a file's SHA-256 in hexadecimal, or a link's target; `mode` has the permission bits.
    """

    kind: str
    digest: str = ""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    inode: tuple[int, int] = (0, 0)
    mtime_ns: int = 0


NOTHING = Seen("")


def look(path: str) -> Seen:
    """What lies at `path` now. Raises OSError for what cannot be looked at."""
    try:
        info = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return NOTHING
    digest = ""
    if stat.S_ISREG(info.st_mode):
        kind, digest = "file", digest_of(path)
    elif stat.S_ISLNK(info.st_mode):
        kind, digest = "link", os.readlink(path)
    else:
        kind = "folder" if stat.S_ISDIR(info.st_mode) else "other"
    inode = (info.st_dev, info.st_ino)
    return Seen(kind, digest, stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, inode, info.st_mtime_ns)


def digest_of(path: str) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        while data := stream.read(_CHUNK):
            found.update(data)
    return found.hexdigest()


def digest_of_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def beside(path: str) -> str:
    """Where a file is written before it gets its name."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/.vtorque-new.{name}"


def write_file(path: str, data: bytes, mode: int, owner: tuple[int, int] = (0, 0)) -> None:
    """Put a whole file at `path`, in the place of what is there."""
    new = beside(path)
    with suppress(FileNotFoundError):
        os.unlink(new)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as stream:
        stream.write(data)
        stream.flush()
        if os.geteuid() == 0:
            os.fchown(fd, *owner)
        os.fchmod(fd, mode)
        os.fsync(fd)
    os.rename(new, path)
    flush_folder(os.path.dirname(path))


def write_link(path: str, target: str) -> None:
    """Put a symbolic link at `path`, in the place of what is there."""
    new = beside(path)
    with suppress(FileNotFoundError):
        os.unlink(new)
    os.symlink(target, new)
    os.rename(new, path)
    flush_folder(os.path.dirname(path))


def flush_folder(path: str) -> None:
    """Bring the names in a folder to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def names_digest(path: str) -> str:
    """A digest of the names in a folder."""
    return digest_of_bytes(b"\0".join(sorted(os.listdir(os.fsencode(path)))))


def below(folder: str) -> Iterator[str]:
    """All below a folder, each after what is in it; links are not followed."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from below(entry.path)
        yield entry.path


def remove(path: str) -> None:
    """Remove a file or a whole folder, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)


def exchange(first: str, second: str) -> bool:
    """Give two files each other's name in one step (renameat2(2)); false where the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    return bool(call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def free_name(path: str) -> str:
    """`path`, or with the first number behind it under which nothing lies."""
    number, found = 1, path
    while os.path.lexists(found):
        number, found = number + 1, f"{path}.{number}"
    return found
