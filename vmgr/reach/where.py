"""Which nodes the site has and which a job runs on, by the batch system's word.

What it says is where to look for guests: what is there the node agents say.
"""

from __future__ import annotations

import os
import pwd
from typing import Any, NamedTuple

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.reach import batch


class JobNodes(NamedTuple):
    """A job that has nodes: its whole id, its owner's name, its nodes with the mother superior first."""

    job_id: str
    owner: str
    nodes: tuple[str, ...]


def all_nodes(config: Config) -> list[str]:
    """Every node of the batch system. Raises VTorqueError (VT-ENGINE)."""
    answer = _ask(config, "nodes")
    return [name for name in answer if isinstance(name, str)]


def whole_id(config: Config, job: str) -> str:
    """The whole id of the one job that is named so, also of one that the batch system has forgotten.

    Raises VTorqueError: VT-ENGINE, VT-VALUE for an array whose members have ids of their own.
    """
    if "." in job and not by_index(config, job):
        return job
    whole = batch.ask(config, "whole", job)
    if not isinstance(whole, str):
        raise batch.senseless()
    return whole


def server(config: Config) -> str:
    """The name in the ids of jobs, `12.NAME`. Raises VTorqueError (VT-ENGINE)."""
    name = batch.ask(config, "server")
    if not isinstance(name, str):
        raise batch.senseless()
    return name


def meant(config: Config, job: str) -> str:
    """The job that a user names, as it is known here: where members of arrays have ids of their own, by its whole id.

    Elsewhere it is what the user says, as is a job that nothing is known of. Raises VTorqueError as `whole_id` for an
    array, and for what is named by its index there.
    """
    if not batch.numbers_members(config) or ("." in job and not by_index(config, job)):
        return job
    try:
        return whole_id(config, job)
    except VTorqueError as err:
        if err.code is Code.VALUE or by_index(config, job):
            raise
        return job


def by_index(config: Config, job: str) -> bool:
    """Whether a member of an array is named by its index, which is no part of its id."""
    return batch.numbers_members(config) and not job.partition(".")[0].isdigit()


def nodes_of_job(config: Config, job_id: str) -> JobNodes:
    """Where a job runs, which may be named as the batch system takes it (`12`, `12.server`).

    Raises VTorqueError: VT-ENGINE, VT-ACCESS for another user's job, VT-AGENT when the job runs nowhere, VT-VALUE when
    several members of an array are meant.
    """
    found = _jobs(_ask(config, "job", job_id))
    if not found:
        raise VTorqueError(
            f"job {job_id} has no nodes",
            code=Code.AGENT,
            hint=f"it waits, has ended, or was never there; see {batch.commands(config).show}",
        )
    _check_owner(found[0])
    if len(found) > 1:
        named = ", ".join(sorted(job.job_id for job in found)[:3])
        raise VTorqueError(
            f"{job_id} is a job array, and {len(found)} of its members have nodes, such as {named}", code=Code.VALUE,
            hint="name one of them",
        )  # fmt: skip
    return found[0]


def running_jobs(config: Config) -> list[JobNodes]:
    """The jobs that have nodes: all for root, one's own for a user. Raises VTorqueError (VT-ENGINE)."""
    me = None if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    return [job for job in _jobs(_ask(config, "jobs")) if me in (None, job.owner)]


def _check_owner(job: JobNodes) -> None:
    if os.geteuid() != 0 and job.owner != pwd.getpwuid(os.geteuid()).pw_name:
        raise VTorqueError(f"job {job.job_id} is another user's", code=Code.ACCESS)


def _jobs(answer: list[Any]) -> list[JobNodes]:
    """The jobs in an answer. Raises VTorqueError (VT-ENGINE) for what is none."""
    try:
        return [JobNodes(str(each["job"]), str(each["owner"]), tuple(map(str, each["nodes"]))) for each in answer]
    except (TypeError, KeyError):
        raise batch.senseless() from None


def _ask(config: Config, *words: str) -> list[Any]:
    answer = batch.ask(config, *words)
    if not isinstance(answer, list):
        raise batch.senseless()
    return answer
