"""Logging as an administrator expects it: one log a node, one a job, and the journal where the site wants it."""

from __future__ import annotations

import fcntl
import logging
import logging.handlers
import sys
from glob import escape
from pathlib import Path
from typing import Optional

from vmgr.config import Logging

LOGGER = logging.getLogger("vtorque")
_JOURNAL = Path("/dev/log")
_MIB = 1 << 20


def set_up(config: Logging, *, job: Optional[str] = None) -> Optional[Path]:
    """Send the messages of this process where the configuration says; gives the job's own log, None without one.

    A log that cannot be written is no reason to stop: it is said once on standard error.
    """
    LOGGER.setLevel(config.level.upper())
    LOGGER.propagate = False
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
    label = f"job {job}: " if job else ""
    try:
        if config.journal:
            _JOURNAL.stat()  # newer Pythons find out at the first message only
            _add(logging.handlers.SysLogHandler(str(_JOURNAL)), f"vtorque[%(process)d]: {label}%(message)s")
    except OSError as err:
        print(f"vtorque: cannot log to {_JOURNAL}: {err.strerror}", file=sys.stderr)
    if not config.file:
        return None
    try:
        node = Path(config.file)
        node.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        rotate(node, size=config.rotate.size * _MIB, keep=config.rotate.keep)
        _add(_NodeLog(node), f"%(asctime)s %(levelname)s {label}%(message)s")
        if not job:
            return None
        log = node.parent / "jobs" / f"{job}.log"
        log.parent.mkdir(mode=0o755, exist_ok=True)
        drop_oldest(log.parent, keep=config.rotate.jobs)
        _add(logging.FileHandler(log), "%(asctime)s %(levelname)s %(message)s")
        return log
    except OSError as err:
        print(f"vtorque: cannot log: {err}", file=sys.stderr)
        return None


class _NodeLog(logging.handlers.WatchedFileHandler):
    """Notices that its file was rotated; one that cannot be opened again stops nobody."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)


def _add(handler: logging.Handler, form: str) -> None:
    handler.setFormatter(logging.Formatter(form))
    LOGGER.addHandler(handler)


def rotate(log: Path, *, size: int, keep: int) -> None:
    """Rename `log` to `log.1`, that to `log.2` and so on, when it is larger than `size` bytes; `keep` of them stay.

    Writers that have it open notice by themselves (WatchedFileHandler). One process at a time does this.
    """
    try:
        if log.stat().st_size <= size:
            return
    except FileNotFoundError:
        return
    with log.with_name(f".{log.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists() or log.stat().st_size <= size:
            return
        if not keep:
            log.unlink()
            return
        for number in range(keep - 1, 0, -1):
            older = log.with_name(f"{log.name}.{number}")
            if older.exists():
                older.replace(log.with_name(f"{log.name}.{number + 1}"))
        log.replace(log.with_name(f"{log.name}.1"))


def drop_oldest(folder: Path, *, keep: int) -> None:
    """Remove the oldest logs of jobs, with the console beside each, so that with one more `keep` of them stay."""
    logs = sorted((_modified(log), log) for log in folder.glob("*.log"))
    for _, log in logs[: max(0, len(logs) - max(keep - 1, 0))]:
        for path in (log, log.with_suffix(".console"), *folder.glob(f"{escape(log.stem)}.[0-9]*.console")):
            path.unlink(missing_ok=True)


def _modified(log: Path) -> float:
    try:
        return log.stat().st_mtime
    except FileNotFoundError:  # another agent drops the oldest too
        return 0.0
