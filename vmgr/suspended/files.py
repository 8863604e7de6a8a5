"""The files of suspended jobs, as one user may touch them: everything here is called with that user's rights.

`<folder>/<user>/<job>/` is a complete entry, `<folder>/<user>/.<job>.new/` one that is being written. The folder is
like /tmp: anybody makes a folder of their own in it. So each is held open once it is known to be the user's alone, and
what lies in it is opened from there; no link is followed below the folder.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import NamedTuple, Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.node.hookargs import place_name
from vmgr.node.userchild import write_all
from vmgr.node.wiping import wipe
from vmgr.suspended.entry import MAX_ENTRY_BYTES, Entry, NodePart, SavedGuest, dump_entry, parse_entry, parse_part

JOB = "job.json"
MAX_JOB_BYTES = 4096
"""So much of a `job.json` is read where many are looked at; ours are far shorter."""
NOTE = "reason"
MAX_NOTE_BYTES = 2048
MAX_LISTED = 10_000
"""So many jobs of one user are looked at."""
MAX_FILES = 1 << 18
MAX_FOUND_BYTES = 64 << 20
"""So long may all that is told of one job be, its memory and disks aside."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
_BULK = r"[0-9]{1,8}\.(?:state|qcow2)"
_NEW_NOTE = f".{NOTE}.new"
_LENGTH = struct.Struct(">I")


def site_folder(config: Config) -> str:
    """The folder of suspended jobs. Raises VTorqueError (VT-SUSPEND) where the site has none."""
    folder = config.suspended.folder
    if folder is None:
        raise VTorqueError(
            "no job can be suspended on this site", code=Code.SUSPEND,
            hint=f"suspended.folder is not set, {config.origin('suspended.folder')}",
        )  # fmt: skip
    return folder.rstrip("/")


