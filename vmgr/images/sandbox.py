"""Running a build's programs so that nothing of them outlives the build: no process and no mount."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

from vmgr.errors import Code, VTorqueError

_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "DEBIAN_FRONTEND": "noninteractive",
    "HOME": "/root",
}
_PASSED_ON = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_SHOWN_LINES = 8


def run(
    command: Sequence[str],
    *,
    cwd: Path,
    isolated: bool = False,
    environment: Optional[Mapping[str, str]] = None,
    log: Optional[Path] = None,
) -> str:
    """Run `command` and return its standard output; all that it said is left in the file `log`, if one is given.

    Raises VTorqueError (VT-BUILD) with the last of what the command said.

    The command dies with us, whatever ends us (setpriv's parent-death signal). `isolated` gives it mount and
    process namespaces of its own as well, so that what it started and mounted goes with it; that needs root.
    """
    prefix = ["setpriv", "--pdeathsig", "KILL", "--"]
    if isolated:
        prefix += ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--"]
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    try:
        done = subprocess.run(
            [*prefix, *command],
            cwd=cwd,
            env={**_ENVIRONMENT, **passed_on, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as err:
        raise VTorqueError(f"{err.filename} is not installed", code=Code.BUILD) from err
    if log is not None:
        log.write_text(f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}")
    if done.returncode != 0:
        said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-_SHOWN_LINES:])
        raise VTorqueError(
            f"{command[0]} failed with status {done.returncode}: {said}",
            code=Code.BUILD,
            hint=f"see {log}" if log else None,
        )
    return done.stdout
