"""What a hook is called with: files, arguments, environment and checks, as TORQUE's moms have them.

Sources: resmom/prolog.c (run_pelog, check_pelog_permissions, setup environment) of TORQUE 6.1, observed
behaviour.
"""

from __future__ import annotations

import enum
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from vsub.engines.local import resources
from vsub.engines.local.job import Job
from vsub.engines.local.machine import Machine
from vsub.engines.local.process import complain

LANG = "C.UTF-8"
PATH = "/bin:/usr/bin"

BAD_HOOK = 255
"""Status of a hook that is there but may not be run: not 0 and not 1, so a prologue's job is requeued."""


class Kind(enum.Enum):
    """Whose a hook is, which decides who must own it and with whose rights it runs."""

    ROOT = "root"
    SITE_USER = "user"  # the site's, run as the job's user
    JOB_USER = "job"  # named by the job, -l prologue= or -l epilogue=


class Hook(NamedTuple):
    """One file to run around a job."""

    kind: Kind
    path: str
    instead: str = ""
    """A file that counts when it is there: what `qsub -T` asks for."""

    @classmethod
    def of(cls, kind: Kind, path: str, job: Job) -> Hook:
        """The hook at `path`, or the one beside it that the type of the job names."""
        return cls(kind, path, f"{path}.{job.asked.job_type}" if job.asked.job_type else "")

    def find(self) -> str:
        """The file to run. For a hook that a job names: call it with the user's rights, in a child."""
        return self.instead if self.instead and os.path.exists(self.instead) else self.path  # noqa: PTH110

    def check(self, path: str, uid: int) -> Optional[int]:
        """None when `path` may run as far as its file goes, 0 when there is none, else BAD_HOOK.

        For a hook that a job names this follows links of the user's: call it with the user's rights, in a
        child.
        """
        try:
            seen = os.stat(path)
        except FileNotFoundError:
            return 0
        except OSError as error:
            return _refuse(path, error.strerror or "cannot stat")
        owner = uid if self.kind is Kind.JOB_USER else 0
        if not stat.S_ISREG(seen.st_mode):
            return _refuse(path, "not a regular file")
        if seen.st_uid != owner:
            return _refuse(path, f"belongs to uid {seen.st_uid} instead of {owner}")
        if seen.st_mode & 0o022 or seen.st_mode & 0o500 != 0o500:
            return _refuse(path, f"mode {stat.S_IMODE(seen.st_mode):04o}: others may write or owner cannot run it")
        if self.kind is Kind.SITE_USER and seen.st_mode & 0o005 != 0o005:
            return _refuse(path, f"mode {stat.S_IMODE(seen.st_mode):04o}: users cannot run it")
        return None


def _refuse(path: str, why: str) -> int:
    complain(f"PBS: prolog/epilog failed, file: {path}, permission Error: {why}\n")
    return BAD_HOOK


def prologues(folder: Path, job: Job) -> list[Hook]:
    """The mother superior's prologues in their order."""
    hooks = [Hook.of(Kind.ROOT, f"{folder}/prologue", job), Hook.of(Kind.SITE_USER, f"{folder}/prologue.user", job)]
    own = job.resource("prologue")
    return [*hooks, Hook.of(Kind.JOB_USER, own, job)] if own else hooks


def epilogues(folder: Path, job: Job) -> list[Hook]:
    """The mother superior's epilogues in their order."""
    hooks = [Hook.of(Kind.SITE_USER, f"{folder}/epilogue.user", job), Hook.of(Kind.ROOT, f"{folder}/epilogue", job)]
    own = job.resource("epilogue")
    return [Hook.of(Kind.JOB_USER, own, job), *hooks] if own else hooks


def sister_prologues(folder: Path, job: Job) -> list[Hook]:
    """A sister's prologues in their order."""
    root, user = f"{folder}/prologue.parallel", f"{folder}/prologue.user.parallel"
    return [Hook.of(Kind.ROOT, root, job), Hook.of(Kind.SITE_USER, user, job)]


def sister_epilogues(folder: Path, job: Job) -> list[Hook]:
    """A sister's epilogues in their order."""
    user, root = f"{folder}/epilogue.user.parallel", f"{folder}/epilogue.parallel"
    return [Hook.of(Kind.SITE_USER, user, job), Hook.of(Kind.ROOT, root, job)]


