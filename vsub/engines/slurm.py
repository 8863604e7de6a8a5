"""Slurm: submission by `sbatch`, sessions by `srun --pty`; what jobs do from `squeue` and `scontrol`.

The request may be in the language of qsub, in that of sbatch (behind `--slurm`, in `#SBATCH` lines, in `SBATCH_…`
variables), or in both. They are gone through in this order, and of two that say the same the last one counts: `#PBS`
lines, `#SBATCH` lines, variables, the command line, what stands behind `--slurm`.

Facts, seen on Slurm 22.05 to 26.05: the comment of a job reaches its Prolog, up to 1,024 bytes; `sbatch --parsable`
prints the id alone; `scontrol uhold` sets a user's hold, also of a running job, which goes on and is held once it is
queued again.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vsub.attributes import last_value
from vsub.engines import GuestJob, JobState, PlacedJob, Plain, Said, for_this_host, host_name
from vsub.engines.slurmlayout import check_nodelist, comment_option, layout_options
from vsub.engines.slurmoptions import USAGE, ForSbatch, from_environment, parse_sbatch
from vsub.engines.slurmrequest import layout, read_request
from vsub.engines.slurmtranslate import (
    Circumstances,
    Translated,
    Value,
    access_option,
    check_refused,
    for_session,
    output_options,
    translate,
    words,
)
from vsub.options import COMMAND_LINE, Line, Option, last
from vsub.visible import below, submission_directory

if TYPE_CHECKING:
    import pwd
    import socket

    from vsub.engines.slurmlisting import Member
    from vsub.hostrequest import HostRequest
    from vsub.script import Script

_OF_GUESTS = "what the guests need"
_STATE_TIMEOUT_S = 60
_NO_STATUS = -1
"""Slurm's commands end with 1 for every failure: only their words tell that a job is not known."""


