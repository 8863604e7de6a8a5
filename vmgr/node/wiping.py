"""Emptying a folder of a user's and removing it, whatever is in it. Runs with the user's rights, in a child.

Trees may be deeper than a path is long, hold a hundred thousand files, folders that nobody may enter and names of any
bytes, and processes of the user's may still write into them. So nothing is walked by its path: each folder that is
found is renamed into the top one first, where it is a folder like any other, and emptied from there. Two
descriptors do for any depth. A mount point cannot be renamed, so nothing behind one is ever touched.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import Optional, Union

BATCH = 4096
"""Names that are read before what they name is removed: some file systems lose their place otherwise."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def wipe(path: str) -> None:
    """Remove the folder `path` with all that is in it; fine when it is not there. No link is followed.

    Goes on past what cannot be removed, for as long as anything can, and as long as something new comes. Raises
    OSError naming the first thing that is left.
    """
    parent, _, name = path.rstrip("/").rpartition("/")
    try:
        above = os.open(parent or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        try:
            os.unlink(name, dir_fd=above)  # something else that the user has put in its place
            return
        except FileNotFoundError:
            return
        except OSError:
            pass
        with _opened(above, name) as top:
            if top is None:
                return
            if os.fstat(top).st_dev != os.fstat(above).st_dev:
                raise OSError(errno.EBUSY, "another file system is mounted there", path)
            _Wiper(top).run()
        os.rmdir(name, dir_fd=above)
    finally:
        os.close(above)


class _Wiper:
    """Empties the folder `top`."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._prefix = f".wiping.{os.getpid()}.{os.urandom(8).hex()}."
        self._numbers = count()
        self._progress = 0
        self._problem: Optional[OSError] = None

    def run(self) -> None:
        while True:
            self._progress, self._problem = 0, None
            names = _batch(self._top, skip=0)
            if not names:
                return
            self._all(names)
            # behind names that stay there may be others
            skip = BATCH
            while not self._progress and len(names) == BATCH:
                names = _batch(self._top, skip=skip)
                self._all(names)
                skip += BATCH
            if not self._progress:
                raise self._problem or OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    def _all(self, names: list[bytes]) -> None:
        for name in names:
            try:
                if not self._unlink(self._top, name):
                    self._empty(self._moved(self._top, name))
            except OSError as err:
                self._note(err, name)

    def _note(self, err: OSError, name: bytes) -> None:
        if self._problem is None and err.errno != errno.ENOENT:
            text = f"{os.fsdecode(name)!r} stays: {err.strerror}"
            self._problem = OSError(err.errno, text.encode("utf-8", "replace").decode())

    def _unlink(self, folder: int, name: bytes) -> bool:
        """Remove a name; false when it is a folder with something in it."""
        try:
            os.unlink(name, dir_fd=folder)
        except IsADirectoryError:
            try:
                os.rmdir(name, dir_fd=folder)
            except OSError as err:
                if err.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return False
                raise
        self._progress += 1
        return True

    def _moved(self, folder: int, name: bytes) -> bytes:
        """Move a folder into the top one, under a name of ours; gives the name."""
        if folder == self._top and name.startswith(self._prefix.encode()):
            return name
        with _opened(folder, name):  # one that may not be written cannot be moved either
            new = f"{self._prefix}{next(self._numbers)}".encode()
            os.rename(name, new, src_dir_fd=folder, dst_dir_fd=self._top)
        return new

    def _empty(self, name: bytes) -> None:
        """Empty a folder in the top one and remove it; its own folders end up in the top one."""
        with _opened(self._top, name) as folder:
            if folder is None:
                return
            skip = 0
            while True:
                names = _batch(folder, skip=skip)
                if not names:
                    break
                for inner in names:
                    try:
                        if not self._unlink(folder, inner):
                            self._moved(folder, inner)
                            self._progress += 1
                    except OSError as err:
                        self._note(err, inner)
                        skip += 1
        os.rmdir(name, dir_fd=self._top)
        self._progress += 1


def _batch(folder: int, *, skip: int) -> list[bytes]:
    """Some names in a folder, without the first ones."""
    again = os.open(".", _FOLDER, dir_fd=folder)  # reading begins anew
    try:
        with os.scandir(again) as entries:
            return [os.fsencode(entry.name) for entry in islice(entries, skip, skip + BATCH)]
    finally:
        os.close(again)


@contextmanager
def _opened(above: int, name: Union[str, bytes]) -> Iterator[Optional[int]]:
    """A folder, opened with all of its owner's rights given back first; None when there is none.

    It is held before its mode is changed, so that a link that takes its place is not followed. Raises OSError.
    """
    try:
        held = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    except FileNotFoundError:
        yield None
        return
    try:
        info = os.fstat(held)
        if not stat.S_ISDIR(info.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if info.st_mode & 0o700 != 0o700 and info.st_uid == os.geteuid():
            os.chmod(f"/proc/self/fd/{held}", 0o700)  # noqa: PTH101
        opened = os.open(".", _FOLDER, dir_fd=held)
    finally:
        os.close(held)
    try:
        yield opened
    finally:
        os.close(opened)