class Shelf(NamedTuple):
    """One user's part of the store: `folder` is the site's. What is wrong is said by OSError, in words."""

    folder: str
    user: str
    uid: int

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.user}"

    def begin(self, job_id: str, need_bytes: int) -> None:
        """Make an empty folder for a new entry, where so many bytes are free."""
        with self._own(make=True) as own:
            assert own is not None
            _clear(own, job_id)
            room = os.fstatvfs(own)
            free = room.f_bavail * room.f_frsize
            if free < need_bytes:
                raise OSError(errno.ENOSPC, f"{_mib(need_bytes)} are needed, {_mib(free)} are free")
            os.mkdir(_new(job_id), 0o700, dir_fd=own)

    def create(self, job_id: str, name: str) -> int:
        """A new file of the entry that is being written, open for reading and writing."""
        with self._opened(_new(job_id)) as entry:
            return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=entry)

    def write_part(self, job_id: str, part: NodePart, data: bytes) -> None:
        """Add a node's part, `data`, once the files of its guests are on the disk, as long as it says."""
        with self._opened(_new(job_id)) as entry:
            for guest in part.guests:
                self._look(entry, guest, sync=True)
            _write(entry, _part(part.node), data)

    def complete(self, job_id: str, entry: Entry) -> None:
        """Make what is being written the job's entry, when all of it is there; an older one goes."""
        with self._own() as own, self._opened(_new(job_id)) as new:
            self._check(new, entry, [self._read(new, _part(node)) for node in range(entry.nodes)])
            _write(new, JOB, dump_entry(entry))
            os.fsync(new)
            assert own is not None
            name = place_name(job_id)
            _wipe(own, _old(job_id))
            with suppress(FileNotFoundError):
                os.rename(name, _old(job_id), src_dir_fd=own, dst_dir_fd=own)
            os.rename(_new(job_id), name, src_dir_fd=own, dst_dir_fd=own)
            os.fsync(own)
            with suppress(OSError):  # the new one is there: the next time will do
                _wipe(own, _old(job_id))

    def drop(self, job_id: str) -> None:
        """Remove what is being written, or was when its writer died."""
        with self._own() as own:
            if own is not None:
                _clear(own, job_id)

    def claim(self, job_id: str) -> bool:
        """Take the job's entry away, for `remove` to remove; whether there was one. Of several only one is told so."""
        with self._own() as own:
            if own is None:
                return False
            _wipe(own, _old(job_id))
            try:
                os.rename(place_name(job_id), _old(job_id), src_dir_fd=own, dst_dir_fd=own)
            except FileNotFoundError:
                return False
            try:
                os.fsync(own)
            except OSError:  # it may come back with the power, so it stays
                os.rename(_old(job_id), place_name(job_id), src_dir_fd=own, dst_dir_fd=own)
                raise
            return True

    def remove(self, job_id: str) -> bool:
        """Remove the job's entry, so that nobody finds a half of it, and what is left of others.

        Gives whether there was one.
        """
        was_there = self.claim(job_id)
        with self._own() as own:
            if own is not None:
                _clear(own, job_id)
        return was_there

    def note(self, job_id: str, text: str) -> None:
        """Keep a line with the job's entry: why it did not go on from it the last time."""
        with self._opened(place_name(job_id)) as entry:
            with suppress(FileNotFoundError):
                os.unlink(_NEW_NOTE, dir_fd=entry)
            _write(entry, _NEW_NOTE, text.encode("utf-8", "replace")[:MAX_NOTE_BYTES])
            os.rename(_NEW_NOTE, NOTE, src_dir_fd=entry, dst_dir_fd=entry)

    def find(self, job_id: str) -> list[bytes]:
        """The texts of the job's entry and of its parts, by node, checked; nothing where there is none."""
        with self._own() as own:
            if own is None or not _is_there(own, place_name(job_id)):
                return []
        with self._opened(place_name(job_id)) as found:
            texts = [self._read(found, JOB)]
            entry = _parsed_entry(texts[0])
            for node in range(entry.nodes):
                texts.append(self._read(found, _part(node)))
                if sum(map(len, texts)) > MAX_FOUND_BYTES:
                    raise OSError(errno.EFBIG, f"its description is longer than {MAX_FOUND_BYTES} bytes")
            self._check(found, entry, texts[1:])
            return texts

    def open(self, job_id: str, name: str) -> int:
        """A file of the job's entry, open for reading."""
        with self._opened(place_name(job_id)) as entry:
            fd, _ = self._open(entry, name)
            os.set_blocking(fd, True)
            return fd

    def listed(self) -> list[tuple[str, Optional[str], str, int]]:
        """Every folder of a job, and of one that is incomplete: its name, its `job.json`, what is wrong, its bytes.

        What is wrong with a text that is there is why the job did not go on from it.
        """
        with self._own() as own:
            if own is None:
                return []
            with os.scandir(own) as entries:
                names = [entry.name for entry in islice(entries, MAX_LISTED) if _is_listed(entry.name)]
            return [(name, *self._glance(own, name)) for name in names]

    def _glance(self, own: int, name: str) -> tuple[Optional[str], str, int]:
        try:
            held = os.open(name, _FOLDER, dir_fd=own)
        except OSError as err:
            return None, "no folder" if err.errno == errno.ENOTDIR else err.strerror or "failed", 0
        size = 0
        try:
            with os.scandir(held) as entries:
                size = sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in islice(entries, MAX_FILES))
            text = self._read(held, JOB, MAX_JOB_BYTES).decode("utf-8", "surrogateescape")
            return text, self._noted(held), size
        except OSError as err:
            return None, err.strerror or "failed", size
        finally:
            os.close(held)

    def _noted(self, entry: int) -> str:
        """The line that is kept with an entry, empty where there is none that can be read."""
        try:
            lines = self._read(entry, NOTE, MAX_NOTE_BYTES).decode("utf-8", "replace").splitlines()
        except OSError:
            return ""
        return lines[0] if lines else ""

    @contextmanager
    def _own(self, *, make: bool = False) -> Iterator[Optional[int]]:
        """The user's folder, held; None where there is none of the user's."""
        try:
            top = os.open(self.folder, _FOLDER & ~os.O_NOFOLLOW)
        except FileNotFoundError:
            raise OSError(errno.ENOENT, f"there is no folder {self.folder}; {self._remedy}") from None
        try:
            mode = os.fstat(top).st_mode
            if mode & 0o022 and not mode & stat.S_ISVTX:
                raise OSError(errno.EPERM, f"others may replace what is in {self.folder}; {self._remedy}")
            if make:
                with suppress(FileExistsError):
                    os.mkdir(self.user, 0o700, dir_fd=top)
            own = self._users(top, must=make)
            if own is None and not mode & stat.S_ISVTX:  # what is stored may lie in what is to be mounted there
                raise OSError(
                    errno.EPERM, f"{self.folder} is not 1777: is its file system not mounted? Else {self._remedy}"
                )
        finally:
            os.close(top)
        try:
            yield own
        finally:
            if own is not None:
                os.close(own)

    def _users(self, top: int, *, must: bool) -> Optional[int]:
        try:
            own = os.open(self.user, _FOLDER, dir_fd=top)
        except FileNotFoundError:
            return None
        except OSError as err:
            # one whom it does not belong to has made it before its user could, who so has nothing stored
            info = os.stat(self.user, dir_fd=top, follow_symlinks=False)
            if not must and info.st_uid not in (0, self.uid):
                return None
            reason = "no folder" if err.errno in (errno.ENOTDIR, errno.ELOOP) else err.strerror
            raise OSError(0, f"{self.path}: {reason}") from None
        info = os.fstat(own)
        if info.st_uid == self.uid and not stat.S_IMODE(info.st_mode) & 0o077:
            return own
        os.close(own)
        if info.st_uid == self.uid:
            raise OSError(errno.EPERM, f"{self.path} is open to others; chmod 700 closes it")
        if not must and info.st_uid != 0:
            return None
        raise OSError(errno.EPERM, f"{self.path} belongs to uid {info.st_uid}; the administrator removes it")

    @property
    def _remedy(self) -> str:
        return f"the administrator makes it: install -d -m 1777 {self.folder}"

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """A folder of the user's folder, held."""
        with self._own() as own:
            if own is None:
                raise FileNotFoundError(errno.ENOENT, "nothing is stored there")
            try:
                held = os.open(name, _FOLDER, dir_fd=own)
            except NotADirectoryError:
                raise OSError(errno.ENOTDIR, "no folder") from None
        try:
            yield held
        finally:
            os.close(held)

    def _open(self, entry: int, name: str) -> tuple[int, int]:
        """A regular file of the user's own, open for reading, and its size."""
        try:
            fd = os.open(name, os.O_RDONLY | _FILE, dir_fd=entry)
        except OSError as err:
            texts = {errno.ELOOP: "a symbolic link", errno.ENXIO: "not a regular file"}
            reason = texts.get(err.errno or 0, err.strerror or "failed")
            raise OSError(0, f"{name}: {reason}") from None
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode) and info.st_uid == self.uid:
            return fd, info.st_size
        os.close(fd)
        what = "not owned by the job's user" if stat.S_ISREG(info.st_mode) else "not a regular file"
        raise OSError(errno.EINVAL, f"{name}: {what}")

    def _read(self, entry: int, name: str, most: int = MAX_ENTRY_BYTES) -> bytes:
        fd, _ = self._open(entry, name)
        with os.fdopen(fd, "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise OSError(errno.EFBIG, f"{name} is longer than {most} bytes")
        return data

    def _check(self, folder: int, entry: Entry, texts: Sequence[bytes]) -> None:
        """Refuse parts that are not those of the entry, and files of guests that are not there as they say."""
        for part in parts_of(entry, texts):
            for guest in part.guests:
                self._look(folder, guest, sync=False)

    def _look(self, entry: int, guest: SavedGuest, *, sync: bool) -> None:
        """Refuse files that are not as long as a guest's were when they were written."""
        for name, size in ((f"{guest.rank}.state", guest.state_bytes), (f"{guest.rank}.qcow2", guest.overlay_bytes)):
            if size is None:
                continue
            fd, found = self._open(entry, name)
            try:
                if found != size:
                    raise OSError(errno.EINVAL, f"{name} has {found} bytes, not {size}")
                if sync:
                    os.fsync(fd)
            finally:
                os.close(fd)


def is_bulk(name: str) -> bool:
    """Whether this can be the name of a guest's memory or disk in an entry."""
    return bool(re.fullmatch(_BULK, name, re.ASCII))


def parts_of(entry: Entry, texts: Sequence[bytes]) -> tuple[NodePart, ...]:
    """The parts of an entry, in these texts, by node. Raises OSError for those of another job."""
    parts = []
    for node, text in enumerate(texts):
        try:
            part = parse_part(text, _part(node))
        except VTorqueError as err:
            raise OSError(errno.EINVAL, err.message) from None
        ranks = [guest.rank for guest in part.guests]
        if part.node != node or ranks != list(range(node * entry.per_node, (node + 1) * entry.per_node)):
            raise OSError(errno.EINVAL, f"{_part(node)} is not that of node {node}")
        parts.append(part)
    return tuple(parts)


def framed(texts: Sequence[bytes]) -> bytes:
    """Several texts as one."""
    return b"".join(_LENGTH.pack(len(text)) + text for text in texts)


def unframed(data: bytes) -> list[bytes]:
    """The texts that were framed. Raises ValueError for anything else."""
    texts, at = [], 0
    while at < len(data):
        if len(data) - at < _LENGTH.size:
            raise ValueError("a length is cut off")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > len(data) - at:
            raise ValueError("a text is cut off")
        texts.append(data[at : at + length])
        at += length
    return texts


def _parsed_entry(text: bytes) -> Entry:
    try:
        return parse_entry(text, JOB)
    except VTorqueError as err:
        raise OSError(errno.EINVAL, err.message) from None


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def _is_listed(name: str) -> bool:
    return not name.startswith(".") or name.endswith((".new", ".old"))


def _new(job_id: str) -> str:
    return f".{place_name(job_id)}.new"


def _old(job_id: str) -> str:
    return f".{place_name(job_id)}.old"


def _part(node: int) -> str:
    return f"node.{node}.json"


def _write(folder: int, name: str, data: bytes) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE, 0o600, dir_fd=folder)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def _clear(own: int, job_id: str) -> None:
    for name in (_new(job_id), _old(job_id)):
        _wipe(own, name)


def _wipe(own: int, name: str) -> None:
    wipe(f"/proc/self/fd/{own}/{name}")


def _is_there(own: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=own, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
