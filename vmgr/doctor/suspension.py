"""Whether jobs can be suspended here: the folder in which they are stored, and root's right to requeue them.

Users' programs make and read what lies in the folder, so that file systems that take root for nobody will do.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

from vmgr.config import Config
from vmgr.doctor import batchsystem
from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.doctor.run import run
from vmgr.doctor.shares import LOCAL, file_system_of
from vmgr.errors import Code, VTorqueError
from vmgr.reach import batch
from vmgr.trust import check_trusted

MODE = 0o1777
NOBODY = 65534
_TRY = 'made=$(mktemp -d "$1/.doctor.XXXXXX") && rmdir "$made"'

_find = finder("suspension")


def check(node: Node) -> Iterator[Finding]:
    folder = node.config.suspended.folder
    if folder is None:
        yield _find(Level.OK, "no job can be suspended: suspended.folder is not set")
        return
    inside = next((key for key, place in own_places(node.config).items() if _lies_in(folder, place)), None)
    if inside is not None:
        what = f"suspended.folder: {folder} lies in {inside}, of which each node has its own"
        yield _find(Level.WARNING, what, "take a folder that all nodes share")
        return
    mounts = (node.tree.text("proc/self/mounts") or "").splitlines()
    yield from judge_folder(folder, mounts, alone=node.config.engine == "local")
    if batchsystem.requeues(node):
        yield from judge_requeue(node.config)


def own_places(config: Config) -> dict[str, Path]:
    """What each node has for its own, simulated ones too."""
    found = {"paths.spool": config.paths.spool, "paths.run": config.paths.run}
    found["images.overlays"] = config.images.overlays
    if config.images.cache.folder is not None:
        found["images.cache.folder"] = config.images.cache.folder
    return found


def _lies_in(folder: str, place: Path) -> bool:
    return place in (Path(folder), *Path(folder).parents)


def judge_folder(folder: str, mounts: Sequence[str], *, alone: bool) -> Iterator[Finding]:
    """The folder of the site's; `alone`: there is no other machine that would have to see it."""
    name, remedy = f"suspended.folder: {folder}", f"install -d -o root -g root -m {MODE:o} {folder}"
    try:
        info = os.lstat(folder)
        read_only = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except OSError as err:
        yield _find(Level.WARNING, f"{name}: {err.strerror}", f"mount its file system, or {remedy}")
        return
    mode = stat.S_IMODE(info.st_mode)
    if not stat.S_ISDIR(info.st_mode):
        yield _find(Level.WARNING, f"{name} is no folder", "name the folder itself, not a link to it")
    elif info.st_uid != 0 or mode != MODE:
        what = f"{name} belongs to uid {info.st_uid} and has mode {mode:04o}, not to root with {MODE:o}"
        yield _find(Level.FAILURE, what, f"{remedy}, so that users make what is theirs and take nothing else")
    elif read_only:
        yield _find(Level.WARNING, f"{name} is on a file system that is read-only", "mount it to be written")
    else:
        yield from _judge_use(folder, name, file_system_of(os.path.realpath(folder), mounts), alone)


def _judge_use(folder: str, name: str, kind: Optional[str], alone: bool) -> Iterator[Finding]:
    try:
        check_trusted(Path(folder).parent)
    except VTorqueError as err:
        yield _find(Level.FAILURE, f"{name}: others could put another one in its place: {err.message}", err.hint)
        return
    root = os.geteuid() == 0
    tried = run(["/bin/sh", "-c", _TRY, "sh", folder], uid=NOBODY if root else None, gid=NOBODY if root else None)
    if tried.problem or tried.status:
        yield _find(Level.WARNING, f"{name}: users cannot make folders in it: {tried.reason}", "see the reason")
    elif kind in LOCAL and not alone:
        yield _find(
            Level.WARNING, f"{name} lies on {kind}, which other nodes do not see",
            "a job that starts again on another node is not found there: take a file system that all nodes share",
        )  # fmt: skip
    else:
        yield _find(Level.OK, f"{name} is there ({kind or 'file system not known'}), and users can write in it")


def judge_requeue(config: Config) -> Iterator[Finding]:
    """Whether this node's root may requeue jobs, which ends the suspension of each."""
    try:
        batch.ask(config, "check-requeue")
    except VTorqueError as err:
        said = "may not requeue jobs" if err.code is Code.ACCESS else "may not be able to requeue jobs"
        yield _find(Level.WARNING, f"this node {said}: {err.message}", err.hint or "see the reason")
    else:
        yield _find(Level.OK, "the batch system lets this node's root requeue jobs")