def precancel(folder: Path, job: Job) -> Hook:
    """What runs before a deleted job is signalled."""
    return Hook.of(Kind.SITE_USER, f"{folder}/epilogue.precancel", job)


def _script(machine: Machine, job: Job) -> str:
    return os.fspath(machine.layout.jobs / f"{job.prefix}.SC")


def prologue_arguments(machine: Machine, job: Job) -> tuple[str, ...]:
    """Arguments 1 to 8 of a prologue."""
    asked = job.asked
    requested = resources.bounded(job.resource_list())
    who = (job.id, job.owner.name, job.owner.group, job.name)
    return (*who, requested, asked.queue, asked.account, _script(machine, job))


def epilogue_arguments(machine: Machine, job: Job, *, sister: bool = False) -> tuple[str, ...]:
    """Arguments 1 to 11 of an epilogue. A sister knows no session."""
    asked = job.asked
    requested, used = resources.bounded(job.resource_list()), resources.bounded(list(job.used.items()))
    who = (job.id, job.owner.name, job.owner.group, job.name, "0" if sister else str(job.session))
    how = (str(job.exit_status or 0), _script(machine, job))
    return (*who, requested, used, asked.queue, asked.account, *how)


def node_file(machine: Machine, job: Job) -> Path:
    """The job's PBS_NODEFILE."""
    return machine.layout.aux / job.id


def environment(machines: Sequence[Machine], index: int, job: Job) -> dict[str, str]:
    """The complete environment of a hook on a node of the job; number 0 is the mother superior."""
    nodes = job.node_request
    variables = {
        "PATH": PATH,
        "LANG": LANG,
        "PBS_RESOURCE_NODES": job.resource("nodes") or "1",
        "PBS_NUM_NODES": str(nodes.nodes),
        "PBS_NUM_PPN": str(nodes.ppn),
        "PBS_NP": str(job.processors),
        "PBS_NODENUM": str(index),
        "PBS_MSHOST": machines[0].name,
        "PBS_O_WORKDIR": job.asked.work_dir,
    }
    if index == 0:
        variables["PBS_NODEFILE"] = os.fspath(node_file(machines[0], job))
    return variables


def job_environment(machine: Machine, job: Job, server: str) -> dict[str, str]:
    """The environment of the job's script: the user's variables, with what TORQUE computes on top."""
    asked, owner, nodes = job.asked, job.owner, job.node_request
    variables = {"PATH": PATH, "LANG": LANG, "MAIL": f"/var/mail/{owner.name}", **job.variables}
    variables.update(
        HOME=owner.home,
        LOGNAME=owner.name,
        USER=owner.name,
        SHELL=asked.shell or owner.shell,
        PBS_JOBCOOKIE=job.cookie,
        PBS_JOBID=job.id,
        PBS_JOBNAME=job.name,
        PBS_MOMPORT="15003",
        PBS_NODEFILE=os.fspath(node_file(machine, job)),
        PBS_NODENUM="0",
        PBS_NP=str(job.processors),
        PBS_NUM_NODES=str(nodes.nodes),
        PBS_NUM_PPN=str(nodes.ppn),
        PBS_O_QUEUE=asked.queue,
        PBS_O_SERVER=server,
        PBS_O_WORKDIR=asked.work_dir,
        PBS_QUEUE=asked.queue,
        PBS_SERVER=server,
        PBS_TASKNUM="1",
        PBS_VERSION="TORQUE-6.1-vtorque-local",
        PBS_VNODENUM="0",
    )
    if asked.terminal is not None:
        variables.update(PBS_ENVIRONMENT="PBS_INTERACTIVE", TERM=asked.terminal.term)
    else:
        variables.update(PBS_ENVIRONMENT="PBS_BATCH", ENVIRONMENT="BATCH")
    if asked.init_dir is not None:
        variables["PBS_O_INITDIR"] = asked.init_dir
    walltime = job.resource("walltime")
    if walltime is not None:
        variables["PBS_WALLTIME"] = str(resources.seconds(walltime))
    return variables
