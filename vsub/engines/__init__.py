"""Batch systems that vsub can submit to: one module each, behind one small interface.

An engine translates (what a job asks of its nodes; the arguments with which a guest job is submitted), says which
program submits, how far a job is, and how to wait for its end. Where a hook finds the job's facts is all that the
node side knows of a batch system:

- `torque`: arguments and environment of the hooks, `mom_priv/jobs/<prefix>.JB`; the specification's path
  comes as the first item of the resource list, `prologue=…`, in argument 5 of a prologue.
- `local`: the embedded one. It calls the same hooks with the same arguments, environment, order and rules.
- `slurm`: environment of Prolog and Epilog; the specification's path comes in the job's comment.

What each does, and what OpenPBS would need, is written down in docs/engines.md.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NamedTuple, Optional, Protocol, Union

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.paths import Installation

if TYPE_CHECKING:
    import socket

    from vsub.fit import Fitted
    from vsub.hostrequest import HostRequest
    from vsub.options import Line, Option
    from vsub.script import Script

PHASES = {
    "Q": "queued",
    "T": "queued",
    "H": "held",
    "W": "waiting",
    "R": "running",
    "S": "running",
    "E": "exiting",
    "C": "completed",
    "F": "completed",
}
"""The letters of `qstat`, with what they mean here."""


class JobState(NamedTuple):
    """How far a job is in its batch system.

    `phase` is one of queued, held, waiting, running, exiting, completed, gone (the batch system does not
    know it any more) or unknown (the batch system did not answer). `exit_status` is what a shell would call
    it, once the job has completed and the batch system tells.
    """

    phase: str
    exit_status: Optional[int] = None

    @property
    def ended(self) -> bool:
        return self.phase in ("completed", "gone")


class PlacedJob(NamedTuple):
    """A job that has nodes: its whole id, its owner's name, its nodes with the mother superior first."""

    job_id: str
    owner: str
    nodes: tuple[str, ...]


class GuestJob(NamedTuple):
    """What the submission of a guest job has to carry to the batch system.

    `options` are the user's, in the language of qsub, directives first; `fitted` is what the guests need of the
    nodes. `directory` is the job directory, whose path must reach root on every node; `program` stands for the job's
    shell. `job_name` is the name of a job whose user gives none; `node_access` is who may share the nodes, None for
    whoever the batch system lets; `job_type` is the type that makes the batch system call our hooks, None where it
    calls them for all jobs. A job that is `suspendable` may be queued again and go on.
    """

    options: tuple[Option, ...]
    fitted: Fitted
    directory: str
    program: str
    job_name: str
    interactive: bool
    node_access: Optional[str]
    job_type: Optional[str]
    suspendable: bool


class Plain(NamedTuple):
    """How a job without guests is submitted: the whole command line, and its environment (None: ours)."""

    argv: list[str]
    environment: Optional[dict[str, str]] = None


class Said(NamedTuple):
    """One value that the submitting program is given, and where it comes from."""

    key: str
    value: str
    source: str


