"""The janitor: ends and removes what no live attempt owns."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

from vmgr.config import Config
from vmgr.node import record
from vmgr.node.undo import undo

MARK_SECONDS = 3600
HALF_MADE_SECONDS = 60


def reap(config: Config, *, dry_run: bool = False) -> list[str]:
    """Undo every attempt whose lock nobody holds, and remove overlays, sockets and packet filters that no record names.

    Gives a line for each thing that was, or with `dry_run` would be, removed, and for each that could not be.
    """
    from vmgr.node.network import nft  # an agent that starts does without
    from vmgr.node.network.undo import stale_tables, tables_of

    said, tables = [], []
    try:
        tables = tables_of(config.paths.spool)
    except OSError as err:
        said.append(f"left: {err}")
    recorded = _steps(config)
    for place in record.places(config.paths):
        if not record.is_held(place):
            name = place.folder.parent.name
            said.append(f"attempt {name} {place.attempt}")
            if not dry_run:
                failures = undo(place)
                said += [f"left: {failure}" for failure in failures]
                if not failures and record.is_buried(config.paths, name, place):
                    record.exhume(config.paths, name)  # what its tombstone stood for was this
    overlays = sorted(path for path in record.listed(config.images.overlays) if path.suffix == ".qcow2")
    sockets = sorted(path for job in record.listed(config.paths.run / "jobs") for path in record.listed(job))
    named = {step.get("path") for step in _steps(config)}
    stale = [path for path in [*overlays, *sockets] if str(path) not in named]
    for marks in ("tombstones", "ended"):
        stale += [mark for mark in record.listed(config.paths.run / marks) if _age(mark) > MARK_SECONDS]
    for job in record.listed(config.paths.spool / "jobs"):
        stale += [path for path in record.listed(job) if path.name[0] == "." and _age(path) > HALF_MADE_SECONDS]
    for path in stale:
        said.append(str(path))
        if not dry_run:
            _remove(path)
    for table in stale_tables(tables, recorded):
        said.append(f"packet filter {table.family} {table.name}")
        if not dry_run:
            try:
                nft.remove(table)
            except OSError as err:
                said.append(f"left: {err}")
    return said


def _steps(config: Config) -> list[dict[str, Any]]:
    return [step for place in record.places(config.paths) for step in record.steps(place)]


def _age(path: Path) -> float:
    """Seconds since something was changed; 0 when it has gone meanwhile, as everything here may."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    if path.parent.parent.name == "jobs":
        with contextlib.suppress(OSError):  # something else of the job's is there
            path.parent.rmdir()
