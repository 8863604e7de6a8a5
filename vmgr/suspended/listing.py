"""Which jobs are stored as suspended: a user's own, or for root those of all users, each looked at with the user's
rights.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import pwd
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.node.hookargs import place_name
from vmgr.node.user import User, look_up
from vmgr.node.userio import read_from
from vmgr.node.wiping import wipe
from vmgr.node.workspace import left_workspace
from vmgr.suspended.entry import Entry, parse_entry
from vmgr.suspended.files import JOB, Shelf, site_folder

MAX_LISTED_BYTES = 16 << 20
MAX_FOLDERS = 1_000_000
"""So many names in the site's folder are looked at; anybody can make some."""
MAX_NAMES = 16
"""So many names of one owner's are looked up, for those who have several."""
MAX_STRANGE = 100
"""So many of those that are no user's own folder are told of."""
MOST_AT_ONCE = 8
"""So many users' are looked at at one time."""


class Stored(NamedTuple):
    """What is stored of one job: `place` is its folder's name, `bytes` what it takes on the disk.

    `state` is `suspended`, else `incomplete` or `damaged`; then `entry` is None, `reason` says why, and `job_id` is
    what the folder is called. For a suspended job `reason` says why it did not go on the last time, if it was tried.
    """

    user: str
    job_id: str
    place: str
    bytes: int
    state: str
    entry: Optional[Entry]
    reason: str

    def is_of(self, job: str) -> bool:
        """Whether this is the job that a user names so: by its whole id, or by its number alone."""
        return job in (self.job_id, self.job_id.partition(".")[0])


class Listing(NamedTuple):
    """What is stored, by user and job, and why some users' could not be looked at."""

    stored: list[Stored]
    problems: list[VTorqueError]


def stored_jobs(config: Config, user: Optional[str] = None) -> Listing:
    """What is stored: for a user the user's own, for root that of `user` or of all.

    Raises VTorqueError: VT-SUSPEND where the site has no such folder or it cannot be read, VT-ACCESS for a user who
    asks for another's, VT-NODE for one whom nobody knows.
    """
    folder = site_folder(config)
    if not _is_root():
        return Listing(_told(_mine(user), _own(config, user).listed), [])
    if user is not None:
        return asyncio.run(_of(config, [look_up(user)]))
    users, problems = _users(folder)
    found = asyncio.run(_of(config, users))
    return Listing(found.stored, problems + found.problems)


def remove(config: Config, stored: Stored) -> None:
    """Remove what is stored of a job, and the workspace that waited for it: the caller's own, or as root anybody's.

    Raises VTorqueError (VT-SUSPEND).
    """
    path = f"{site_folder(config)}/{stored.user}/{stored.place}"
    user = look_up(stored.user) if _is_root() else None
    if user is None:
        shelf, home = _own(config, stored.user), pwd.getpwuid(os.geteuid()).pw_dir
    else:
        shelf, home = Shelf(site_folder(config), user.name, user.uid), user.home
    entry = stored.entry
    workspace = None if entry is None else left_workspace(config, home, shelf.user, entry.job_id, entry.key)

    def work() -> bytes:
        if entry is None and stored.state == "incomplete":
            shelf.drop(stored.place)  # a complete one beside it is another matter
            return b""
        was_there = shelf.remove(stored.place)
        if was_there and workspace is not None:  # else the job goes on, with its workspace
            try:
                wipe(workspace)
            except OSError as err:
                raise OSError(0, f"it is deleted, but its workspace {workspace} is not: {err.strerror}") from None
        return b""

    if user is None:
        try:
            work()
        except OSError as err:
            raise _unusable(path, err) from None
        return
    asyncio.run(read_from(user, work, path, limit=0, timeout_s=config.timeouts.suspend, code=Code.SUSPEND))


def suspended_uses(config: Config, told: Callable[[VTorqueError], None]) -> list[tuple[str, str]]:
    """The images that suspended jobs need: NAME@REVISION, and in words what needs it. For root.

    Users' folders that cannot be read are told of, and keep nothing. Raises VTorqueError (VT-SUSPEND).
    """
    if config.suspended.folder is None:
        return []
    found = stored_jobs(config)
    for problem in found.problems:
        told(problem)
    return [
        (stored.entry.image, f"the suspended job {stored.job_id} of {stored.user}")
        for stored in found.stored
        if stored.entry is not None
    ]


def _is_root() -> bool:
    return os.geteuid() == 0


