"""What is stored of suspended jobs, for a node agent: made, read and removed by children with the job's user's rights.

So file systems that squash root will do, quotas count, and users list and remove their own. Everything that is read is
the user's word.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.names import USER, USERS
from vmgr.node import record
from vmgr.node.hookargs import place_name
from vmgr.node.user import User
from vmgr.node.userio import act_now, open_file, read_from
from vmgr.suspended.entry import COMPLETING, SETTLED, STALE, Entry, NodePart, dump_entry, dump_part, parse_entry
from vmgr.suspended.files import JOB, MAX_FOUND_BYTES, Shelf, framed, is_bulk, parts_of, site_folder, unframed

FRAMES_BYTES = 1 << 20
"""What the lengths between the texts of an entry may add to them."""
_USELESS = (None, 0, errno.EINVAL, errno.EFBIG, errno.ENOENT, errno.ENOTDIR, errno.EPERM)
HINT = "`vmgr show suspended` lists what is stored"
LOST = "its node, or node agent, was lost before the job was known to be queued again"


class Store:
    """The store as one user's jobs see it. Each method raises VTorqueError (VT-SUSPEND) that says what is wrong.

    With `place`, an attempt's, what is being written for it is noted in its record before, and removed when the
    attempt is undone.
    """

    def __init__(self, config: Config, user: User, place: Optional[record.Place] = None) -> None:
        folder = site_folder(config)
        if not re.fullmatch(USER, user.name, re.ASCII):
            raise VTorqueError(
                f"a user named {user.name!r} cannot have jobs suspended", code=Code.SUSPEND, hint=f"allowed are {USERS}"
            )
        self._shelf = Shelf(folder, user.name, user.uid)
        self._user = user
        self._place = place
        self._short_s: float = config.timeouts.user_file
        self._long_s: float = config.timeouts.suspend

    async def begin(self, job_id: str, *, need_bytes: int) -> None:
        """Make an empty place for a new entry of the job, where so many bytes are free; an unfinished one goes."""
        self._record(job_id)
        await self._act(lambda: self._shelf.begin(job_id, need_bytes), job_id, self._long_s)

    async def create(self, job_id: str, name: str) -> int:
        """The descriptor (O_RDWR) of a new file of the entry that is being written, such as `0.state` or `0.qcow2`.

        Quotas bind who writes to it: that is to be a child with the user's rights.
        """
        _check_name(name)
        return await open_file(
            self._user, lambda: self._shelf.create(job_id, name), f"{self._path(job_id)}: {name}",
            timeout_s=self._short_s, code=Code.SUSPEND, hint=HINT,
        )  # fmt: skip

    async def write_part(self, job_id: str, part: NodePart) -> None:
        """Add what one node has stored, when its guests' files are on the disk and as long as it says."""
        data = dump_part(part)
        await self._act(lambda: self._shelf.write_part(job_id, part, data), job_id, self._long_s)

    async def complete(self, job_id: str, entry: Entry) -> None:
        """Make what has been written the job's entry, by one rename, when all of it is there and fits."""
        parse_entry(dump_entry(entry), f"{self._path(job_id)}/{JOB}")  # what could not be read again is not written
        await self._act(lambda: self._shelf.complete(job_id, entry), job_id, self._long_s)

    async def drop(self, job_id: str) -> None:
        """Remove what is being written; fine when there is nothing."""
        await self._act(lambda: self._shelf.drop(job_id), job_id, self._long_s)

    async def find(self, job_id: str) -> Optional[tuple[Entry, tuple[NodePart, ...]]]:
        """The job's complete entry and its nodes' parts, which fit it, in the nodes' order; None when there is none."""
        path = self._path(job_id)
        data = await read_from(
            self._user, lambda: framed(self._shelf.find(job_id)), path, limit=MAX_FOUND_BYTES + FRAMES_BYTES,
            timeout_s=self._short_s, code=Code.SUSPEND, hint=HINT,
        )  # fmt: skip
        texts = unframed(data)
        if not texts:
            return None
        entry = parse_entry(texts[0], f"{path}/{JOB}")
        try:
            parts = parts_of(entry, texts[1:])
        except OSError as err:
            raise _useless(path, str(err.strerror)) from None
        if (entry.job_id, entry.user, entry.nodes) != (job_id, self._user.name, len(parts)):
            raise _useless(path, f"it is that of job {entry.job_id} of {entry.user}")
        return entry, parts

    async def open(self, job_id: str, name: str) -> tuple[int, int]:
        """A read-only descriptor of a file of the job's entry, such as `0.state`, and its size in bytes."""
        _check_name(name)
        fd = await open_file(
            self._user, lambda: self._shelf.open(job_id, name), self._path(job_id),
            timeout_s=self._short_s, code=Code.SUSPEND, hint=HINT,
        )  # fmt: skip
        return fd, os.fstat(fd).st_size

    async def claim(self, job_id: str) -> bool:
        """Take the job's entry away, for `remove` to remove it, or the attempt's undoing; whether there was one."""
        path = self._path(job_id)
        said = await read_from(
            self._user, lambda: b"y" if self._shelf.claim(job_id) else b"n", path, limit=1, timeout_s=self._short_s,
            code=Code.SUSPEND, hint=HINT,
        )  # fmt: skip
        if said == b"y":  # not before: where nobody knows how it went, nothing is removed
            self._record(job_id)
        return said == b"y"

    async def note(self, job_id: str, text: str) -> None:
        """Keep a line with the job's entry: why it did not go on from it the last time."""
        await self._act(lambda: self._shelf.note(job_id, text), job_id, self._short_s)

    async def remove(self, job_id: str) -> None:
        """Remove the job's entry, and what is left of others of the job; fine when there is none."""
        await self._act(lambda: self._shelf.remove(job_id), job_id, self._long_s)

    def mark(self, job_id: str, entry: Entry, word: str) -> None:
        """Note in the attempt's record what is to become of the entry with it; the last word counts."""
        self._record(job_id, do="entry", key=entry.key, when=entry.when, word=word)

    def _record(self, job_id: str, **more: object) -> None:
        """Note in the attempt's record what is to be removed with it."""
        if self._place is not None:
            user, shelf = self._user, self._shelf
            step = {
                "do": "suspending", "folder": shelf.folder, "user": user.name, "job": job_id, "uid": user.uid,
                "gid": user.gid, "gids": user.gids,
            }  # fmt: skip
            try:
                record.append(self._place, {**step, **more})
            except OSError as err:
                raise VTorqueError(
                    f"the record of the job cannot be written: {err.strerror}", code=Code.SUSPEND,
                    hint="is the node's disk full?",
                ) from None  # fmt: skip

    def _path(self, job_id: str) -> str:
        return f"{self._shelf.path}/{place_name(job_id)}"

    async def _act(self, work: Callable[[], object], job_id: str, timeout_s: float) -> None:
        """Have it done; when this comes to its end, in whatever way, nothing is being done any more."""

        def doing() -> bytes:
            work()
            return b""

        await read_from(
            self._user, doing, self._path(job_id), limit=0, timeout_s=timeout_s, code=Code.SUSPEND, hint=HINT
        )


