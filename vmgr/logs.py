"""Logging as an administrator expects it: one log a node, one a job, and the journal where the site wants it.

The node's log is root's alone. What is kept of a job (its log, its guests' consoles, its report) belongs to root too,
and the job's owner may read it, by an entry in the file's access control list: the owner's group may be everybody's.
Where the file system knows no such lists, it stays root's.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import logging.handlers
import os
import struct
import sys
from glob import escape
from pathlib import Path
from typing import Callable, Optional

from vmgr.config import Logging

LOGGER = logging.getLogger("vtorque")
_JOURNAL = Path("/dev/log")
_MIB = 1 << 20
_ACL = "system.posix_acl_access"
_NOBODY = 0xFFFFFFFF
"""The id of entries that have none."""
_OWNER, _NAMED, _GROUP, _MASK, _OTHERS = 0x01, 0x02, 0x04, 0x10, 0x20
_READ, _WRITE = 4, 2
MAX_MESSAGES = 5000
"""So many messages one process logs of a job, beside errors: a job's owner can cause them, by orders for instance."""
MAX_CHARS = 4000
"""So much of each."""
MEMBERS = ".members-"
"""Between a job array's id and its owner's uid: the file that says which jobs its members are."""


def jobs_folder(config: Logging) -> Optional[Path]:
    """Where all is that is kept of jobs, each file named after its job; None where nothing is."""
    return Path(config.file).parent / "jobs" if config.file else None


def _nobody(_: str) -> bool:
    return False


def set_up(
    config: Logging,
    *,
    job: Optional[str] = None,
    reader: Optional[int] = None,
    lives: Callable[[str], bool] = _nobody,
) -> Optional[Path]:
    """Send the messages of this process where the configuration says; gives the job's own log, None without one.

    `reader` is the uid of the job's owner, who may read that log, `lives` says of a job whether it still writes to its
    own. A log that cannot be written is no reason to stop:
    it is said once on standard error.
    """
    LOGGER.setLevel(config.level.upper())
    LOGGER.propagate = False
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
    for bound in list(LOGGER.filters):
        LOGGER.removeFilter(bound)
    if job:
        LOGGER.addFilter(_Bounded())
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
        _make_folder(node.parent, 0o755)
        rotate(node, size=config.rotate.size * _MIB, keep=config.rotate.keep)
        _add(_NodeLog(node), f"%(asctime)s %(levelname)s {label}%(message)s")
        if not job:
            return None
        log = node.parent / "jobs" / f"{job}.log"
        _make_folder(log.parent, 0o711)
        drop_oldest(log.parent, keep=config.rotate.jobs, lives=lives)
        os.close(open_for(log, reader))
        _add(logging.FileHandler(log), "%(asctime)s %(levelname)s %(message)s")
        return log
    except OSError as err:
        print(f"vtorque: cannot log: {err}", file=sys.stderr)
        return None


def _make_folder(folder: Path, mode: int) -> None:
    """Make a folder with exactly this mode, whatever the umask; one that is there stays as the site has it."""
    try:
        folder.mkdir(mode=mode)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_folder(folder.parent, 0o755)
        folder.mkdir(mode=mode, exist_ok=True)
    folder.chmod(mode)


def open_for(path: Path, reader: Optional[int], *, truncate: bool = False) -> int:
    """A file to be written at its end, made where it is not there: root's, to be read by the user `reader` as well.

    Gives its descriptor. One that somebody else may read is not gone on with: job ids can come again, and then it is
    another user's job. Raises OSError.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags | (os.O_TRUNC if truncate else 0), 0o600)
    try:
        if _readers(fd) - {reader}:
            path.unlink()
            os.close(fd)
            fd = os.open(path, flags | os.O_EXCL, 0o600)
        os.fchmod(fd, 0o600)
        if reader is not None:
            let_read(fd, reader)
    except BaseException:
        os.close(fd)
        raise
    return fd


def let_read(fd: int, reader: int) -> None:
    """Let a user read the file `fd`, beside its owner; does nothing where the file system knows no such thing."""
    entries = (
        (_OWNER, _READ | _WRITE, _NOBODY), (_NAMED, _READ, reader), (_GROUP, 0, _NOBODY), (_MASK, _READ, _NOBODY),
        (_OTHERS, 0, _NOBODY),
    )  # fmt: skip
    try:
        os.setxattr(fd, _ACL, struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries))
    except OSError as err:
        if err.errno != errno.ENOTSUP:
            raise


def _readers(fd: int) -> set[Optional[int]]:
    """The users named in the access control list of the file `fd`."""
    try:
        acl = os.getxattr(fd, _ACL)
    except OSError:  # there is none
        return set()
    return {who for tag, _, who in struct.iter_unpack("<HHI", acl[4:]) if tag == _NAMED}


class _Bounded(logging.Filter):
    """Lets errors through, and of other messages the first `MAX_MESSAGES`; the last one says that it is that.

    Long ones are cut.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left = MAX_MESSAGES

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if len(text) > MAX_CHARS:
            record.msg, record.args = f"{text[:MAX_CHARS]}...", ()
        if record.levelno >= logging.ERROR:
            return True
        self._left -= 1
        if self._left == 0:
            record.msg, record.args = "so much is logged of this job that only errors are from now on", ()
        return self._left >= 0


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


def drop_oldest(folder: Path, *, keep: int, lives: Callable[[str], bool] = _nobody) -> None:
    """Remove the oldest logs of jobs, with what is kept beside each, so that with one more `keep` of them stay.

    That of a job that `lives` stays, however long nothing was written to it: its agent would make half of it anew. What
    says which jobs the members of an array are goes when it is older than all that stays.
    """
    logs = sorted((_modified(log), log) for log in folder.glob("*.log"))
    dropped = max(0, len(logs) - max(keep - 1, 0))
    if dropped and logs[dropped:]:
        for path in folder.glob(f"*{MEMBERS}*"):
            if _modified(path) < logs[dropped][0]:
                path.unlink(missing_ok=True)
    for _, log in logs[:dropped]:
        if lives(log.stem):
            continue
        beside = [log.with_suffix(suffix) for suffix in (".console", ".report.json")]
        beside.append(log.with_name(f".{log.stem}.report.json"))  # of an agent that was killed while it wrote
        for path in (log, *beside, *folder.glob(f"{escape(log.stem)}.[0-9]*.console")):
            path.unlink(missing_ok=True)


def _modified(log: Path) -> float:
    try:
        return log.stat().st_mtime
    except FileNotFoundError:  # another agent drops the oldest too
        return 0.0