def _mine(user: Optional[str]) -> str:
    me = pwd.getpwuid(os.geteuid()).pw_name
    if user not in (None, me):
        raise VTorqueError(f"suspended jobs of {user} are another user's", code=Code.ACCESS, hint="ask root")
    return me


def _own(config: Config, user: Optional[str]) -> Shelf:
    return Shelf(site_folder(config), _mine(user), os.geteuid())


def _users(folder: str) -> tuple[list[User], list[VTorqueError]]:
    """The users who have a folder in the site's, and what there is no user's. Raises VTorqueError (VT-SUSPEND)."""
    users: list[User] = []
    problems: list[VTorqueError] = []
    owned: Counter[int] = Counter()
    try:
        if not Path(folder).stat().st_mode & stat.S_ISVTX:  # what is stored may lie in what is to be mounted there
            raise OSError(errno.EPERM, "it is not 1777")
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number >= MAX_FOLDERS:  # what is left out would be taken for nothing
                    raise OSError(errno.EFBIG, f"it holds more than {MAX_FOLDERS} folders")
                try:
                    info = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # it has gone meanwhile
                owned[info.st_uid] += 1
                user = _known(entry.name) if owned[info.st_uid] <= MAX_NAMES else None
                if user is not None and stat.S_ISDIR(info.st_mode) and info.st_uid == user.uid:
                    users.append(user)
                elif len(problems) < MAX_STRANGE:
                    problems.append(_strange(f"{folder}/{entry.name}", "it is no user's own folder"))
    except OSError as err:
        raise VTorqueError(
            f"{folder} cannot be used: {err.strerror}", code=Code.SUSPEND,
            hint="is its file system mounted here? (suspended.folder)",
        ) from None  # fmt: skip
    return sorted(users), problems


def _known(name: str) -> Optional[User]:
    try:
        return look_up(name)
    except VTorqueError:
        return None


async def _of(config: Config, users: Iterable[User]) -> Listing:
    """What is stored of these users' jobs, each looked at by a child with the user's rights."""
    limit = asyncio.Semaphore(MOST_AT_ONCE)
    folder = site_folder(config)

    async def one(user: User) -> list[Stored]:
        shelf = Shelf(folder, user.name, user.uid)
        async with limit:
            data = await read_from(
                user, lambda: json.dumps(shelf.listed()).encode(), shelf.path, limit=MAX_LISTED_BYTES,
                timeout_s=config.timeouts.user_file, code=Code.SUSPEND,
            )  # fmt: skip
        rows = json.loads(data)
        return _told(user.name, lambda: rows)

    found = await asyncio.gather(*map(one, users), return_exceptions=True)
    listing = Listing([], [])
    for each in found:
        if isinstance(each, VTorqueError):
            listing.problems.append(each)
        elif isinstance(each, BaseException):
            raise each
        else:
            listing.stored.extend(each)
    return listing


def _told(user: str, listed: Callable[[], Iterable[Sequence[Any]]]) -> list[Stored]:
    """What `Shelf.listed` tells of a user's jobs, the newest last. Raises VTorqueError (VT-SUSPEND)."""
    try:
        rows = listed()
    except OSError as err:
        raise _unusable("suspended.folder", err) from None
    found = [_stored(user, *row) for row in rows]
    return sorted(found, key=lambda each: (each.entry.when if each.entry else 0, each.place))


def _stored(user: str, name: str, text: Optional[str], reason: str, size: int) -> Stored:
    """One folder of a user's: what it is called, its `job.json`, what is wrong with it, and its size."""
    if name.startswith("."):
        place = name[1:].rpartition(".")[0]
        why = "it is being written, or its writer died" if name.endswith(".new") else "it was being removed"
        return Stored(user, place, place, size, "incomplete", None, why)
    damaged = Stored(user, name, name, size, "damaged", None, reason)
    if text is None:
        return damaged
    try:
        entry = parse_entry(text.encode("utf-8", "surrogateescape"), JOB)
    except VTorqueError as err:
        return damaged._replace(reason=err.message)
    if entry.user != user or place_name(entry.job_id) != name:
        return damaged._replace(reason=f"it says that it is job {entry.job_id} of {entry.user}")
    return Stored(user, entry.job_id, name, size, "suspended", entry, reason)


def _unusable(path: str, err: OSError) -> VTorqueError:
    return VTorqueError(f"{path} cannot be used: {err.strerror}", code=Code.SUSPEND, hint="root looks after it")


def _strange(path: str, what: str) -> VTorqueError:
    return VTorqueError(f"{path}: {what}", code=Code.SUSPEND, hint="root looks after it")
