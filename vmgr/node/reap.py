"""The janitor: ends and removes what no live attempt owns."""

from __future__ import annotations

import shutil
import time

from vmgr.config import Config
from vmgr.node import record
from vmgr.node.undo import undo

MARK_SECONDS = 3600
HALF_MADE_SECONDS = 60


def reap(config: Config, *, dry_run: bool = False) -> list[str]:
    """Undo every attempt whose lock nobody holds, and remove overlays and sockets that no record names.

    Gives a line for each thing that was, or with `dry_run` would be, removed, and for each that could not be.
    """
    said = []
    for place in record.places(config.paths):
        if not record.is_held(place):
            said.append(f"attempt {place.folder.parent.name} {place.attempt}")
            said += [] if dry_run else [f"left: {failure}" for failure in undo(place)]
    overlays = sorted(config.images.overlays.glob("*.qcow2"))
    sockets = sorted((config.paths.run / "jobs").glob("*/*.sock"))
    steps = [step for place in record.places(config.paths) for step in record.steps(place)]
    named = {step.get("path") for step in steps}
    now = time.time()
    stale = [path for path in [*overlays, *sockets] if str(path) not in named]
    for marks in ("tombstones", "ended"):
        stale += [m for m in (config.paths.run / marks).glob("*") if now - m.stat().st_mtime > MARK_SECONDS]
    for path in stale:
        said.append(str(path))
        if not dry_run:
            path.unlink(missing_ok=True)
    for folder in (config.paths.spool / "jobs").glob("*/.*"):
        if now - folder.stat().st_mtime > HALF_MADE_SECONDS:
            said.append(str(folder))
            if not dry_run:
                shutil.rmtree(folder, ignore_errors=True)
    return said
