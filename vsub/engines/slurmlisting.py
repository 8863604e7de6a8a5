"""What Slurm says of its nodes and jobs, read strictly.

Only fields are asked for that hold no text of a user's: ids, states, names of users and nodes. Forms: squeue(1),
sinfo(1), scontrol(1) of Slurm 22.05, and seen on 23.11 to 26.05 too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.names import USER
from vmgr.node.allocation import MAX_NODES
from vmgr.node.nodelist import expand
from vsub.engines import JobState, PlacedJob

STATE_FIELDS = "JobID:32,State:32,exit_code:16,Reason:64"
PLACED_FORM = "%A|%u|%N"
PLACED_STATES = "RUNNING,COMPLETING,SUSPENDED,CONFIGURING,STOPPED,RESIZING,SIGNALING,STAGE_OUT"
MEMBERS_FORM = "%A|%F|%K"
MAX_JOBS = 100_000
_MANY = 3
"""So many members of an array are named."""

_HELD = ("JobHeld", "JobHoldMaxRequeue", "job requeued in held state")
"""How the reason of a job that is held begins; the last is of `scontrol requeuehold`."""
_PHASES = {
    "RUNNING": "running", "CONFIGURING": "running", "SUSPENDED": "running", "STOPPED": "running", "RESIZING": "running",
    "SIGNALING": "running", "STAGE_OUT": "exiting", "COMPLETING": "exiting", "PENDING": "queued", "REQUEUED": "queued",
    "REQUEUE_FED": "queued", "EXPEDITING": "queued", "REQUEUE_HOLD": "held", "SPECIAL_EXIT": "held",
    "RESV_DEL_HOLD": "held", "COMPLETED": "completed", "FAILED": "completed", "CANCELLED": "completed",
    "TIMEOUT": "completed", "NODE_FAIL": "completed", "PREEMPTED": "completed", "BOOT_FAIL": "completed",
    "DEADLINE": "completed", "OUT_OF_MEMORY": "completed", "REVOKED": "completed",
}  # fmt: skip
_WAITS = ("BeginTime", "Dependency")
_STATUS = re.compile(r"([0-9]{1,9})(?::([0-9]{1,3}))?")


class Member(NamedTuple):
    """A job by its own number; `place` is its index in the array of the number `array`, None outside of arrays."""

    number: str
    array: str
    place: Optional[str]

    @property
    def name(self) -> str:
        """As Slurm's commands take it alone."""
        return self.number if self.place is None else f"{self.array}_{self.place}"


def parse_members(text: str) -> tuple[Member, ...]:
    """The jobs in the answer of `squeue -r -o` with MEMBERS_FORM. What is strange is left out."""
    found = []
    for line in text.splitlines()[:MAX_JOBS]:
        match = re.fullmatch(r"([0-9]{1,20})\|([0-9]{1,20})\|(?:([0-9]{1,10})|N/A)", line.strip())
        if match:
            found.append(Member(match[1], match[2], match[3]))
    return tuple(found)


def one_of(members: Sequence[Member], job: str) -> Optional[Member]:
    """The one job that is meant by `job`, None where Slurm knows none. Raises VTorqueError (VT-VALUE) for several."""
    if len(members) < 2:
        return members[0] if members else None
    named = ", ".join(each.name for each in members[:_MANY])
    raise VTorqueError(
        f"job {job} is a job array with the members {named}{', ...' if len(members) > _MANY else ''}", code=Code.VALUE,
        hint="name one of them",
    )  # fmt: skip


def parse_state(text: str) -> JobState:
    """The state in the answer of `squeue -O` with STATE_FIELDS; phase `unknown` when it has none.

    An array has a line for each member that was started, and one for all the others: it has ended when all have.
    """
    found = [state for state in map(_state, text.splitlines()) if state is not None]
    going = [state for state in found if not state.ended]
    return (going or found or [JobState("unknown")])[0]


def _state(line: str) -> Optional[JobState]:
    words = line.split()
    if len(words) < 3 or not words[0].isdigit():
        return None
    phase = _PHASES.get(words[1], "unknown")
    reason = " ".join(words[3:])
    if phase == "queued" and reason.startswith(_HELD):
        phase = "held"
    elif phase == "queued" and reason in _WAITS:
        phase = "waiting"
    ended = phase == "completed"
    return JobState(phase, _exit_status(words[1], words[2]) if ended else None)


