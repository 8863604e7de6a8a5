"""Running a build's programs so that nothing of them outlives the build: no process and no mount."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

from vmgr.errors import Code, VTorqueError
from vmgr.signals import undisturbed

EPOCH = "1700000000"
"""The time that stands in files which the build itself makes: fixed, so builds can be compared."""

_CAGE = Path(__file__).parent / "cage.py"
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "DEBIAN_FRONTEND": "noninteractive",
    "HOME": "/root",
    "SOURCE_DATE_EPOCH": EPOCH,
    "SYSTEMD_OFFLINE": "1",
}
_PASSED_ON = ("APT_CONFIG", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
"""What a build takes from the environment: the way out, and an apt.conf(5) of the site's own for builds."""
_SHOWN_LINES = 8
_NOT_STARTED = 127


def run(
    command: Sequence[str],
    *,
    cwd: Path,
    network: bool = False,
    root: Optional[Path] = None,
    furnish: Optional[Path] = None,
    environment: Optional[Mapping[str, str]] = None,
    log: Optional[Path] = None,
) -> str:
    """Run `command` as root and return its standard output; what it said is added to the file `log`, if one is given.

    The command has mount, process, IPC and network namespaces of its own (`cage.py`), with no device but an idle
    loopback, unless it may use the machine's `network`; with `root` it sees only that folder, as its root; `furnish` is
    a folder that gets a /proc and a /dev for it. It and all that it started are gone when this returns or raises, and
    when this process is killed.

    Raises VTorqueError (VT-BUILD) with the last of what the command said.
    """
    options = ["--network"] if network else []
    for option, folder in (("--root", root), ("--furnish", furnish)):
        options += [option, os.fspath(folder)] if folder else []
    passed_on = {name: os.environ[name] for name in _PASSED_ON if root is None and name in os.environ}
    process: Optional[subprocess.Popen[str]] = None
    try:
        with undisturbed():  # an exception of a signal's would lose a process that has just been started
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", os.fspath(_CAGE), str(os.getpid()), *options, "--", *command],
                cwd=cwd,
                env={**_ENVIRONMENT, **passed_on, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # an interrupt from the terminal is for us alone
            )
        said, complained = process.communicate()
    except BaseException:
        if process is not None:
            with process:
                process.terminate()
        raise
    if log is not None:
        with log.open("a") as stream:
            stream.write(f"{shlex.join(command)}\n{said}\n{complained}\n")
    if process.returncode != 0:
        last = " | ".join((complained or said).strip().splitlines()[-_SHOWN_LINES:])
        what = last if process.returncode == _NOT_STARTED else f"{command[0]} ended with {process.returncode}: {last}"
        raise VTorqueError(what, code=Code.BUILD, hint=f"see {log}" if log else None)
    return said
