"""Asking the batch system, and having it hold, release or requeue a job, as the caller.

That is done by a program of the `vsub` side, which knows the engines.
"""

from __future__ import annotations

import json
import subprocess
from typing import NamedTuple

from vmgr.config import Config
from vmgr.errors import Code, Unanswered, VTorqueError
from vmgr.paths import installation

PROGRAM = "vtorque-batch"
MORE_SECONDS = 5.0
"""What the program may take beside the batch system's answers, of which it may need two."""
MAX_ANSWER_BYTES = 64 << 20


class Commands(NamedTuple):
    """The batch system's commands that show jobs, delete one, and release one, for messages."""

    show: str
    delete: str
    release: str


_COMMANDS = {"slurm": Commands("squeue", "scancel", "scontrol release")}


_NUMBERING = frozenset({"slurm"})


def numbers_members(config: Config) -> bool:
    """Whether each member of a job array has a number of its own, beside that of the array and its index."""
    return config.engine in _NUMBERING


def commands(config: Config) -> Commands:
    """Those of the site's batch system."""
    return _COMMANDS.get(config.engine, Commands("qstat", "qdel", "qrls"))


def hold(config: Config, job_id: str) -> bool:
    """Keep a job from starting again; whether its user had not held it before.

    Raises VTorqueError: VT-ACCESS for a caller who may not, VT-ENGINE with what else the batch system says, Unanswered
    where it does not say in time what has become of it.
    """
    answer = ask(config, "hold", job_id)
    if not isinstance(answer, dict) or not isinstance(answer.get("new"), bool):
        raise senseless()
    return bool(answer["new"])


def release(config: Config, job_id: str) -> None:
    """Let a job start that its user holds. Raises VTorqueError as `hold`, also when nothing holds it."""
    ask(config, "release", job_id)


def requeue(config: Config, job_id: str) -> None:
    """End a running job and queue it again, which needs an operator. Raises VTorqueError as `hold`."""
    ask(config, "requeue", job_id)


def give_back(config: Config, job: str) -> None:
    """Have what leads to the job directory taken out of what the user has said of the job, which goes on until its end.

    The batch system gets a few seconds for it. Raises VTorqueError as `hold`.
    """
    ask(config, "give-back", job)


def is_gone(config: Config, job_id: str) -> bool:
    """Whether the batch system surely does not know a job any more, which was one of its own.

    Raises VTorqueError (VT-ENGINE).
    """
    return ask(config, "server") == job_id.partition(".")[2] and ask(config, "phase", job_id) == "gone"


def ask(config: Config, *words: str) -> object:
    """What the program answers to these words. Raises VTorqueError with its code, Unanswered for no answer in time."""
    limit = 2 * config.timeouts.reach + MORE_SECONDS
    program = installation().program(PROGRAM)
    try:
        done = subprocess.run([program, *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise Unanswered(f"the batch system has not answered within {limit:g} s", code=Code.ENGINE) from None
    except OSError as err:
        raise VTorqueError(f"cannot run {program}: {err.strerror}", code=Code.ENGINE, hint="install again") from None
    try:
        said = json.loads(done.stdout[:MAX_ANSWER_BYTES])
    except (ValueError, RecursionError):
        said = None
    if done.returncode:
        raise _failure(done.stderr, said)
    if said is None:
        raise senseless()
    return said


def _failure(printed: bytes, said: object) -> VTorqueError:
    err = refusal(printed)
    if not isinstance(said, dict) or said.get("answered") is not False:
        return err
    unanswered = Unanswered(err.message, code=err.code, hint=err.hint)
    unanswered.is_new = said.get("new") if isinstance(said.get("new"), bool) else None
    return unanswered


def refusal(said: bytes) -> VTorqueError:
    """The failure in the one line that the program has printed, or what else it has said."""
    lines = said[-4096:].decode(errors="replace").strip().splitlines() or ["it says nothing"]
    code, colon, text = lines[-1].partition(": ")
    known = Code.named(code) if colon else Code.INTERNAL
    if known is Code.INTERNAL:
        return VTorqueError(f"the batch system cannot be asked: {lines[-1]}", code=Code.ENGINE)
    return VTorqueError(text, code=known)


def senseless() -> VTorqueError:
    """The failure of an answer that is none."""
    return VTorqueError(f"{PROGRAM} gives no sensible answer", code=Code.ENGINE, hint="install again")
