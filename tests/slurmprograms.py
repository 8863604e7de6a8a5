"""The Slurm that tests run: where it lies, the machine's own in /usr or another one, and what all its clusters share.

VTORQUE_TEST_SLURM names the folder of another: the prefix that it was installed under, with `bin` and `sbin`. Every
user must be able to reach it. munge is the machine's own in any case.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Optional

PREFIX = Path(os.environ.get("VTORQUE_TEST_SLURM") or "/usr")
BIN = PREFIX / "bin"
"""The commands, for `slurm.bin`."""
PATH = ":".join(dict.fromkeys((str(PREFIX / "sbin"), str(BIN), "/usr/sbin", "/usr/bin", "/sbin", "/bin")))
"""Where all of them are found."""

CONF = """\
ClusterName=ref
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation={folder}/ctld
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg=/bin/true
MpiDefault=none
SelectType=select/cons_tres
EnforcePartLimits=ALL
ReturnToService=2
SlurmdParameters=config_overrides
"""
"""How the slurm.conf of any of them begins, for a `folder` of its own, in which `ctld` is."""


def lacking(names: Iterable[str]) -> Optional[str]:
    """The first of the programs that is not there: those of Slurm in its own folders, others anywhere."""
    own = f"{PREFIX / 'sbin'}:{BIN}"
    return next((name for name in names if not shutil.which(name, path=PATH if name == "munged" else own)), None)


def munged(folder: Path) -> list[str]:
    """Make a key in `munge` below a cluster's folder, and give the command of the daemon whose socket is there."""
    munge = folder / "munge"
    munge.mkdir(mode=0o755)
    key = munge / "key"
    key.touch(mode=0o400)
    key.write_bytes(secrets.token_bytes(64))
    own = [f"--{name}={munge / name.partition('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    return ["munged", "--foreground", f"--key-file={key}", *own]


def start(argv: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a daemon, which dies with its tests."""
    with log.open("ab") as said:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *argv], env=environment, cwd="/",
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip


def end(daemon: subprocess.Popen[bytes]) -> None:
    """End a daemon, which may take a while."""
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
