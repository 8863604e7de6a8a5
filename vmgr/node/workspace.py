"""A job's own folder on the file system that its nodes share: made by every node, wiped by the mother superior.

Everything is done with the user's rights, in a child that is awaited with a limit: the folder is the user's, and so
may be the one above it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from vmgr.config import Config, Mount, fill
from vmgr.errors import Code
from vmgr.node import record
from vmgr.node.hookargs import place_name
from vmgr.node.user import User
from vmgr.node.userio import act, act_now
from vmgr.node.wiping import wipe


class JobNames(NamedTuple):
    """What stands for the names in the site's paths, for one attempt of a job. `workspace` is None without one."""

    home: str
    user: str
    job: str
    workspace: Optional[str]


def job_names(
    config: Config, mounts: Iterable[Mount], user: User, job_id: str, key: str, *, copies: bool = False
) -> JobNames:
    """The names for the attempt `key` (alike on all nodes) of a job whose guests have these shares.

    A workspace that is wiped belongs to one attempt: its path holds the key, so that wiping what a crashed attempt
    has left, however late, cannot meet the next one. One that stays is found under the job's id, by a requeued job
    too. There is none where no share shows it, and their disks are not copied there (`copies`).
    """
    site, job = config.workspace, place_name(job_id)
    path = None
    if site.folder is not None and (copies or any(mount.needs_workspace for mount in mounts)):
        own = f"{job}.{key}" if site.wipe else job
        path = fill(site.folder, {"home": user.home, "user": user.name, "job": own}).rstrip("/")
    return JobNames(user.home, user.name, job, path)


def left_workspace(config: Config, home: str, user: str, job_id: str, key: str) -> Optional[str]:
    """What is to be wiped when a job that was suspended will not go on: the workspace of its attempt `key`, if any."""
    site = config.workspace
    if site.folder is None or not site.wipe:
        return None
    return fill(site.folder, {"home": home, "user": user, "job": f"{place_name(job_id)}.{key}"}).rstrip("/")


def seen_at(mounts: Iterable[Mount], names: JobNames) -> Optional[str]:
    """Where the job sees its workspace in the guest (`VTORQUE_WORKSPACE`), of the shares that its guests have."""
    return next((mount.target for mount in mounts if names.workspace and mount.source == names.workspace), None)


async def open_workspace(config: Config, place: record.Place, user: User, path: str, *, undone: bool) -> None:
    """Make the workspace `path`, unless another node has, or the job had it before it was suspended.

    On the mother superior it is `undone` later, with the attempt. Raises VTorqueError (VT-STAGE).
    """
    if undone and config.workspace.wipe:
        keep_workspace(place, user, path, kept=False)
    await act(
        user, lambda: _make(path, user.uid), path, timeout_s=config.timeouts.user_file, code=Code.STAGE,
        hint=f"the workspace is made there with the user's rights (workspace.folder, "
        f"{config.origin('workspace.folder')})",
    )  # fmt: skip


def keep_workspace(place: record.Place, user: User, path: str, *, kept: bool) -> None:
    """Note whether the workspace outlives the attempt, whoever undoes it; the last word counts."""
    ids = {"uid": user.uid, "gid": user.gid, "gids": user.gids}
    record.append(place, {"do": "workspace", "path": path, "kept": kept, **ids})


async def wipe_workspace(config: Config, user: User, path: str) -> None:
    """Wipe the workspace at the end of its job. Raises VTorqueError (VT-STAGE); what is left stands in the record."""
    await act(
        user, lambda: wipe(path), path, timeout_s=config.timeouts.wipe, code=Code.STAGE,
        hint="what is left of the workspace is wiped by `vmgr node reap`",
    )  # fmt: skip


def undo_workspace(step: dict[str, Any], patience_s: float) -> None:
    """Wipe a workspace, or the copies of images in one, from the record, for as long as that may take.

    Raises OSError when something is left.
    """
    gids = tuple(("", int(gid)) for gid in step["gids"])
    user = User("", int(step["uid"]), int(step["gid"]), "", "/", "/bin/sh", gids)
    path = str(step["path"])
    act_now(user, lambda: wipe(path), path, timeout_s=patience_s)


def _make(path: str, uid: int) -> None:
    """Make a folder and what is missing above it; in the child. Raises OSError."""
    _make_missing(Path(path))
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode):
        raise OSError(0, "it is there and no folder")
    if info.st_uid != uid:
        raise OSError(0, "it is there and another user's")


def _make_missing(path: Path) -> None:
    try:
        path.mkdir(0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        _make_missing(path.parent)
        path.mkdir(0o700, exist_ok=True)
