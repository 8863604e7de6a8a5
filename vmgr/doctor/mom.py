"""The node's daemon of the batch system, TORQUE's `pbs_mom`: its hooks are ours, and its time for them is enough.

A configuration that others than root could write counts for nothing (`src/resmom/parse_config.c` of TORQUE 6.1).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from vmgr.config import Timeouts
from vmgr.deploy.alarm import DEFAULT_SECONDS, EARLY_SECONDS, parse_alarm
from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.doctor.hooks import check_hooks
from vmgr.errors import VTorqueError
from vmgr.trust import check_trusted

MAX_BYTES = 1 << 20

_find = finder("batch system")


def check(node: Node) -> Iterator[Finding]:
    folder = place(node)
    if not folder.is_dir():
        yield _find(
            Level.NOTE, f"there is no {folder} (torque.mom_priv): hooks and $prologalarm are not looked at",
            "set torque.mom_priv where the daemon has its folder elsewhere; a front end has none",
        )  # fmt: skip
        return
    yield from check_hooks(folder, node)
    if node.config.engine == "local":
        yield _find(
            Level.NOTE,
            "the embedded batch system has its time for hooks from prologalarm_s of its settings",
            f"keep that more than {EARLY_SECONDS} s above timeouts.barrier ({node.config.timeouts.barrier})",
        )
        return
    try:
        text = _read(folder / "config")
        if text is not None:
            check_trusted(folder / "config")
    except VTorqueError as err:
        yield _find(Level.FAILURE, f"the daemon passes over its configuration: {err.message}", err.hint)
        text = None
    except OSError as err:
        yield _find(Level.WARNING, f"{folder}/config: {err.strerror}", "run vmgr doctor as root")
        return
    yield from judge_alarm(folder / "config", text, node.config.timeouts)


def place(node: Node) -> Path:
    """The daemon's private folder; the embedded batch system has one of the same make."""
    if node.config.engine == "local":
        return Path(node.config.local.spool) / "mom_priv"
    return node.config.mom_priv


def _read(path: Path) -> Optional[str]:
    """The daemon's configuration, None where there is none. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as stream:
        return stream.read(MAX_BYTES).decode("utf-8", "replace")


def judge_alarm(path: Path, text: Optional[str], timeouts: Timeouts) -> Iterator[Finding]:
    """Hold the site's timeouts against the time that hooks have."""
    alarm, problem = parse_alarm(text)
    if problem is not None:
        yield _find(Level.WARNING, f"{path} {problem}", f"write `$prologalarm {DEFAULT_SECONDS}`")
    from_where = f"{path} line {alarm.line}" if alarm.line else "the default: it is not set"
    limit = alarm.seconds - EARLY_SECONDS if alarm.seconds > EARLY_SECONDS else alarm.seconds
    said = f"$prologalarm is {alarm.seconds} s ({from_where}), and fires after {limit} s"
    worst = Level.OK
    for key, seconds, then in (
        ("barrier", timeouts.barrier, "a prologue that waits so long is killed, and the job is queued again"),
        ("disk", timeouts.disk, "an epilogue that waits so long is killed"),
    ):
        if seconds >= limit:
            worst = Level.FAILURE
            yield _find(
                worst, f"timeouts.{key} is {seconds} s: {said}: {then}",
                f"set timeouts.{key} below {limit}, or $prologalarm above {seconds + EARLY_SECONDS}",
            )  # fmt: skip
    if timeouts.boot >= timeouts.barrier:
        yield _find(
            Level.NOTE, f"timeouts.boot ({timeouts.boot} s) is no less than timeouts.barrier ({timeouts.barrier} s): "
            "the waiting for slow guests goes on in the job, and counts towards its walltime",
            "lower timeouts.boot, or raise timeouts.barrier as far as $prologalarm lets it",
        )  # fmt: skip
    if worst is Level.OK:
        yield _find(Level.OK, said)
