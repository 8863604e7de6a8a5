"""The record of an attempt: what was about to be made on this node, written before it is made.

An attempt is one start of a job; a requeued job keeps its id and gets a new one. Each attempt has a folder of its
own under the spool, held by a lock as long as its agent lives, with one JSON object a line in `record`. What is
needed to undo an attempt is in its record alone.

A single-node job has no cookie of the batch system while its prologue runs. What stands in for it is the start of
the prologue itself: the epilogue of an attempt starts after its prologue and ends before the prologue of the next, so
an epilogue ends exactly the attempts that started before it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from vmgr.config import Paths
from vmgr.node import process
from vmgr.node.hookargs import place_name

MAX_RECORD_BYTES = 1 << 20
FOLDER_SECONDS = 5.0


class Place(NamedTuple):
    """Where one attempt keeps its things: `folder` (root only) and `socket`, where its agent listens."""

    folder: Path
    socket: Path

    @property
    def attempt(self) -> str:
        return self.folder.name

    @property
    def record(self) -> Path:
        return self.folder / "record"

    @property
    def start(self) -> int:
        """When the attempt's prologue started, in clock ticks since the boot."""
        return int(self.folder.name.partition("-")[0])

    @property
    def is_of_this_boot(self) -> bool:
        """Whether the attempt started since the boot; the clock of `start` began anew with it."""
        return self.folder.name.endswith(process.boot_id()[:8])


def new_place(paths: Paths, job_id: str, start: Optional[int] = None) -> Place:
    """The place of the attempt that the calling prologue, which began at `start`, starts; nothing is made yet."""
    name = f"{hook_start() if start is None else start:016d}-{os.getpid()}-{process.boot_id()[:8]}"
    return _place(paths, place_name(job_id), name)


def hook_start(leader: Optional[int] = None) -> int:
    """When the hook that the caller belongs to was started, in clock ticks since the boot.

    Counting from its first process (`leader`; the leader of the session where none is named), not from this one, an
    epilogue that runs beside the prologue of a deleted job is never taken for older.
    """
    first = os.getsid(0) if leader is None else leader
    return process.start_ticks(first) or process.start_ticks(os.getpid()) or 0


def has_begun(paths: Paths, job_id: str, start: int, key: Optional[str] = None) -> bool:
    """Whether the hook that began at `start` has made a place for the job, or a live agent serves its attempt `key`."""
    return any(
        place.is_of_this_boot
        and (place.start == start or (key is not None and begun(place).get("key") == key and is_held(place)))
        for place in places(paths, job_id)
    )


def places(paths: Paths, job_id: Optional[str] = None) -> list[Place]:
    """The places of all attempts on this node, or of one job's, oldest first."""
    found = []
    for folder in [paths.spool / "jobs" / place_name(job_id)] if job_id else listed(paths.spool / "jobs"):
        found += [_place(paths, folder.name, attempt.name) for attempt in listed(folder)]
    return sorted((p for p in found if p.attempt[:1].isdigit()), key=lambda p: p.attempt)


def newest_socket(paths: Paths, job_id: str) -> Optional[Path]:
    """Where the agent of a job's newest attempt listens; None when no agent of this job runs here. For users too."""
    found = sorted(listed(paths.run / "jobs" / place_name(job_id)))
    return found[-1] if found else None


def _place(paths: Paths, job: str, attempt: str) -> Place:
    return Place(paths.spool / "jobs" / job / attempt, paths.run / "jobs" / job / f"{attempt}.sock")


def listed(folder: Path) -> list[Path]:
    """What lies in a folder; nothing when it is not there, or is taken away meanwhile."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def create(place: Place, facts: dict[str, Any]) -> tuple[int, socket.socket]:
    """Make the place: its folder with `facts` in the record, its lock (held), its listening socket.

    Gives the lock's descriptor and the socket. The folder appears under its name only when it is locked, because one
    that is not is taken for what a dead attempt left. Everybody may connect to the socket: the agent looks at who.
    """
    for folder, mode in (
        (place.folder.parents[2], 0o755), (place.folder.parents[1], 0o700),
        (place.socket.parents[2], 0o755), (place.socket.parents[1], 0o755),
    ):  # fmt: skip
        make_folder(folder, mode)
    hidden = place.folder.with_name(f".{place.attempt}")
    _make_in(place.folder.parent, 0o700, lambda: hidden.mkdir(mode=0o700))
    lock = os.open(hidden / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    hidden.rename(place.folder)
    append(place, {"do": "begin", "boot": process.boot_id(), **facts})
    append(place, {"do": "socket", "path": str(place.socket)})
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    _make_in(place.socket.parent, 0o755, lambda: listener.bind(str(place.socket)))
    place.socket.chmod(0o666)
    listener.listen(64)
    return lock, listener


def _make_in(folder: Path, mode: int, make: Callable[[], None]) -> None:
    """Make something in a job's folder, which the undoing of an earlier attempt may take away at any moment."""
    deadline = time.monotonic() + FOLDER_SECONDS
    while True:
        try:
            make_folder(folder, mode)
            return make()
        except FileNotFoundError:  # taken away in between; a folder that is on its way out can still be seen
            if time.monotonic() > deadline:
                raise


