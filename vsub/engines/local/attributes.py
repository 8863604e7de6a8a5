"""What clients are shown of jobs and arrays: their ids, and the attributes of `qstat -f`."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Optional

from vsub.engines.local import depend
from vsub.engines.local.arrays import Array
from vsub.engines.local.depend import Dependency
from vsub.engines.local.job import Job
from vsub.engines.local.submission import Account, Submission

Attributes = list[tuple[str, str]]


def full_id(text: str, server: str) -> Optional[str]:
    """The whole id for what a user typed, `5`, `5.host`, `5[3]` or `5[].host`; None when it is no id."""
    match = re.fullmatch(r"(\d{1,15})(?:\[(\d{0,5})\])?(?:\.[A-Za-z0-9._-]{1,255})?", text, re.ASCII)
    if match is None:
        return None
    short = server.partition(".")[0]
    given = text.partition(".")[2]
    if given not in ("", server, short):
        return text
    index = "" if match[2] is None else f"[{int(match[2]) if match[2] else ''}]"
    return f"{int(match[1])}{index}.{server}"


def _target(path: str, job: Job, stream: str) -> str:
    """Where an output file is to go; a member of an array adds its index to a name that was given."""
    if path.endswith("/"):
        return path + job.output_name(stream)
    return path if job.index is None else f"{path}-{job.index}"


def _requests(asked: Submission, array: Optional[str], variables: Mapping[str, str]) -> Attributes:
    """What jobs and arrays show alike of what was asked for."""
    return [
        ("Priority", str(asked.priority)),
        ("Rerunable", str(asked.rerunnable)),
        ("Execution_Time", "" if asked.execute_at is None else time.ctime(asked.execute_at)),
        ("jobtype", asked.job_type),
        ("job_array_request", array or ""),
        ("Shell_Path_List", asked.shell or ""),
        ("Variable_List", ",".join(f"{name}={value}" for name, value in variables.items())),
    ]


def _holds(held: bool, depends: Sequence[Dependency]) -> Attributes:
    types = ("s" if depends else "") + ("u" if held else "")
    return [("Hold_Types", types or "n"), ("depend", depend.shown(depends))]


def _head(name: str, owner: Account, host: str) -> Attributes:
    return [("Job_Name", name), ("Job_Owner", f"{owner.name}@{host}")]


def _tail(owner: Account, asked: Submission) -> Attributes:
    return [("euser", owner.name), ("egroup", owner.group), ("umask", f"{asked.umask:04o}")]


def _status(exit_status: Optional[int], comment: str) -> Attributes:
    return [("exit_status", "" if exit_status is None else str(exit_status)), ("comment", comment)]


def _streams(job: Job, host: str) -> Attributes:
    if job.asked.interactive:
        return [("interactive", "True"), ("inter_cmd", job.asked.command or "")]
    return [
        ("Error_Path", f"{host}:{_target(job.asked.error, job, 'e')}"),
        ("Output_Path", f"{host}:{_target(job.asked.output, job, 'o')}"),
    ]


def of_job(job: Job, server: str, host: str) -> Attributes:
    """What `qstat -f` shows of a job."""
    asked = job.asked
    shown = [
        *_head(job.name, job.owner, host),
        *((f"resources_used.{name}", value) for name, value in job.used.items()),
        ("job_state", job.letter),
        ("queue", asked.queue),
        ("server", server),
        ("Account_Name", asked.account),
        ("ctime", time.ctime(job.created)),
        ("exec_host", job.exec_host),
        *_holds(job.held, job.depends),
        ("Join_Path", asked.join),
        ("Keep_Files", asked.keep),
        *_streams(job, host),
        *((f"Resource_List.{name}", value) for name, value in job.resource_list() if name != "neednodes"),
        ("session_id", str(job.session or "")),
        *_requests(asked, None, job.variables),
        ("job_array_id", "" if job.index is None else str(job.index)),
        *_tail(job.owner, asked),
        ("start_count", str(job.attempts or "")),
        ("start_time", time.ctime(job.started) if job.started else ""),
        *_status(job.exit_status, job.reason),
        ("init_work_dir", asked.work_dir),
        ("comp_time", time.ctime(job.completed) if job.completed else ""),
    ]
    return [(name, value) for name, value in shown if value]


def of_array(array: Array, server: str, host: str) -> Attributes:
    """What `qstat -f` shows of an array as a whole."""
    asked = array.asked
    shown = [
        *_head(asked.name, array.owner, host),
        ("job_state", array.letter),
        ("queue", asked.queue),
        ("server", server),
        ("Account_Name", asked.account),
        ("ctime", time.ctime(array.created)),
        *_holds(array.held, array.depends),
        ("Error_Path", f"{host}:{asked.error}"),
        ("Output_Path", f"{host}:{asked.output}"),
        *((f"Resource_List.{name}", value) for name, value in asked.resources),
        *_requests(asked, asked.array, asked.variables),
        *_tail(array.owner, asked),
        *_status(array.exit_status, array.reason),
        ("init_work_dir", asked.work_dir),
    ]
    return [(name, value) for name, value in shown if value]