def undo_suspending(step: Mapping[str, Any], patience_s: float) -> None:
    """Remove what an attempt was writing, from its record, for as long as that may take. Raises OSError."""
    _undo(step, patience_s, lambda shelf, job_id: shelf.drop(job_id))


def undo_entry(step: Mapping[str, Any], patience_s: float) -> None:
    """Do what the record says of the job's entry, where that is still there, for as long as that may take.

    Raises OSError.
    """

    def work(shelf: Shelf, job_id: str) -> None:
        entry = _entry_there(shelf, job_id)
        if entry is None or (entry.key, entry.when) != (step["key"], step["when"]):
            return
        if step["word"] == STALE:
            shelf.remove(job_id)
        elif step["word"] == COMPLETING:
            with suppress(OSError):  # a full disk of the user's keeps nothing here
                shelf.note(job_id, LOST)

    if step["word"] != SETTLED:
        _undo(step, patience_s, work)


def _entry_there(shelf: Shelf, job_id: str) -> Optional[Entry]:
    """The job's entry, None where there is none that anybody could use. Raises OSError."""
    try:
        texts = shelf.find(job_id)
        return parse_entry(texts[0], JOB) if texts else None
    except VTorqueError:
        return None
    except OSError as err:
        if err.errno in _USELESS:
            return None
        raise


def _undo(step: Mapping[str, Any], patience_s: float, work: Callable[[Shelf, str], object]) -> None:
    shelf = Shelf(str(step["folder"]), str(step["user"]), int(step["uid"]))
    job_id = str(step["job"])
    if patience_s <= 0:
        raise OSError(f"{shelf.path}: no time was left for it")
    gids = tuple(("", int(gid)) for gid in step["gids"])
    user = User(shelf.user, shelf.uid, int(step["gid"]), "", "/", "/bin/sh", gids)

    def doing() -> None:
        work(shelf, job_id)

    act_now(user, doing, shelf.path, timeout_s=patience_s)


def _check_name(name: str) -> None:
    if not is_bulk(name):
        raise VTorqueError(f"{name[:80]!r} is no file of a suspended job", code=Code.SUSPEND)


def _useless(path: str, reason: str) -> VTorqueError:
    return VTorqueError(f"{path} cannot be used: {reason}", code=Code.SUSPEND, hint=HINT)