class Engine(Protocol):
    """One batch system."""

    @property
    def qsub(self) -> str:
        """The program that submits, an absolute path."""

    @property
    def session_qsub(self) -> str:
        """The program that submits an interactive job and is its terminal."""

    @property
    def qsub_key(self) -> str:
        """The configuration key that names these programs."""

    @property
    def commands(self) -> tuple[str, str]:
        """The commands with which a user looks after a job, and deletes it."""

    @property
    def usage(self) -> str:
        """What to do about an option that is not known."""

    def whole_line(self, line: Line) -> Line:
        """A command line with what stands in the batch system's own language behind `--slurm` read too.

        Raises VTorqueError (VT-OPTION) where the batch system is another.
        """

    def whole_directives(self, directives: Line, script: Optional[Script]) -> Line:
        """A script's directives with those in the batch system's own language. Raises VTorqueError."""

    def read_host_request(self, options: tuple[Option, ...]) -> HostRequest:
        """What a job's options ask of its nodes. Raises VTorqueError for what no guest job can ask for."""

    def guest_arguments(self, job: GuestJob) -> list[str]:
        """The arguments of the submitting program for a guest job."""

    def guest_environment(self, job: GuestJob) -> Optional[dict[str, str]]:
        """The environment of the submitting program for a guest job; None: ours."""

    def explain(self, job: GuestJob) -> Optional[tuple[Said, ...]]:
        """What `guest_arguments` comes from, value by value; None where the user's options are passed on as they are.

        The job has no directory yet.
        """

    def plain(self, qsub: str, line: Line, directives: Line) -> Plain:
        """The submission of a job without guests by a program of ours. Raises VTorqueError."""

    def noted_id(self, output: bytes) -> bytes:
        """The job's id from what the submitting program has printed, such that no other cluster has it too."""

    def state(self, job_id: str, timeout_s: Optional[float] = None) -> JobState:
        """How far a job is; asks the batch system, and may take seconds: `unknown` after `timeout_s`."""

    def check_state(self) -> None:
        """Raise VTorqueError (VT-ENGINE) when `state` could never answer, so that nobody waits for it."""

    def completion(self, job_id: str) -> Optional[socket.socket]:
        """A socket that becomes readable at the job's end with one line for `read_completion`.

        None where the batch system has nothing of the kind, and must be asked again and again.
        """

    def read_completion(self, line: bytes) -> JobState:
        """The end of a job from the line on its socket; phase `unknown` when the line says nothing."""

    def nodes(self, timeout_s: float) -> tuple[str, ...]:
        """All nodes of the batch system. Raises VTorqueError (VT-ENGINE) when it does not say within `timeout_s`."""

    def server(self, timeout_s: float) -> str:
        """The name in the ids of its jobs, `12.NAME`. Raises VTorqueError (VT-ENGINE) as `nodes`."""

    def whole(self, job_id: str, timeout_s: float) -> str:
        """The whole id of the one job that a user names so, `12.NAME`; it may be over.

        Raises VTorqueError: VT-ENGINE as `nodes`, also for a member of an array whose id nobody knows any more,
        VT-VALUE for an array whose members have ids of their own.
        """

    def placed(self, job_id: Optional[str], timeout_s: float) -> tuple[PlacedJob, ...]:
        """The jobs that have nodes and that the caller may see, or only the one that is named as a user would.

        Raises VTorqueError (VT-ENGINE) as `nodes`, VT-ACCESS for another user's job where the batch system hides it.
        """

    def hold(self, job_id: str, timeout_s: float) -> bool:
        """Keep a job from starting until it is released; one that runs goes on, and is held once it is requeued.

        Gives whether its user had not held it before. Raises VTorqueError: VT-ACCESS for a caller who may not,
        VT-ENGINE with what else the batch system says.
        """

    def release(self, job_id: str, timeout_s: float) -> None:
        """Let a job start that its user holds. Raises VTorqueError as `hold`, also when nothing holds it."""

    def requeue(self, job_id: str, timeout_s: float) -> None:
        """End a running job and queue it again; returns when the batch system has taken the order.

        Needs an operator, as root on a node is to be. Raises VTorqueError as `hold`.
        """

    def check_requeue(self, timeout_s: float) -> None:
        """Raise VTorqueError, VT-ACCESS, when the caller may requeue no jobs, VT-ENGINE when that is not known."""

    def give_back(self, job_id: str, timeout_s: float) -> None:
        """Take the job directory's path out of what the user has said of a job, which does not start again.

        Nothing is done where it is in nothing of the user's, or the user has taken it out. Raises as `hold`; each of
        the commands may take `timeout_s`.
        """


def engine(config: Config, install: Installation) -> Engine:
    """The batch system of this site."""
    if config.engine == "local":
        from vsub.engines.embedded import Embedded  # only one of them is needed, and time counts here

        return Embedded(config, install)
    if config.engine == "slurm":
        from vsub.engines.slurm import Slurm

        return Slurm(config)
    from vsub.engines.torque import Torque

    return Torque(config)


def checked_qsub(program: str, install: Installation, key: str) -> str:
    """The path of the program that submits, which must be there and must not be vsub itself.

    `key` is the configuration key that names it. Raises VTorqueError (VT-ENGINE).
    """
    try:
        found = os.stat(program)
    except OSError as err:
        raise VTorqueError(
            f"cannot use the batch system's {program}: {err.strerror}", code=Code.ENGINE, hint=f"set {key}"
        ) from None
    if not os.access(program, os.X_OK):
        raise VTorqueError(f"{program} cannot be executed", code=Code.ENGINE, hint=f"set {key}")
    for own in (f"{install.prefix}/bin/vsub", os.path.realpath(sys.argv[0] or ".")):
        try:
            if os.path.samestat(found, os.stat(own)):
                raise VTorqueError(
                    f"{program} is vsub itself", code=Code.ENGINE, hint=f"{key} must name the batch system's own"
                )
        except OSError:
            continue
    return program


def for_this_host(setting: Union[str, dict[str, str]], key: str) -> str:
    """A setting, or the one of the first pattern that fits this host. Raises VTorqueError (VT-ENGINE)."""
    if isinstance(setting, str):
        return setting
    for pattern, value in setting.items():
        if is_this_host([pattern]):
            return value
    raise VTorqueError(
        f"{key} names no program for the host {host_name()}",
        code=Code.ENGINE,
        hint=f"patterns: {', '.join(setting) or 'none'}",
    )


def is_this_host(patterns: list[str]) -> bool:
    """Whether a pattern fits this host's name, whole or up to the first dot."""
    if not patterns:
        return False
    from fnmatch import fnmatchcase  # most sites have no patterns

    name = host_name()
    return any(fnmatchcase(name, pattern) or fnmatchcase(name.partition(".")[0], pattern) for pattern in patterns)


def host_name() -> str:
    """This host's name."""
    return os.uname().nodename


def shell_status(status: int) -> int:
    """An exit status as a shell gives it, from TORQUE's, which has 256 + n for a job ended by signal n."""
    return 128 + (status - 256) % 128 if status > 255 else status if status >= 0 else 1
