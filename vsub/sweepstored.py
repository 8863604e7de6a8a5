"""Removes what is stored of the user's suspended jobs that are gone: deleted while they waited, most of all.

Only its own job goes on from an entry, so that one is of no use any more. It is the same look as that at old job
directories (`vsub.sweep`): at a few a submission, once a day at each, as the user.
"""

from __future__ import annotations

import os
import pwd
import time
from contextlib import suppress
from typing import Callable

from vmgr.config import Config
from vsub.report import debug

ASK_AFTER_S = 24 * 3600
"""Age of an entry that is looked at, since it was made, or looked at the last time."""
A_FEW = 3
LOOK_AT = 1000


def sweep_stored(config: Config, is_gone: Callable[[str], bool]) -> None:
    """Settle a few old entries. `is_gone` says of a job's id whether the batch system surely does not know it any more.

    Raises VTorqueError where they cannot be looked at, or one cannot be removed.
    """
    folder = f"{config.suspended.folder}/{pwd.getpwuid(os.geteuid()).pw_name}"
    old = _old(folder)
    if not old:
        return
    from vmgr.suspended.listing import remove, stored_jobs  # asyncio and more, and most users have nothing there

    entries = {stored.place: stored for stored in stored_jobs(config).stored if stored.entry is not None}
    for stored in [entries[place] for place in old if place in entries][:A_FEW]:
        gone = is_gone(stored.job_id)
        debug(f"sweep: what is stored of {stored.job_id} {'goes' if gone else 'stays'}")
        if gone:
            remove(config, stored)
        else:
            os.utime(f"{folder}/{stored.place}", follow_symlinks=False)  # its turn comes again in a day


def _old(folder: str) -> list[str]:
    """The names of the entries in the user's folder that were not changed for long, the oldest first."""
    found = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry, _ in zip(entries, range(LOOK_AT)):
            with suppress(OSError):
                found.append((entry.stat(follow_symlinks=False).st_mtime, entry.name))
    latest = time.time() - ASK_AFTER_S
    return [name for changed, name in sorted(found) if changed < latest and not name.startswith(".")]
