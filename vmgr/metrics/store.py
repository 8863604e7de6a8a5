"""What has happened on this node, kept beyond the agents that saw it: a journal, folded into totals.

    <paths.spool>/metrics/journal    one event a line; the first line is the journal's own id
    <paths.spool>/metrics/folding    a journal that is being folded, to which nobody appends any more
    <paths.spool>/metrics/totals     their sum, and the id of the journal that was folded into it last
    <paths.spool>/metrics/lock       held by whoever writes any of them

An agent only appends a line. Whoever reads folds the journal, and so does a writer that finds it large, so both stay
small. What a fold that died has left is folded by the next one, and by the id it is seen whether the totals have it:
no event counts twice, and none is lost. All of it belongs to root.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from vmgr.config import Paths
from vmgr.logs import LOGGER
from vmgr.node import record

if TYPE_CHECKING:
    from vmgr.metrics.totals import Totals

MAX_JOURNAL_BYTES = 256 << 10
MAX_TOTALS_BYTES = 1 << 20
MAX_EVENT_BYTES = 1024


def folder(paths: Paths) -> Path:
    return paths.spool / "metrics"


def note(paths: Paths, event: dict[str, Any]) -> None:
    """Write an event down. One that cannot be written is lost, and logged: nothing fails for want of a count."""
    line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
    try:
        if len(line) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of {len(line)} bytes")
        with _locked(paths):
            _append(folder(paths) / "journal", line)
            if (folder(paths) / "journal").stat().st_size > MAX_JOURNAL_BYTES:
                _fold(folder(paths))
    except (OSError, ValueError) as err:
        LOGGER.warning("not counted: %s", err)


def read(paths: Paths) -> Totals:
    """The totals up to now. Raises OSError when they cannot be read or written."""
    with _locked(paths):
        return _fold(folder(paths))


@contextmanager
def _locked(paths: Paths) -> Iterator[None]:
    record.make_folder(paths.spool, 0o755)
    record.make_folder(folder(paths), 0o700)
    lock = os.open(folder(paths) / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _append(journal: Path, line: bytes) -> None:
    fd = os.open(journal, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        size = os.fstat(fd).st_size
        if not size:
            line = os.urandom(16).hex().encode() + b"\n" + line
        elif os.pread(fd, 1, size - 1) != b"\n":  # a writer died, or the disk was full
            line = b"\n" + line
        os.write(fd, line)
    finally:
        os.close(fd)


def _fold(at: Path) -> Totals:
    """The totals with the journal in them, which is gone then. The caller holds the lock."""
    totals = _fold_in(at, _read_totals(at / "totals"))
    try:
        (at / "journal").rename(at / "folding")
    except FileNotFoundError:
        return totals
    return _fold_in(at, totals)


def _fold_in(at: Path, totals: Totals) -> Totals:
    """The totals with the journal that is being folded in them; fine when there is none."""
    from vmgr.metrics.totals import fold  # most writers do without

    journal = _read_file(at / "folding", MAX_JOURNAL_BYTES + MAX_EVENT_BYTES)
    if journal is None:
        return totals
    first, _, rest = journal.partition(b"\n")
    name = first.decode("ascii", "replace")
    if name != totals.folded:
        totals = fold(totals, map(_event, rest.split(b"\n")))._replace(folded=name)
        temporary = at / "totals.new"
        with temporary.open("w") as stream:
            json.dump(totals._asdict(), stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(at / "totals")
    (at / "folding").unlink()
    return totals


def _event(line: bytes) -> Any:
    try:
        return json.loads(line) if line else None
    except (ValueError, RecursionError):
        return None  # cut off


def _read_totals(path: Path) -> Totals:
    from vmgr.metrics.totals import Totals, from_plain  # as above

    data = _read_file(path, MAX_TOTALS_BYTES)
    if data is None:
        return Totals()
    try:
        return from_plain(json.loads(data))
    except (ValueError, RecursionError) as err:
        LOGGER.warning("%s: %s: it is begun anew", path, err)
        return Totals()


def _read_file(path: Path, limit: int) -> Optional[bytes]:
    try:
        with path.open("rb") as stream:
            return stream.read(limit)
    except FileNotFoundError:
        return None