def _exit_status(state: str, text: str) -> Optional[int]:
    """The status as a shell gives it; None where a job was ended and the status tells nothing.

    Slurm 22.05 gives that of wait(2), newer ones `STATUS:SIGNAL`.
    """
    match = _STATUS.fullmatch(text)
    if match is None:
        return None
    status, signal = int(match[1]), int(match[2] or 0)
    if match[2] is None:
        status, signal = status >> 8 & 255, status & 127
    if status == signal == 0:
        return 0 if state == "COMPLETED" else None
    return 128 + (signal & 127) if signal else status & 255


def is_held(text: str) -> bool:
    """Whether a job's user holds it, from the same answer."""
    return "JobHeldUser" in _reasons(text)


def is_on_hold(text: str) -> bool:
    """Whether anybody holds the job."""
    return any(reason.startswith(_HELD) for reason in _reasons(text))


def _reasons(text: str) -> list[str]:
    return [" ".join(words[3:]) for words in map(str.split, text.splitlines())]


def runs(text: str) -> bool:
    """Whether the job, or a member of the array, has nodes."""
    found = [state for state in map(_state, text.splitlines()) if state is not None]
    return any(state.phase in ("running", "exiting") for state in found)


def parse_placed(text: str, cluster: str) -> tuple[PlacedJob, ...]:
    """The jobs in the answer of `squeue -o` with PLACED_FORM. What is strange is left out."""
    jobs = []
    for line in text.splitlines()[:MAX_JOBS]:
        fields = line.strip().split("|")
        if len(fields) != 3 or not re.fullmatch(r"[0-9]{1,20}", fields[0]) or not re.fullmatch(USER, fields[1]):
            continue
        nodes = _expanded(fields[2])
        if nodes:
            jobs.append(PlacedJob(f"{fields[0]}.{cluster}", fields[1], nodes))
    return tuple(jobs)


def parse_nodes(text: str) -> tuple[str, ...]:
    """The nodes in the answer of `sinfo -h -N -o %N`, each once: a node has a line for each of its partitions."""
    found: dict[str, None] = {}
    for line in text.splitlines():
        for node in _expanded(line.strip()):
            if len(found) < MAX_NODES:
                found[node] = None
    return tuple(found)


def _expanded(text: str) -> tuple[str, ...]:
    try:
        return expand(text)
    except ValueError:
        return ()


def parse_cluster(text: str) -> str:
    """The cluster's name in the answer of `scontrol show config`. Raises VTorqueError (VT-ENGINE) for none."""
    match = re.search(r"^ClusterName\s*=\s*(\S{1,255})\s*$", text, re.MULTILINE)
    if match is None:
        raise VTorqueError("Slurm does not say its cluster's name", code=Code.ENGINE, hint="see scontrol show config")
    return match[1]


def parse_version(text: str) -> tuple[int, int]:
    """Slurm's version in the answer of `--version`. Raises VTorqueError (VT-ENGINE) for none."""
    match = re.search(r"\b([0-9]{2})\.([0-9]{2})(?:\.|\b)", text)
    if match is None:
        raise VTorqueError("Slurm does not say its version", code=Code.ENGINE, hint="see sbatch --version")
    return int(match[1]), int(match[2])


def slurm_id(job_id: str) -> str:
    """A job as Slurm's programs take it, from how vTorque or a user names it: `12`, `12_3`, `12[3]`, `12.cluster`.

    Raises VTorqueError (VT-VALUE).
    """
    match = re.fullmatch(r"([0-9]{1,20})(?:\[([0-9]{1,10})\]|[_-]([0-9]{1,10}))?(?:\.[A-Za-z0-9._-]{1,255})?", job_id)
    if match is None:
        raise VTorqueError(f"{job_id[:80]!r} is no job", code=Code.VALUE, hint="such as 12 or 12_3")
    index = match[2] or match[3]
    return match[1] if index is None else f"{match[1]}_{index}"
