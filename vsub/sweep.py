"""Takes away the job directories of jobs that ended without their wrapper, which would have done it.

Such a job was deleted while it was queued, or its wrapper was killed, or the `vsub --wait` that was to read its
result was interrupted. Later submissions look after what it left: a few directories at a time, as the user, and
never at the expense of the submission, which is over by then. So they do with what is stored of suspended jobs.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Sequence
from typing import NamedTuple, Optional

from vmgr.config import Config
from vsub.engines import Engine
from vsub.jobdir import JOB_ID, remove_tree
from vsub.report import debug

ASK_AFTER_S = 24 * 3600
"""Age of a directory that is looked at. Most jobs have taken theirs away by then, so that there is nobody to ask
about; and no clock of a file server is wrong by a day."""
NAMELESS_S = 7 * ASK_AFTER_S
"""Age at which a directory without a job's id goes: its submission was cut off, or the file could not be written."""
LOOK_AT = 64
"""Entries of ~/.vtorque that one submission looks at, the next one at others."""
A_FEW = 3
"""Directories that one submission settles: asking the batch system takes its time, and costs it something too."""
AT_MOST_S = 2.0
"""Time that the batch system gets for all answers."""

_RUID = r"[0-9a-z]{8,32}"
_ID = r"[A-Za-z0-9][A-Za-z0-9._\[\]-]{0,255}"


class Old(NamedTuple):
    """A directory that was not changed for `age_s` seconds."""

    age_s: float
    path: str


def sweep(directory: str, engine: Engine, config: Config) -> None:
    """Settle a few old siblings of the `directory` of a job that was just submitted, and entries of suspended jobs.

    Nothing comes of a failure.

    Ctrl-C ends it, not the submission.
    """
    try:
        _sweep(directory.rsplit("/", 1)[0], engine, config)
    except (Exception, KeyboardInterrupt) as err:  # whatever it is: the job has been submitted
        debug(f"sweep: {type(err).__name__}: {err}")


def _sweep(new: str, engine: Engine, config: Config) -> None:
    base = new.rsplit("/", 1)[0]
    candidates = old_directories(base)
    if not candidates and config.suspended.folder is None:
        return
    new_id = read_job_id(new)
    if new_id is None:
        return
    batch = _Batch(engine, new_id)
    _sweep_directories(candidates, batch)
    if config.suspended.folder is not None:
        from vsub.sweepstored import sweep_stored  # few sites store jobs

        sweep_stored(config, lambda job_id: batch.is_its_own(job_id) and batch.has_time() and batch.is_gone(job_id))


def _sweep_directories(candidates: Sequence[Old], batch: _Batch) -> None:
    settled = 0
    for old in candidates:
        job_id = read_job_id(old.path)
        if job_id is None:
            gone = old.age_s > NAMELESS_S
            if not gone:
                continue
        elif not batch.is_its_own(job_id) or not batch.has_time():
            continue
        else:
            gone = batch.is_over(job_id)
        debug(f"sweep: {old.path} of {job_id or 'no job'} {'goes' if gone else 'stays'}")
        if gone:
            remove_tree(old.path)
        else:
            os.utime(old.path, follow_symlinks=False)  # its turn comes again in a day, the others' now
        settled += 1
        if settled == A_FEW:
            return


class _Batch:
    """What the batch system says of older jobs, in bounded time, and how far that can be believed."""

    def __init__(self, engine: Engine, new_id: str) -> None:
        self._engine = engine
        self._new_id = new_id
        self._deadline = time.monotonic() + AT_MOST_S
        self._knows_new: Optional[bool] = None

    def is_its_own(self, job_id: str) -> bool:
        """Whether the job is one of the server that took the new one: homes are shared between clusters."""
        return job_id.partition(".")[2] == self._new_id.partition(".")[2]

    def has_time(self) -> bool:
        return time.monotonic() < self._deadline

    def _state(self, job_id: str) -> str:
        return self._engine.state(job_id, max(0.1, self._deadline - time.monotonic())).phase

    def is_over(self, job_id: str) -> bool:
        """Whether the job has ended. That it is not known counts only where the new job is."""
        phase = self._state(job_id)
        return self._knows() if phase == "gone" else phase == "completed"

    def is_gone(self, job_id: str) -> bool:
        """Whether the job is not known any more, so that it can never start again."""
        return self._state(job_id) == "gone" and self._knows()

    def _knows(self) -> bool:
        if self._knows_new is None:
            self._knows_new = self._state(self._new_id) not in ("gone", "unknown")
        return self._knows_new


def old_directories(base: str) -> list[Old]:
    """Directories of earlier submissions that are old enough, the oldest first. Links are none."""
    with os.scandir(base) as entries:
        found = [entry for entry in entries if re.fullmatch(_RUID, entry.name)]
    if len(found) > LOOK_AT:
        first = int.from_bytes(os.urandom(4), "big") % len(found)
        found = (found[first:] + found[:first])[:LOOK_AT]
    now, old = time.time(), []
    for entry in found:
        try:
            info = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        age_s = now - info.st_mtime
        if stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and age_s > ASK_AFTER_S:
            old.append(Old(age_s, entry.path))
    return sorted(old, reverse=True)


def read_job_id(path: str) -> Optional[str]:
    """The id of the job whose directory this is; None when nobody noted one."""
    try:
        file = os.open(f"{path}/{JOB_ID}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return None
        text = os.read(file, 512).decode("ascii", "replace").strip()
    finally:
        os.close(file)
    return text if re.fullmatch(_ID, text) else None