class Slurm:
    """One Slurm cluster, reached through its own commands."""

    def __init__(self, config: Config) -> None:
        self._config = config

    @property
    def qsub(self) -> str:
        return self._program("sbatch")

    @property
    def session_qsub(self) -> str:
        return self._program("srun")

    @property
    def qsub_key(self) -> str:
        return "slurm.bin"

    @property
    def commands(self) -> tuple[str, str]:
        return "squeue -j", "scancel"

    @property
    def usage(self) -> str:
        return USAGE

    def _program(self, name: str) -> str:
        return f"{for_this_host(self._config.slurm_bin, 'slurm.bin').rstrip('/')}/{name}"

    def whole_line(self, line: Line) -> Line:
        """The line with what stands behind `--slurm`: options of sbatch, then the script and its arguments."""
        if line.native is None:
            return line
        native = parse_sbatch(line.native)
        operands, options = native.operands, native.options
        if operands[1:]:
            import shlex  # few scripts have arguments

            options = (*options, Option("F", shlex.join(operands[1:]), COMMAND_LINE))
        return line._replace(
            options=(*line.options, *options),
            operands=(*line.operands, *operands[:1]),
            vm=(*line.vm, *native.vm),
            own=line.own | native.own,
            native=native.rest,
            problem=line.problem or native.problem,
        )

    def whole_directives(self, directives: Line, script: Optional[Script]) -> Line:
        """The `#PBS` lines, then the `#SBATCH` lines, then the user's `SBATCH_…` variables."""
        options = list(directives.options)
        vm, problem = directives.vm, directives.problem
        if script is not None and b"#SBATCH" in script.data:
            from vsub.engines.slurmdirectives import read_sbatch_lines  # scripts for qsub have none

            native = read_sbatch_lines(script.data, script.name, self.takes_blanks)
            options += native.options
            vm, problem = (*vm, *native.vm), problem or native.problem
        options += from_environment(os.environ)
        return directives._replace(options=tuple(options), vm=vm, problem=problem)

    def takes_blanks(self) -> bool:
        """Whether a backslash takes a blank in the `#SBATCH` lines of this cluster. Raises VTorqueError (VT-ENGINE)."""
        from vsub.engines.slurmlisting import parse_version  # few lines have such a blank

        return parse_version(self._ask(["sbatch", "--version"], self._config.timeouts.reach) or "") >= (24, 5)

    def read_host_request(self, options: tuple[Option, ...]) -> HostRequest:
        """What a job asks of its nodes; everything else that it asks of Slurm is checked too."""
        interactive = last_value(options, "I") is not None
        check_refused(options, interactive=interactive)
        if self._config.submit.job_type is not None:
            raise VTorqueError(
                f"submit.job_type ({self._config.origin('submit.job_type')}) has no meaning on Slurm, which calls its "
                "hooks for all jobs",
                code=Code.ENGINE,
                hint="take it out of the configuration",
            )
        around = _around(options)
        found = translate(options, around, "job")
        output_options(options, around, found)
        if interactive:
            for_session(found)
        comment_option("", found)
        return read_request(options)

    def guest_arguments(self, job: GuestJob) -> list[str]:
        """sbatch's options and the wrapper; of a session those of srun, which starts it on every node.

        The one on the first node is the session; the others end at once, and are not waited for.
        """
        found = self._translated(job)
        found = {"comment": comment_option(job.directory, found), **{k: v for k, v in found.items() if k != "comment"}}
        if job.interactive:
            return ["--pty", "--wait=0", "--export=ALL", *words(found), f"{job.directory}/job"]
        return ["--parsable", "--ignore-pbs", "--export=ALL", *words(found), f"{job.directory}/job"]

    def guest_environment(self, job: GuestJob) -> Optional[dict[str, str]]:
        """What the job is to have of the user's environment, and nothing else."""
        from vsub.engines.slurmenvironment import Login, job_environment

        user = _user()
        login = Login(user.pw_name, user.pw_dir, user.pw_shell, _folder(job.options), host_name())
        return job_environment(job.options, os.environ, login, interactive=job.interactive)

    def explain(self, job: GuestJob) -> Optional[tuple[Said, ...]]:
        """sbatch's options, each with the place that it comes from."""
        found = self._translated(job)
        return tuple(
            Said(f"--{name}", "yes" if value.text is None else value.text, value.source)
            for name, value in found.items()
        )

    def _translated(self, job: GuestJob) -> Translated:
        around = _around(job.options)
        found = translate(job.options, around, job.job_name)
        if job.interactive:
            found = for_session(found)
        else:
            found.update(output_options(job.options, around, found))
            if "requeue" not in found and "no-requeue" not in found:
                found["requeue"] = Value(None, "as of qsub")
            if "dependency" in found and not isinstance(found["dependency"].source, ForSbatch):
                found.setdefault("kill-on-invalid-dep", Value("yes", "as of qsub"))
            if job.suspendable and "open-mode" not in found:
                found["open-mode"] = Value("append", "so that a job that goes on keeps its output")
        asked = read_request(job.options)
        lies = layout(asked, job.fitted.nodes, dict(job.fitted.memory), job.options)
        source = _OF_GUESTS if job.fitted.nodes or asked.option is None else asked.option.source
        mem_source = _OF_GUESTS if job.fitted.memory else "; ".join(given.text for given in asked.memory.values())
        check_nodelist(found, lies.nodes)
        found.update(layout_options(lies, found, source, mem_source, one_task=job.interactive))
        origin = self._config.origin("submit.node_access")
        return {**found, **access_option(job.node_access, found, origin)}

    def plain(self, qsub: str, line: Line, directives: Line) -> Plain:
        """To sbatch as it is where it is written for sbatch; what is written for qsub is translated."""
        from vsub.engines.slurmplain import plain_job  # a guest job does without

        options = (*directives.options, *line.options)
        user = _user()
        return plain_job(
            line, directives, _around(options), os.environ,
            sbatch=qsub, srun=self.session_qsub, shell=user.pw_shell,
        )  # fmt: skip

    def noted_id(self, output: bytes) -> bytes:
        """The id with the cluster's name behind it; alone where that is not told."""
        from vsub.engines.slurmlisting import parse_cluster

        number = b"".join(output.split()[-1:])
        try:
            cluster = self.server(self._config.timeouts.reach)
            return number + b"." + os.fsencode(parse_cluster(f"ClusterName = {cluster}\n"))
        except VTorqueError:
            return number

    def state(self, job_id: str, timeout_s: Optional[float] = None) -> JobState:
        """The state of a job, from `squeue`, which tells of it for some minutes after its end."""
        from vsub.engines.slurmlisting import parse_state, slurm_id  # loaded only by a vsub that asks

        try:
            text = self._job_fields(slurm_id(job_id), _STATE_TIMEOUT_S if timeout_s is None else timeout_s)
        except VTorqueError:
            return JobState("unknown")
        return JobState("gone") if text is None else parse_state(text)

    def check_state(self) -> None:
        """Refuse a squeue that cannot be run. Raises VTorqueError (VT-ENGINE)."""
        squeue = self._program("squeue")
        if not os.access(squeue, os.X_OK):
            raise VTorqueError(f"cannot run {squeue} to wait for the job", code=Code.ENGINE, hint="set slurm.bin")

    def completion(self, job_id: str) -> Optional[socket.socket]:
        return None

    def read_completion(self, line: bytes) -> JobState:
        return JobState("unknown")

    def nodes(self, timeout_s: float) -> tuple[str, ...]:
        """All nodes, from `sinfo`."""
        from vsub.engines.slurmlisting import parse_nodes

        return parse_nodes(self._ask(["sinfo", "-h", "-N", "-o", "%N"], timeout_s) or "")

    def server(self, timeout_s: float) -> str:
        """The cluster's name, from `scontrol`."""
        from vsub.engines.slurmlisting import parse_cluster

        return parse_cluster(self._ask(["scontrol", "show", "config"], timeout_s) or "")

    def whole(self, job_id: str, timeout_s: float) -> str:
        """With the cluster's name; a member of an array by its own number, which Slurm knows for a while after its end.

        The last member to start has the number of the array: by that alone it is not named, `12.CLUSTER` is it.
        """
        from vsub.engines.slurmlisting import one_of, slurm_id

        job = slurm_id(job_id)
        number = job
        if "_" in job or "." not in job_id:
            found = one_of(self._array(job, timeout_s), job)
            if found is None and "_" in job:
                raise VTorqueError(
                    f"job {job} is not known to Slurm, and so not its own number", code=Code.ENGINE,
                    hint="name it by that, such as 12.cluster",
                )  # fmt: skip
            number = job if found is None else found.number
        return f"{number}.{self.server(timeout_s)}"

    def placed(self, job_id: Optional[str], timeout_s: float) -> tuple[PlacedJob, ...]:
        """Jobs that have nodes, from `squeue`."""
        from vsub.engines.slurmlisting import PLACED_FORM, PLACED_STATES, parse_placed, slurm_id

        cluster = self.server(timeout_s)
        job = None if job_id is None else slurm_id(job_id)
        argv = ["squeue", "-h", "-r", "-t", PLACED_STATES, "-o", PLACED_FORM, *([] if job is None else ["-j", job])]
        found = parse_placed(self._ask(argv, timeout_s) or "", cluster)
        if job is None or "_" in job or job_id == job:
            return found
        return tuple(each for each in found if each.job_id == f"{job}.{cluster}")  # others of its array have nodes too

    def hold(self, job_id: str, timeout_s: float) -> bool:
        """Hold a job by `scontrol uhold`."""
        from vsub.engines.listing import hold_by
        from vsub.engines.slurmlisting import is_held

        job = self._alone(job_id, timeout_s)
        is_new = not is_held(self._known(job, timeout_s))
        return hold_by([self._program("scontrol"), "uhold", job], "slurm.bin", timeout_s, is_new=is_new)

    def release(self, job_id: str, timeout_s: float) -> None:
        """Release a job by `scontrol release`, which is content with one that nobody holds."""
        from vsub.engines.slurmlisting import is_on_hold

        job = self._alone(job_id, timeout_s)
        if not is_on_hold(self._known(job, timeout_s)):
            raise VTorqueError(f"job {job} is not held", code=Code.ENGINE, hint=f"see squeue -j {job}")
        self._change(["scontrol", "release", job], timeout_s)

    def requeue(self, job_id: str, timeout_s: float) -> None:
        """Requeue a running job by `scontrol requeue`, which would start one that has ended anew."""
        from vsub.engines.slurmlisting import runs

        job = self._alone(job_id, timeout_s)
        if not runs(self._known(job, timeout_s)):
            raise VTorqueError(f"job {job} is not running", code=Code.ENGINE, hint=f"see squeue -j {job}")
        self._change(["scontrol", "requeue", job], timeout_s)

    def check_requeue(self, timeout_s: float) -> None:
        """Root and Slurm's own user may requeue all jobs; whether another is an operator, accounting knows."""
        import re

        text = self._ask(["scontrol", "show", "config"], timeout_s) or ""
        owner = re.search(r"^SlurmUser\s*=\s*\S{1,64}\(([0-9]{1,10})\)\s*$", text, re.MULTILINE)
        if os.geteuid() not in (0, int(owner[1]) if owner else 0):
            raise VTorqueError("only root and SlurmUser requeue jobs of others on Slurm", code=Code.ACCESS)

    def give_back(self, job_id: str, timeout_s: float) -> None:
        """Leave of a job's comment what is its user's own. Slurm lets nobody change that of a job that has ended.

        Of an array the member has to be named by its index: the number of one of them is that of the whole array.
        """
        from vmgr.node.slurmfacts import own_comment
        from vsub.engines.slurmlisting import slurm_id

        job = slurm_id(job_id)
        told = self._ask(["squeue", "-h", "-t", "all", "-o", "%k", "-j", job], timeout_s, errors="surrogateescape")
        own = own_comment((told or "").removesuffix("\n"))
        if own is not None:
            self._change(["scontrol", "update", f"JobId={job}", f"Comment={own}"], timeout_s)

    def _alone(self, job_id: str, timeout_s: float) -> str:
        """A job as `scontrol` takes it: of an array the member alone, for whose number it takes the whole array's.

        Raises VTorqueError: VT-VALUE for an array, VT-ENGINE.
        """
        from vsub.engines.slurmlisting import one_of, slurm_id

        job = slurm_id(job_id)
        if "_" in job:
            return job
        members = self._array(job, timeout_s)
        if "." in job_id:
            members = tuple(each for each in members if each.number == job)
        found = one_of(members, job)
        return job if found is None else found.name

    def _array(self, job: str, timeout_s: float) -> tuple[Member, ...]:
        """The jobs that Slurm knows under a name: one, or those of an array."""
        from vsub.engines.slurmlisting import MEMBERS_FORM, parse_members

        argv = ["squeue", "-h", "-r", "-t", "all", "-o", MEMBERS_FORM, "-j", job]
        return parse_members(self._ask(argv, timeout_s) or "")

    def _job_fields(self, job: str, timeout_s: float) -> Optional[str]:
        """State and so on of a job, None when Slurm does not know it. Raises VTorqueError (VT-ENGINE)."""
        from vsub.engines.slurmlisting import STATE_FIELDS

        return self._ask(["squeue", "-h", "-t", "all", "-O", STATE_FIELDS, "-j", job], timeout_s)

    def _known(self, job: str, timeout_s: float) -> str:
        text = self._job_fields(job, timeout_s)
        if not text:
            raise VTorqueError(f"job {job} is not known to Slurm", code=Code.ENGINE, hint="see squeue")
        return text

    def _ask(self, argv: list[str], timeout_s: float, *, errors: str = "replace") -> Optional[str]:
        """What a command prints; None for a job that Slurm does not know. Raises VTorqueError (VT-ENGINE)."""
        from vsub.engines.listing import ask

        return ask(
            [self._program(argv[0]), *argv[1:]],
            "slurm.bin",
            timeout_s,
            unknown=_NO_STATUS,
            unknown_words=b"Invalid job id",
            errors=errors,
        )

    def _change(self, argv: list[str], timeout_s: float) -> None:
        from vsub.engines.listing import change

        change([self._program(argv[0]), *argv[1:]], "slurm.bin", timeout_s)


def _user() -> pwd.struct_passwd:
    import pwd  # what the environment says of the user is not asked

    return pwd.getpwuid(os.geteuid())


def _folder(options: tuple[Option, ...]) -> str:
    """The folder that the job's relative paths are in."""
    here, option = submission_directory(), last(options, "w")
    return below(here, option.value or "") if option else here


def _around(options: tuple[Option, ...]) -> Circumstances:
    import time

    user = _user()
    host = host_name()
    return Circumstances(
        folder=_folder(options), home=user.pw_dir, user=user.pw_name, hosts=(host, host.partition(".")[0]),
        now=time.localtime(), is_folder=os.path.isdir,
    )  # fmt: skip
