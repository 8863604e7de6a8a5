"""What an administrator can set for the embedded batch system: a small JSON file that only root can write."""

from __future__ import annotations

import json
import os
import stat
from typing import NamedTuple

MAX_FILE = 64 << 10


class Settings(NamedTuple):
    """Times in seconds; see docs/local.md."""

    prologalarm_s: float = 300.0
    kill_delay_s: float = 2.0
    keep_completed_s: float = 300.0
    deliver_timeout_s: float = 60.0
    requeue_limit: int = 10
    max_jobs_per_user: int = 1000
    max_script_bytes_per_user: int = 256 << 20


def load(path: str) -> Settings:
    """Read the file: an object with keys of `Settings`, all optional. Raises ValueError, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with open(descriptor, "rb") as file:
        seen = os.fstat(descriptor)
        if not stat.S_ISREG(seen.st_mode) or seen.st_uid != 0 or seen.st_mode & 0o022:
            raise ValueError(f"{path}: must be a file of root's that only root can write")
        found = json.loads(file.read(MAX_FILE))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object")
    known = Settings._field_defaults
    for key, value in found.items():
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}; known are {', '.join(known)}")
        whole = isinstance(known[key], int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value < 0:
            raise ValueError(f"{path}: {key} must be a {'whole ' if whole else ''}number that is not negative")
    return Settings(**found)
