"""The janitor: ends and removes what no live attempt owns.

What is to go is found first, as a list of `Thing`s, and then removed: a dry run stops in between. Nothing that is found
can come into use meanwhile: the lock of an attempt is held from its first moment or never again, and what a new one
makes has names of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

from vmgr.config import Config
from vmgr.node import process, record
from vmgr.node.undo import undo

MARK_SECONDS = 3600
HALF_MADE_SECONDS = 60
_UNFINISHED = re.compile(r"\.([0-9a-f]{64})\.tmp")


class Thing(NamedTuple):
    """Something that no live attempt owns.

    `kind` is one of `KINDS`, `what` its path or name, `holds` what goes with it, a line each. `remove` gives a line for
    each part that could not be removed.
    """

    kind: str
    what: str
    holds: tuple[str, ...]
    remove: Callable[[], list[str]]

    @property
    def line(self) -> str:
        return self.what if self.kind in _PATHS else f"{self.kind} {self.what}"


_PATHS = ("overlay", "socket", "mark", "folder", "copy")
KINDS = ("attempt", *_PATHS, "packet filter", "link")
"""A mark is a tombstone or a word to an epilogue, a folder a half-made or an empty one, a copy one of an image that was
never finished."""


def reap(config: Config, *, dry_run: bool = False) -> list[str]:
    """Undo every attempt whose lock nobody holds, and remove what no record names.

    Gives a line for each thing that was, or with `dry_run` would be, removed, and for each that could not be.
    """
    things, said = find(config)
    if dry_run:
        return said + [thing.line for thing in things]
    for thing, failures in remove_all(config, things):
        said += [thing.line, *(f"left: {failure}" for failure in failures)]
    return said


def remove_all(config: Config, things: Iterable[Thing]) -> Iterator[tuple[Thing, list[str]]]:
    """Remove things, one after the other: gives each with a line for each part that could not be. They are counted."""
    done: list[str] = []
    try:
        for thing in things:
            failures = thing.remove()
            if not failures:
                done.append(thing.kind)
            yield thing, failures
    finally:
        if done:
            from vmgr.metrics import store

            store.note(config.paths, {"e": "reaped", "kinds": {kind: done.count(kind) for kind in set(done)}})


def find(config: Config) -> tuple[list[Thing], list[str]]:
    """What no live attempt owns, and a line for each place that could not be looked at."""
    # an agent that starts does without
    from vmgr.node.network.undo import signed_links, stale_links, stale_tables, tables_of

    # everything is listed before the records: what is made later is named in a record before
    said, tables, links = [], [], []
    try:
        tables, links = tables_of(config.paths.spool), signed_links(config.paths.spool)
    except OSError as err:
        said.append(f"left: {err}")
    overlays = [path for path in record.listed(config.images.overlays) if path.suffix in (".qcow2", ".copy")]
    sockets = [path for job in record.listed(config.paths.run / "jobs") for path in record.listed(job)]
    copies = _unfinished(config)
    places = record.places(config.paths)
    recorded = [step for place in places for step in record.steps(place)]
    named = {step.get("path") for step in recorded}
    there = {(table.family, table.name) for table in tables}
    things = [_attempt(config, place, there) for place in places if not record.is_held(place)]
    for kind, paths in (("overlay", overlays), ("socket", sockets)):
        things += [_file(kind, path) for path in sorted(paths) if str(path) not in named]
    things += [_copy(path, lock) for path, lock in copies if str(path) not in named]
    for marks in (config.paths.run / "tombstones", config.paths.spool / "ended"):
        old = (mark for mark in record.listed(marks) if _age(mark) > MARK_SECONDS)
        things += [_file("mark", mark) for mark in old]
    things += [_file("folder", folder) for folder in _half_made(config)]
    things += [_table(table) for table in stale_tables(tables, recorded)]
    things += [_link(name, mark) for name, mark in stale_links(links, recorded)]
    return things, said


def _attempt(config: Config, place: record.Place, tables: Collection[tuple[str, str]]) -> Thing:
    name = place.folder.parent.name

    def remove() -> list[str]:
        failures = undo(place)
        if not failures and record.is_buried(config.paths, name, place):
            record.exhume(config.paths, name)  # what its tombstone stood for was this
        return failures

    return Thing("attempt", f"{name} {place.attempt}", tuple(_holds(record.steps(place), tables)), remove)


def _holds(steps: Iterable[dict[str, Any]], tables: Collection[tuple[str, str]]) -> Iterator[str]:
    """What the recorded steps of an attempt have left, as far as root may look: not at what is the user's."""
    listed = list(steps)
    gone = {step.get("path") for step in listed if step.get("gone")}
    for step in listed:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kind = step["do"]
            if kind in ("process", "leftover"):
                found = process.recorded(step)
                if process.identify(found.pid) == found:
                    yield f"process {found.pid} ({step.get('role', 'of the user')})"
            elif kind in ("overlay", "socket", "filling", "group"):
                if os.path.lexists(str(step["path"])):
                    yield f"{'copy' if kind == 'filling' else kind} {step['path']}"
            elif kind == "partial" and step["path"] in gone:
                continue
            elif kind in ("workspace", "shared", "partial"):
                yield f"{'file' if kind == 'partial' else 'workspace'} {step['path']}"
            elif kind == "network":
                yield from (f"link {name}" for name in step["links"] if _is_link(str(name)))
                named = [(str(family), str(name)) for family, name in step["tables"]]
                yield from (f"packet filter {family} {name}" for family, name in named if (family, name) in tables)


