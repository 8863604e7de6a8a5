"""A file that is made for who gave an order: with that person's rights, whole or not at all, over no other file.

It is written under a name of its own in the same folder, which the attempt's record has, and gets its name when it is
complete. For the job's owner everything is done by children with the owner's rights. Root's files go into folders that
nobody else can change; nobody else ever has them open for writing.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.logs import LOGGER
from vmgr.node import record
from vmgr.node.staging.overlay import CREATE
from vmgr.node.user import User
from vmgr.node.userio import act, act_now
from vmgr.trust import check_trusted

MAX_PATH = 1024
MAX_UNFINISHED = 16
"""So many partial files an attempt may have at one time: undoing it takes a process of the user's for each."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What link(2) says on file systems that know no second name of a file."""


class CallersFile(NamedTuple):
    """The file `path`, written as `partial` with the rights of `user`, or root's where that is None."""

    path: str
    partial: str
    user: Optional[User]

    # what follows is called with the caller's rights, in a child

    def create(self) -> int:
        """Open the partial file for writing, new (0600). Raises OSError."""
        if os.path.lexists(self.path):
            raise OSError(0, "it is there already")
        return os.open(self.partial, CREATE, 0o600)

    def finish(self, fd: int) -> int:
        """Give the complete file its name and say how many bytes it has. Raises OSError when there is one by now."""
        size = os.fstat(fd).st_size
        os.ftruncate(fd, size)  # what was reserved behind its end is given back
        os.fsync(fd)
        try:
            os.link(self.partial, self.path)
        except FileExistsError:
            raise OSError(0, "it is there already") from None
        except OSError as err:
            if err.errno not in _NO_LINKS:
                raise
            if os.path.lexists(self.path):
                raise OSError(0, "it is there already") from None
            os.rename(self.partial, self.path)
        else:
            self.remove()
        return size

    def remove(self) -> None:
        """Remove the partial file, if it is there; where its owner has made that impossible it is left to the owner."""
        with suppress(FileNotFoundError if self.user is None else OSError):
            Path(self.partial).unlink()


def callers_file(request: Mapping[str, Any], owner: User, *, as_root: bool) -> CallersFile:
    """The file that a request names as `file`. Raises VTorqueError: VT-VALUE, for root also VT-TRUST."""
    path = request.get("file")
    if (
        not isinstance(path, str)
        or not path.isprintable()
        or len(os.fsencode(path)) > MAX_PATH
        or os.path.normpath(path) != path
        or not path.startswith("/")
        or path == "/"
    ):
        raise VTorqueError(
            f"{path!r} is no file that can be written",
            code=Code.VALUE,
            hint=f"the whole path is needed, at most {MAX_PATH} bytes",
        )
    folder = os.path.dirname(path)  # noqa: PTH120
    if as_root:
        check_trusted(folder)
    partial = f"{folder.rstrip('/')}/.vtorque-{secrets.token_hex(8)}.part"
    return CallersFile(path, partial, None if as_root else owner)


def note(place: record.Place, file: CallersFile) -> None:
    """Write to the record that the partial file is about to be made.

    Raises VTorqueError (VT-GUEST) when the record would grow too long, for no order may push other steps out of it, and
    when too many such files are there.
    """
    if len(unfinished(record.steps(place))) >= MAX_UNFINISHED:
        raise VTorqueError(
            f"{MAX_UNFINISHED} files are being made from the guests of this job", code=Code.GUEST, hint="wait for them"
        )
    if place.record.stat().st_size > record.MAX_RECORD_BYTES // 2:
        raise VTorqueError(
            "too much has been saved from the guests of this job already", code=Code.GUEST, hint="submit a new job"
        )
    user = file.user
    ids = {"uid": 0, "gid": 0, "gids": []} if user is None else {"uid": user.uid, "gid": user.gid, "gids": user.gids}
    record.append(place, {"do": "partial", "path": file.partial, **ids})


def working(file: CallersFile, work: Callable[[], Any]) -> Any:
    """In a child: what `work` gives, an OSError turned into one that names the file."""
    try:
        return work()
    except OSError as err:
        raise VTorqueError(f"cannot write {file.path}: {err.strerror}", code=Code.STAGE) from err


def unfinished(steps: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of the steps of a record those of partial files that may be there still, oldest first."""
    partial = [step for step in steps if step.get("do") == "partial"]
    gone = {step["path"] for step in partial if step.get("gone")}
    return [step for step in partial if step["path"] not in gone]


async def discard(place: record.Place, file: CallersFile, *, timeout_s: float) -> None:
    """Remove the partial file, if there is one; where that fails, the undoing of the attempt tries it again."""
    try:
        if file.user is not None:
            await act(file.user, file.remove, file.partial, timeout_s=timeout_s, code=Code.STAGE)
        else:
            file.remove()
        record.append(place, {"do": "partial", "path": file.partial, "gone": True})
    except FileNotFoundError:
        pass  # the attempt has been undone meanwhile
    except (VTorqueError, OSError) as err:
        LOGGER.warning("%s", err)


def undo_partial(step: Mapping[str, Any], patience_s: float) -> None:
    """The same from the record, if there is time left: a hook of the batch system may wait for it. Raises OSError."""
    gids = tuple(("", int(gid)) for gid in step["gids"])
    user = User("", int(step["uid"]), int(step["gid"]), "", "/", "/bin/sh", gids) if step["uid"] else None
    file = CallersFile("", str(step["path"]), user)
    if user is not None and patience_s <= 0:
        raise OSError(f"{file.partial}: no time was left for it")
    if user is not None:
        act_now(user, file.remove, file.partial, timeout_s=patience_s)
    else:
        file.remove()
