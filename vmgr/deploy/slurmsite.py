"""A site's Slurm as an installation meets it: its configuration, which is read and never written, and its nodes."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
from typing import NamedTuple, Optional

from vmgr.deploy import slurmconf
from vmgr.deploy.moms import content
from vmgr.deploy.nodes import nodes_in
from vmgr.deploy.slurmconf import Judged, Settings
from vmgr.errors import Code, VTorqueError, printable
from vmgr.slurmvars import unfiltered

CONF = "/etc/slurm/slurm.conf"
SECONDS = 60
MAX_BYTES = 4 << 20
MAX_HOOKS = 100


class Found(NamedTuple):
    """A site's settings, and where they are from; `problem` is why there are none."""

    source: str
    settings: Settings
    problem: str = ""


def hooks_folder(prefix: str) -> str:
    """Where Slurm's hooks of an installation lie, for slurm.conf."""
    return f"{prefix}/share/vtorque/mom_priv_hooks/slurm"


def _program(name: str, folder: str) -> Optional[str]:
    """A command of Slurm's: in `slurm.bin`, or where the search path has it."""
    place = f"{folder}/{name}"
    return place if folder and os.access(place, os.X_OK) else shutil.which(name)


def _ask(program: str, *words: str) -> str:
    """What a command of Slurm's prints. Raises VTorqueError (VT-ENGINE) with its last line when it fails."""
    what = " ".join([os.path.basename(program), *words])
    try:
        done = subprocess.run(
            [program, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=SECONDS, env=unfiltered(os.environ),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise VTorqueError(f"{what} has not answered within {SECONDS} s", code=Code.ENGINE) from None
    except OSError as err:
        raise VTorqueError(f"{what}: {err.strerror}", code=Code.ENGINE) from err
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise VTorqueError(f"{what}: {printable(said[-1]) if said else done.returncode}", code=Code.ENGINE)
    return done.stdout


def find(folder: str) -> Found:
    """The settings that hold, as Slurm tells them; where it does not, those of the file. `folder` is `slurm.bin`."""
    scontrol = _program("scontrol", folder)
    reason = "there is no scontrol"
    if scontrol is not None:
        try:
            settings = slurmconf.told(_ask(scontrol, "show", "config"))
            if "slurm_conf" in settings or "clustername" in settings:
                return Found("scontrol show config", settings)
            reason = "scontrol show config tells no configuration"
        except VTorqueError as err:
            reason = err.message
    path = os.environ.get("SLURM_CONF") or CONF
    try:
        return Found(path, slurmconf.parse_file(path, _read))
    except ValueError as err:
        return Found(path, {}, printable(str(err)))
    except OSError as err:
        return Found(path, {}, f"{reason}, and {path} cannot be read: {err.strerror}")


def _read(path: str) -> str:
    """The text of a configuration. Raises OSError, ValueError for one that is too long."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES} bytes")
    return data.decode("utf-8", "replace")


def calls(pattern: str, hook: str) -> bool:
    """Whether a program, or one of those of a pattern, is our hook by another name, or names it in its text."""
    if not pattern.startswith("/"):
        return False
    for path in sorted(glob.glob(pattern))[:MAX_HOOKS]:
        if os.path.realpath(path) == os.path.realpath(hook) or hook.encode() in content(path):
            return True
    return False


class Report(NamedTuple):
    """What is said of a site's slurm.conf, a line for each that is needed; `bad` keeps guest jobs from running."""

    lines: list[str]
    bad: bool
    ours: list[str]
    """Lines of which slurm.conf has our hooks, under whatever name."""


def report(prefix: str, folder: str) -> Report:
    """Compare the site's slurm.conf with what the installation in `prefix` needs; `folder` is `slurm.bin`."""
    found = find(folder)
    if found.problem:
        return Report([f"slurm.conf is not compared: {found.problem}"], True, [])
    hooks = hooks_folder(prefix)
    judged: list[Judged] = slurmconf.judge(hooks, found.settings, calls)
    ours = [each.line for each in judged if each.state == slurmconf.THERE and f"={hooks}/" in each.line]
    said = [printable(f"slurm.conf ({found.source}): {each}") for each in judged]
    return Report(said, any(each.bad for each in judged), ours)


def all_nodes(folder: str = "") -> list[str]:
    """The nodes of all partitions, as sinfo names them. Raises VTorqueError (VT-ENGINE)."""
    sinfo = _program("sinfo", folder)
    hint = "name the nodes with --nodes SET"
    if sinfo is None:
        raise VTorqueError("--all: there is no sinfo", code=Code.ENGINE, hint=hint)
    try:
        names = nodes_in(_ask(sinfo, "-a", "-h", "-N", "-o", "%N"))
    except VTorqueError as err:
        raise VTorqueError(f"--all: {err.message}", code=Code.ENGINE, hint=hint) from err
    if not names:
        raise VTorqueError("--all: Slurm has no nodes", code=Code.ENGINE, hint=hint)
    return names
