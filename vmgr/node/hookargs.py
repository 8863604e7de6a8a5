"""What a TORQUE hook is told: the only module outside the engines that knows TORQUE's arguments.

Positions are those observed on TORQUE 6.1.3: prologues get job id, user, group, job name, resource list, queue,
account, script path; epilogues get job id, user, group, job name, session, requested, used, queue, account, exit
status, script path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Optional

from vmgr.jobspec import SpecPath, parse_job_directory
from vmgr.names import QUEUES, USER, USERS, is_queue
from vmgr.node.hookcall import GroupPath, HookCall, OwnJob

if TYPE_CHECKING:
    from vmgr.node.jobgroup import JobGroup
    from vmgr.node.record import Place

_JOB_ID = re.compile(r"[0-9]{1,20}(?:\[[0-9]{0,10}\]|-[0-9]{1,10})?\.[A-Za-z0-9][A-Za-z0-9.-]{0,254}")
_USER = re.compile(USER)
_MEMBER = r"[0-9]{1,20}(?:\[([0-9]{1,10})\]|-([0-9]{1,10}))\."  # not compiled for hooks, which do without


def parse_prologue(argv: Sequence[str], environ: Mapping[str, str]) -> HookCall:
    """The call of a `prologue` or `prologue.parallel`. Raises ValueError when it is not one."""
    if len(argv) < 5:
        raise ValueError(f"a prologue has 8 arguments, not {len(argv)}")
    queue = argv[5] if len(argv) > 5 else ""
    if queue and not is_queue(queue):
        raise ValueError(f"{queue[:80]!r} is no queue: allowed are {QUEUES}")
    script = argv[7] if len(argv) > 7 else ""
    return _call(argv, environ, resources=argv[4], queue=queue)._replace(
        task_file=f"{script[:-3]}.JB" if script.startswith("/") and script.endswith(".SC") else None,
        node_file=environ.get("PBS_NODEFILE") or None,
        groups=(GroupPath("torque", argv[0]),),
    )


def parse_epilogue(argv: Sequence[str], environ: Mapping[str, str]) -> HookCall:
    """The call of an `epilogue` or `epilogue.parallel`. Raises ValueError when it is not one.

    A strange queue is none: it ends a job all the same.
    """
    if len(argv) < 6:
        raise ValueError(f"an epilogue has 11 arguments, not {len(argv)}")
    queue = argv[7] if len(argv) > 7 and is_queue(argv[7]) else ""
    return _call(argv, environ, resources=argv[5], queue=queue)


def guest_job(resources: str) -> Optional[SpecPath]:
    """The job directory named by a resource list, None for a job without guests.

    `vsub` writes `prologue=<job directory>/prologue` as the first item, because items that no longer fit are
    dropped in the order of submission; the batch system may put its own items before it.
    """
    for item in resources.split(","):
        key, _, value = item.partition("=")
        if key == "prologue":
            directory, _, name = value.rpartition("/")
            return parse_job_directory(directory) if name == "prologue" else None
    return None


def place_name(job_id: str) -> str:
    """A short name for a job's folders, unique to it: the id itself unless that is too long for a socket's path."""
    if len(job_id) <= 32:
        return job_id
    import hashlib  # costs a hook time that few ids need

    return f"{job_id.partition('.')[0][:12]}.{hashlib.sha256(job_id.encode()).hexdigest()[:16]}"


def leader() -> int:
    """The process whose start is that of the hook: it leads a session."""
    return os.getsid(0)


def for_commands(environ: Mapping[str, str]) -> dict[str, str]:
    """The commands of TORQUE's find their server by its configuration alone."""
    return {}


async def guests_group(paths: Sequence[GroupPath], place: Place) -> JobGroup:
    """TORQUE makes `torque/<job id>` in each hierarchy of control groups before the prologue of the node runs.

    It removes them after the epilogue, with all that is still in them (`trq_cgroups.c` of 6.1; older ones with cpusets
    have them in the file system of cpusets, `/dev/cpuset`: `cpuset.c`).
    """
    from vmgr.node.jobgroup import find_group  # not for hooks

    return find_group(paths)


def own_job(environ: Mapping[str, str]) -> OwnJob:
    """The job that the calling process belongs to; one without an id where it belongs to none."""
    job_id = environ.get("PBS_JOBID", "")
    return OwnJob(job_id, member_index(job_id))


def passed(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that a job has in its guest too."""
    return dict(environ)


def member_index(job_id: str) -> Optional[int]:
    """The index of a member of a job array, None for any other job."""
    match = re.match(_MEMBER, job_id)
    return int(match[1] or match[2]) if match else None


def _call(argv: Sequence[str], environ: Mapping[str, str], *, resources: str, queue: str) -> HookCall:
    job_id, user = argv[0], argv[1]
    if not _JOB_ID.fullmatch(job_id) or ".." in job_id:
        raise ValueError(f"{job_id[:80]!r} is no job id")
    if not _USER.fullmatch(user):
        raise ValueError(f"{user[:80]!r} is no user name: allowed are {USERS}")
    index, member = environ.get("PBS_NODENUM", "0"), member_index(job_id)
    return HookCall(
        job_id=job_id,
        user=user,
        directory=guest_job(resources),
        node_index=int(index) if index.isdigit() and len(index) < 9 else 0,
        queue=queue or None,
        tag=None if member is None else str(member),
    )