def _is_link(name: str) -> bool:
    with contextlib.suppress(OSError):
        return socket.if_nametoindex(name) > 0
    return False


def _file(kind: str, path: Path) -> Thing:
    return Thing(kind, str(path), (), lambda: _remove(path))


def _copy(path: Path, lock: Path) -> Thing:
    from vmgr.node.staging.cache import remove_unfinished

    return Thing("copy", str(path), (), lambda: _told(lambda: remove_unfinished({"path": path, "lock": lock})))


def _table(table: Any) -> Thing:
    from vmgr.node.network import nft

    return Thing("packet filter", f"{table.family} {table.name}", (), lambda: _told(lambda: nft.remove(table)))


def _link(name: str, mark: str) -> Thing:
    from vmgr.node.network import links

    return Thing("link", name, (), lambda: _told(lambda: links.remove(name, mark)))


def _told(work: Callable[[], None]) -> list[str]:
    try:
        work()
    except OSError as err:
        return [str(err)]
    return []


def _half_made(config: Config) -> list[Path]:
    """Folders of jobs that are empty, and of attempts that were never finished, for a while already."""
    found = []
    for jobs in (config.paths.spool / "jobs", config.paths.run / "jobs"):
        for job in record.listed(jobs):
            inside = record.listed(job)
            found += [path for path in inside if path.name[0] == "." and _age(path) > HALF_MADE_SECONDS]
            if not inside and _age(job) > HALF_MADE_SECONDS:
                found.append(job)
    return found


def _unfinished(config: Config) -> list[tuple[Path, Path]]:
    """Copies in the cache of images that nobody is at, each with its lock."""
    folder = config.images.cache.folder
    if folder is None:
        return []
    from vmgr.node.staging.cache import lock_name

    found = []
    for path in record.listed(folder):
        match = _UNFINISHED.fullmatch(path.name)
        if match:
            lock = config.paths.run / f"{lock_name(match[1])}.lock"
            if not _is_locked(lock):
                found.append((path, lock))
    return sorted(found)


def _is_locked(lock: Path) -> bool:
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _age(path: Path) -> float:
    """Seconds since something was changed; 0 when it has gone meanwhile, as everything here may."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _remove(path: Path) -> list[str]:
    if path.parent.name == "jobs":  # a job's folder, into which a new attempt may come at any moment
        with contextlib.suppress(OSError):
            path.rmdir()
        return []
    failures = []
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass  # another janitor has it
    except OSError as err:
        failures.append(f"{err.filename or path}: {err.strerror}")
    if path.parent.parent.name == "jobs":
        with contextlib.suppress(OSError):  # something else of the job's is there
            path.parent.rmdir()
    return failures