def make_folder(folder: Path, mode: int) -> None:
    """Make `folder` with this mode, whatever the umask, and what is missing above it; fine when it is there."""
    try:
        folder.mkdir(mode=mode)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_folder(folder.parent, 0o755)
        return make_folder(folder, mode)
    folder.chmod(mode)


@contextmanager
def node_lock(paths: Paths, name: str) -> Iterator[None]:
    """Hold one of the node's locks: what is decided under it is decided by one process at a time."""
    make_folder(paths.run, 0o755)
    lock = os.open(paths.run / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def is_held(place: Place) -> bool:
    """Whether the attempt's lock is held, that is, its prologue or its agent lives."""
    try:
        fd = os.open(place.folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who ask are not taken for a holder
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def append(place: Place, step: dict[str, Any]) -> None:
    """Write one step to the record, before it is done. Raises OSError when it cannot be written whole."""
    fd = os.open(place.record, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        line = json.dumps(step).encode() + b"\n"
        if os.write(fd, line) != len(line):
            os.write(fd, b"\n")  # what may come is not to be lost with the part that was written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place.record))
    finally:
        os.close(fd)


def steps(place: Place) -> Iterator[dict[str, Any]]:
    """The steps of a record, oldest first; a last line cut off by a crash is left out."""
    try:
        with open(place.record, "rb") as stream:
            lines = stream.read(MAX_RECORD_BYTES).split(b"\n")
    except OSError:
        return
    for line in lines:
        try:
            step = json.loads(line)
        except ValueError:
            continue
        if isinstance(step, dict):
            yield step


def begun(place: Place) -> dict[str, Any]:
    """The facts that the prologue wrote down; empty when it was cut off before."""
    return next((step for step in steps(place) if step.get("do") == "begin"), {})


def bury(paths: Paths, job_id: str, start: Optional[int] = None) -> None:
    """Leave a tombstone: every attempt of the job whose prologue started before the calling hook is over.

    The hook began at `start`, or with the session of the caller.
    """
    _write_mark(paths.run / "tombstones" / place_name(job_id), hook_start() if start is None else start)


def is_buried(paths: Paths, job_id: str, place: Place) -> bool:
    """Whether an epilogue, or a boot since, has ended this attempt."""
    return not place.is_of_this_boot or place.start <= _read_mark(paths.run / "tombstones" / place_name(job_id))


def exhume(paths: Paths, job_id: str) -> None:
    """Remove a job's tombstone: nothing of the attempts that it ended can come up any more."""
    (paths.run / "tombstones" / place_name(job_id)).unlink(missing_ok=True)


def note_end(paths: Paths, job_id: str, place: Place) -> None:
    """Leave word for the epilogue that the attempt is over and about to be undone: it need not expect its agent.

    It comes before the undoing, so that an epilogue which ends that agent meets either the record or this word. It lies
    beside the records, because the shell of a hook looks for both.
    """
    _write_mark(paths.spool / "ended" / place_name(job_id), place.start)


def take_end(paths: Paths, job_id: str) -> bool:
    """Whether an attempt of the job has ended by itself since the boot; the word is taken away."""
    mark = paths.spool / "ended" / place_name(job_id)
    start = _read_mark(mark)
    try:
        mark.unlink()
        return start >= 0
    except OSError:
        return False


def _write_mark(mark: Path, start: int) -> None:
    make_folder(mark.parent, 0o700)
    temporary = mark.with_name(f".{mark.name}.{os.getpid()}")
    temporary.write_text(f"{start} {process.boot_id()}\n")
    temporary.replace(mark)


def _read_mark(mark: Path) -> int:
    try:
        start, boot = mark.read_text().split()
        return int(start) if boot == process.boot_id() else -1
    except (OSError, ValueError):
        return -1
