"""What Slurm tells a Prolog and an Epilog, and the job's own processes: all of it stands in their environment.

Observed on Slurm 22.05.8; names from sbatch(1) and the page "Prolog and Epilog Guide". A Prolog has no arguments.
Everything there is Slurm's own word but `SLURM_JOB_COMMENT`, which is the user's, who may change it while the job runs:
it leads to the job directory, as `vtorque:<job directory>`, behind which a comment of the user's own may follow after a
blank.

The first node of the list is the one on which the batch script runs: slurmctld keeps nodes, and lists them, in the
order of their names. What is called the mother superior on TORQUE is that one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Optional

from vmgr.jobspec import SpecPath, parse_job_directory
from vmgr.names import QUEUES, USER, USERS, is_queue
from vmgr.node.hookcall import GroupPath, HookCall, OwnJob
from vmgr.node.nodelist import expand
from vmgr.node.slurmenv import pbs_variables
from vmgr.node.slurmgroups import group_paths

if TYPE_CHECKING:
    from vmgr.node.jobgroup import JobGroup
    from vmgr.node.record import Place

MARK = "vtorque:"
"""What a guest job's comment begins with."""

_NUMBER = re.compile(r"[1-9][0-9]{0,9}")
_COUNT = re.compile(r"[0-9]{1,10}")
_SLUID = re.compile(r"s[0-9A-Z]{13}")
_CLUSTER = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,62}[A-Za-z0-9])?")
_USER = re.compile(USER)

_PASSED = frozenset(
    (
        "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MAX",
        "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_CLUSTER_NAME", "SLURM_JOB_ACCOUNT", "SLURM_JOB_ID",
        "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_QOS", "SLURM_JOB_USER", "SLURM_RESTART_COUNT",
        "SLURM_SUBMIT_DIR", "SLURM_SUBMIT_HOST",
    )
)  # fmt: skip
"""Variables of Slurm's that say something true in the guest too."""


_CONF = re.compile(r"/[ -~]{1,1023}")


def for_commands(environ: Mapping[str, str]) -> dict[str, str]:
    """Where slurmd has its configuration, which is not always where Slurm's commands look for it."""
    conf = environ.get("SLURM_CONF", "")
    return {"SLURM_CONF": conf} if _CONF.fullmatch(conf) else {}


def parse_prologue(argv: Sequence[str], environ: Mapping[str, str]) -> HookCall:
    """The call of a Prolog. Raises ValueError when it is not one."""
    node, cluster = environ.get("SLURMD_NODENAME", ""), _cluster(environ)
    nodes = expand(environ.get("SLURM_NODELIST", ""))
    if node not in nodes:
        raise ValueError(f"this node, {node[:80]!r}, is not in the job's list of nodes")
    partition = environ.get("SLURM_JOB_PARTITION", "")
    if partition and not is_queue(partition):
        raise ValueError(f"{partition[:80]!r} is no partition: allowed are {QUEUES}")
    restarts = _required(environ, "SLURM_JOB_RESTART_COUNT", _COUNT)
    number = _required(environ, "SLURM_JOB_ID", _NUMBER)
    return HookCall(
        job_id=f"{number}.{cluster}",
        user=_user(environ),
        directory=guest_job(environ.get("SLURM_JOB_COMMENT", "")),
        node_index=nodes.index(node),
        queue=partition or None,
        nodes=nodes,
        key=attempt_key(cluster, int(number), int(restarts)),
        tag=number,
        groups=_groups(environ, node, int(number)),
    )


def _groups(environ: Mapping[str, str], node: str, number: int) -> tuple[GroupPath, ...]:
    uid, sluid = environ.get("SLURM_JOB_UID", ""), environ.get("SLURM_JOB_SLUID", "")
    if not _COUNT.fullmatch(uid):
        return ()
    return group_paths(node, int(uid), number, sluid if _SLUID.fullmatch(sluid) else None)


async def guests_group(paths: Sequence[GroupPath], place: Place) -> JobGroup:
    """Slurm makes a job's groups after its Prologs, and takes them away before its Epilogs: guests have their own."""
    from vmgr.node import slurmgroups

    return await slurmgroups.guests_group(paths, place, os.environ)


def parse_epilogue(argv: Sequence[str], environ: Mapping[str, str]) -> HookCall:
    """The call of an Epilog, which needs the job's id and user only. Raises ValueError when it is not one.

    Only its record tells a guest job here, never the comment, which its user may have changed to that of one: a node's
    Epilog waits for its Prolog, so there is a record before it, or there will be none.
    """
    return HookCall(
        job_id=_job_id(environ),
        user=_user(environ),
        directory=None,
        node_index=0,
        queue=None,
    )


def leader() -> int:
    """The process whose start is that of the hook: it leads a group of processes, in slurmd's own session."""
    return os.getpgrp()


def own_job(environ: Mapping[str, str]) -> OwnJob:
    """The job that the calling process belongs to. Raises ValueError where there is none.

    A job that is ended by a signal may be one that is queued again: a node of it was lost, or it was preempted.
    """
    index = environ.get("SLURM_ARRAY_TASK_ID", "")
    member = int(index) if _COUNT.fullmatch(index) else None
    leads = environ.get("SLURM_PROCID", "0") == "0"
    return OwnJob(_job_id(environ), member, may_come_back=True, leads=leads, marked=_for_commands(environ, member))


def _for_commands(environ: Mapping[str, str], member: Optional[int]) -> str:
    """The job alone, as Slurm's commands take it: the last member of an array to start has the number of the array."""
    if member is None:
        return _required(environ, "SLURM_JOB_ID", _NUMBER)
    return f"{_required(environ, 'SLURM_ARRAY_JOB_ID', _NUMBER)}_{member}"


def passed(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that a job has in its guest too, and those of TORQUE's.

    What tells of the allocation on the nodes goes: an MPI in the guest would start its processes there, by `srun`.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if name in _PASSED or not name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SBATCH_"))
    }
    return {**kept, **pbs_variables(environ)}


def guest_job(comment: str) -> Optional[SpecPath]:
    """The job directory that a job's comment names, None for a job without guests."""
    if not comment.startswith(MARK):
        return None
    return parse_job_directory(re.split(r"\s", comment[len(MARK) :], maxsplit=1)[0])


def own_comment(comment: str) -> Optional[str]:
    """The user's own part of a guest job's comment, which may be empty; None for a comment that is the user's whole."""
    if guest_job(comment) is None:
        return None
    return next(iter(re.split(r"\s", comment, maxsplit=1)[1:]), "")


def attempt_key(cluster: str, number: int, restarts: int) -> str:
    """What names an attempt of a job alike on all of its nodes: 16 hexadecimal digits."""
    import hashlib  # few hooks need it

    return hashlib.sha256(f"slurm {cluster} {number} {restarts}".encode()).hexdigest()[:16]


def _job_id(environ: Mapping[str, str]) -> str:
    return f"{_required(environ, 'SLURM_JOB_ID', _NUMBER)}.{_cluster(environ)}"


def _cluster(environ: Mapping[str, str]) -> str:
    return _required(environ, "SLURM_CLUSTER_NAME", _CLUSTER)


def _user(environ: Mapping[str, str]) -> str:
    try:
        return _required(environ, "SLURM_JOB_USER", _USER)
    except ValueError as err:
        raise ValueError(f"{err}: allowed are {USERS}") from None


def _required(environ: Mapping[str, str], name: str, pattern: re.Pattern[str]) -> str:
    value = environ.get(name, "")
    if not pattern.fullmatch(value):
        raise ValueError(f"{name} is {value[:80]!r}")
    return value
