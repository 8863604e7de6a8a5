"""The janitor's timer on a machine: its units, enabled, and that it runs where systemd does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from typing import Optional

from vmgr.deploy.hookfiles import JANITOR_TIMER as TIMER
from vmgr.deploy.manifest import Manifest
from vmgr.deploy.wants import FILE, FOLDER, LINK, Want
from vmgr.errors import Code, VTorqueError

UNITS = "/etc/systemd/system"
SYSTEMD = "/run/systemd/system"
"""It is there where systemd runs (sd_booted(3))."""
SECONDS = 60


def wants(units: Mapping[str, str]) -> list[Want]:
    """The units, texts by their names, and the link that enables the timer; nothing where they have no place."""
    if not units or not os.path.isdir(UNITS):
        return []
    folder = f"{UNITS}/timers.target.wants"
    files = [Want(f"{UNITS}/{name}", FILE, 0o644, text.encode()) for name, text in units.items()]
    return [*files, Want(folder, FOLDER, 0o755), Want(f"{folder}/{TIMER}", LINK, target=f"../{TIMER}")]


def start(units: Mapping[str, str], changed: Iterable[str]) -> None:
    """Have the timer run as its units say now; `changed` are paths that were written. Raises VTorqueError."""
    if _can_run(units) and (any(path.startswith(f"{UNITS}/") for path in changed) or not _runs()):
        _systemctl("daemon-reload")
        _systemctl("restart", TIMER)


def problem(units: Mapping[str, str]) -> Optional[str]:
    """What is wrong with a timer that is installed."""
    return f"{TIMER} does not run: systemctl start {TIMER}" if _can_run(units) and not _runs() else None


def stop(manifest: Optional[Manifest]) -> None:
    """End the timer, if it is one of this manifest's. Raises VTorqueError."""
    if manifest is not None and f"{UNITS}/{TIMER}" in manifest.entries and os.path.isdir(SYSTEMD):
        _systemctl("stop", TIMER)


def forget(removed: Iterable[str]) -> None:
    """Let systemd know that units are gone. Raises VTorqueError."""
    if f"{UNITS}/{TIMER}" in removed and os.path.isdir(SYSTEMD):
        _systemctl("daemon-reload")


def _can_run(units: Mapping[str, str]) -> bool:
    return bool(units) and os.path.isdir(UNITS) and os.path.isdir(SYSTEMD)


def _runs() -> bool:
    try:
        _systemctl("is-active", "--quiet", TIMER)
    except VTorqueError:
        return False
    return True


def _systemctl(*words: str) -> None:
    """Raises VTorqueError (VT-ACCESS) with the last line that systemctl says when it fails."""
    command = ["systemctl", *words]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise VTorqueError(f"systemctl: {err}", code=Code.ACCESS) from err
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        told = said[-1] if said else f"status {done.returncode}"
        raise VTorqueError(f"{' '.join(command)}: {told}", code=Code.ACCESS, hint="systemctl status shows more")
