"""The environment of a job on Slurm: that of the `sbatch` which submits it.

Slurm hands the environment of `sbatch` to the job (`--export=ALL`), and asks the node's `su` for one where it is told
to hand over less. So `sbatch` is started with exactly what the job shall have: what TORQUE would give it (`-v`, `-V`,
the `PBS_O_…` variables), and never a variable that Slurm's programs would take for an option.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vsub.engines.slurmoptions import split_option
from vsub.options import SBATCH, Option

REACHES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_SACK_SOCKET", "SLURM_JWT")
"""How Slurm's programs find their cluster's configuration, and show it who calls: `sbatch` hands them to its jobs."""
SLURMS = ("SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SCONTROL_")
"""Variables that belong to Slurm: those of another job, and options of its programs."""
PATH = "/usr/local/bin:/usr/bin:/bin"
"""Where a job finds programs when it brings no path."""
FOLDER = "TMPDIR"
"""A node makes the folder of this name, or complains in the job's errors; a guest has one of its own."""
TERMINAL = "TERM"
_ORIGIN = ("HOME", "LANG", "LOGNAME", "PATH", "MAIL", "SHELL", "TZ")


class Login(NamedTuple):
    """The user's account, the folder of the submission, and the host."""

    name: str
    home: str
    shell: str
    folder: str
    host: str


def job_environment(
    options: tuple[Option, ...], environ: Mapping[str, str], login: Login, *, interactive: bool = False
) -> dict[str, str]:
    """The environment with which a guest job is submitted; a session takes the kind of its terminal along, as of qsub.

    Raises VTorqueError (VT-USAGE, VT-OPTION).
    """
    everything, listed = _asked(options)
    found = {
        "HOME": login.home, "LOGNAME": login.name, "USER": login.name, "SHELL": login.shell, "PATH": PATH,
    }  # fmt: skip
    if interactive and environ.get(TERMINAL):
        found[TERMINAL] = environ[TERMINAL]
    if everything:
        found.update((name, value) for name, value in environ.items() if not name.startswith(SLURMS))
    found.update(_values(listed, environ))
    found.pop(FOLDER, None)
    origin = {name: environ[name] for name in _ORIGIN if environ.get(name)}
    found.update({f"PBS_O_{name}": value for name, value in {"HOME": login.home, **origin}.items()})
    found.update(PBS_O_WORKDIR=login.folder, PBS_O_HOST=login.host, PBS_O_SERVER=login.host)
    queue = next((option.value for option in reversed(options) if option.letter == "q"), None)
    if queue:
        found["PBS_O_QUEUE"] = queue
    return {**found, **{name: environ[name] for name in REACHES if environ.get(name)}}


def plain_environment(options: tuple[Option, ...], environ: Mapping[str, str], *, interactive: bool) -> dict[str, str]:
    """The environment with which a job without guests is submitted: ours, with what `-v` sets.

    A session is no step of the job that it may be asked for in. Raises VTorqueError as `job_environment`.
    """
    found = {
        name: value
        for name, value in environ.items()
        if not interactive or name in REACHES or not name.startswith("SLURM_")
    }
    listed = next((option for option in reversed(options) if option.letter == "v"), None)
    return {**found, **_values(listed, environ)}


def _asked(options: tuple[Option, ...]) -> tuple[bool, Optional[Option]]:
    """Whether the job takes the whole environment along, and the option that lists variables.

    `--export`, which says both, and `-V` with the last `-v` each take the place of the other where they come later.
    """
    everything, listed = False, None
    exported: Optional[Option] = None
    for option in options:
        if option.letter == SBATCH and split_option(option)[0] == "export":
            exported, everything, listed = option, False, None
        elif option.letter in "vV":
            exported = None
            everything = everything or option.letter == "V"
            listed = option if option.letter == "v" else listed
    if exported is None:
        return everything, listed
    names = (split_option(exported)[1] or "").split(",")
    everything = names[0].upper() == "ALL"
    if everything or names[0].upper() in ("NONE", "NIL"):
        names = names[1:]
    return everything, exported._replace(letter="v", value=",".join(names)) if names else None


def _values(listed: Optional[Option], environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of a list, `NAME` with the value that it has here. Raises VTorqueError (VT-USAGE, VT-OPTION)."""
    if listed is None:
        return {}
    from vsub.engines.local.resources import split_list  # few jobs have such a list

    found = {}
    try:
        parts = split_list(listed.value or "")
    except ValueError as err:
        raise _unreadable(listed, str(err)) from None
    for part in parts:
        name, equals, value = part.strip().partition("=")
        if not name or any(char.isspace() or char == "\0" for char in name) or "\0" in value:
            raise _unreadable(listed, f"{part[:80]!r} does not begin with a variable's name")
        if name.startswith(SLURMS):
            raise VTorqueError(
                f"{name[:80]} (-v, {listed.source}) cannot be given to a job: it is Slurm's own", code=Code.OPTION,
                hint="use another name",
            )  # fmt: skip
        found[name] = value if equals else environ.get(name, "")
    return found


def _unreadable(listed: Option, reason: str) -> VTorqueError:
    return VTorqueError(f"-v ({listed.source}) cannot be read: {reason}", code=Code.USAGE, hint="write -v NAME=VALUE,…")
