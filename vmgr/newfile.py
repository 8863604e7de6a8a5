"""A file that appears whole, under a name that it has only when it is complete; of a process that is killed nothing is
left where the file system has files without names."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from vmgr.signals import undisturbed


@contextlib.contextmanager
def new_file(file: Path, mode: int, *, replace: bool = False) -> Iterator[int]:
    """An open file for reading and writing, which becomes `file`, with `mode` less the umask, when the block ends well.

    Raises OSError; FileExistsError at the end when there is such a file and `replace` is false.
    """
    target, name = -1, None
    try:
        with undisturbed():  # an exception of a signal's would lose what has just been made
            target, name = _open(file)
        yield target
        os.fchmod(target, mode & ~_umask())
        os.fsync(target)
        with undisturbed():  # or leave it under another name
            _appear(target, name, file, replace)
    finally:
        if target >= 0:
            os.close(target)
        if name is not None:
            name.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _open(file: Path) -> tuple[int, Optional[Path]]:
    """An open file without a name; where there are none, as over NFS, with a hidden one."""
    try:
        return os.open(file.parent, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600), None
    except OSError as err:
        if err.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    name = _hidden(file)
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), name


def _hidden(file: Path) -> Path:
    return file.with_name(f".{file.name}.{secrets.token_hex(4)}")


def _appear(target: int, name: Optional[Path], file: Path, replace: bool) -> None:
    """Give an open file, which has the hidden name `name` or none, its name; one that is there goes by `replace`."""
    there = file if name is None and not replace else name or _hidden(file)
    if name is None:
        folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(str(target), there, src_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)
    if there == file:
        return
    try:
        if replace:
            there.rename(file)
        else:
            os.link(there, file)
    except OSError:
        there.unlink(missing_ok=True)
        raise
