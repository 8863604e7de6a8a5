"""The dialect of TORQUE's `qsub`: what a job asks of its nodes, and the arguments with which a guest job is submitted.

Both batch systems that speak it use this class: `torque`, and `local`, which imitates it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from vmgr.errors import Code, VTorqueError
from vsub.attributes import read_attributes
from vsub.engines import GuestJob, Plain, Said
from vsub.hostrequest import HostRequest, chooses_node_access, read_host_request
from vsub.options import COMMAND_LINE, NATIVE, Line, Option
from vsub.resources import replace_items

if TYPE_CHECKING:
    from vsub.script import Script

_OURS = frozenset("CSxzI")
"""Options that the wrapper is submitted with in its own way; of `-z` vsub takes care itself, for it needs the id."""


class QsubDialect:
    """Requests in the language of `qsub`."""

    def server(self, timeout_s: float) -> str:
        """The name in the ids of its jobs, which each batch system tells in its own way."""
        raise NotImplementedError

    def whole(self, job_id: str, timeout_s: float) -> str:
        """With the server's name."""
        return job_id if "." in job_id else f"{job_id}.{self.server(timeout_s)}"

    def give_back(self, job_id: str, timeout_s: float) -> None:
        """It is in the resource list, of which it is an item of its own: nothing is to be done."""

    @property
    def qsub_key(self) -> str:
        return "submit.qsub"

    @property
    def commands(self) -> tuple[str, str]:
        return "qstat", "qdel"

    @property
    def usage(self) -> str:
        return "see vsub --help and man qsub"

    def whole_line(self, line: Line) -> Line:
        """The line as it is. Raises VTorqueError (VT-OPTION) for one in another language."""
        if line.native is not None:
            raise VTorqueError(
                f"{NATIVE} ({COMMAND_LINE}) cannot be honoured: the batch system of this site is not Slurm",
                code=Code.OPTION,
                hint="say it in the language of qsub",
            )
        return line

    def whole_directives(self, directives: Line, script: Optional[Script]) -> Line:
        return directives

    def read_host_request(self, options: tuple[Option, ...]) -> HostRequest:
        """What a job asks of its nodes. Raises VTorqueError (VT-USAGE, VT-OPTION)."""
        return read_host_request(options)

    def guest_arguments(self, job: GuestJob) -> list[str]:
        """qsub's arguments for the wrapper in the job directory.

        The prologue is the first resource of all, for resources that do not fit are dropped from the end.
        The wrapper holds no directives (`-C ''`), and the job's shell is the program that it names, so that no
        shell stands between the batch system's signals and it; the script's own shell is in the specification.
        Directives come before the user's options: the last one wins. What was fitted to the guests comes last. An
        interactive job starts the wrapper on the user's terminal (`-I -x`).
        """
        arguments = [
            "-C", "",
            "-l", f"prologue={job.directory}/prologue",
            "-S", job.program,
        ]  # fmt: skip
        if job.job_type is not None:
            arguments += ["-T", job.job_type]
        if job.interactive:
            arguments += ["-I", "-x"]
        if not any(option.letter == "N" for option in job.options):
            arguments += ["-N", job.job_name]
        for option in self._options(job):
            arguments += option.argv()
        for resource in self._resources(job):
            arguments += ["-l", resource]
        return [*arguments, f"{job.directory}/job"]

    def guest_environment(self, job: GuestJob) -> Optional[dict[str, str]]:
        return None

    def explain(self, job: GuestJob) -> Optional[tuple[Said, ...]]:
        return None

    def plain(self, qsub: str, line: Line, directives: Line) -> Plain:
        """Everything as it is, without our words."""
        arguments = list(line.rest)
        variables = directives.last("v")
        if directives.vm and variables and not line.last("v"):
            # qsub reads a directive `-vm …` as `-v m`, and of several -v only the last counts
            arguments = [*variables.argv(), *arguments]
        return Plain([qsub, *arguments])

    def noted_id(self, output: bytes) -> bytes:
        """The last word: the id holds the server's name."""
        return b"".join(output.split()[-1:])

    def _options(self, job: GuestJob) -> list[Option]:
        """The user's own options, without what vsub takes for itself or has changed."""
        fitted = job.fitted
        dropped = {"prologue", *(name for name, _ in fitted.memory)}
        if fitted.nodes is not None:
            dropped |= {"nodes", "procs", "ncpus"}
        inner = {attribute.option for attribute in read_attributes(job.options) if attribute.letter == "I"}
        ours = _OURS if job.interactive else _OURS | {"F"}
        kept = []
        for option in replace_items(job.options, frozenset(dropped)):
            if option.letter == "L" and fitted.tasks is not None:
                option = option._replace(value=str(fitted.tasks))
            if option.letter not in ours and option not in inner:
                kept.append(option)
        return kept

    def _resources(self, job: GuestJob) -> list[str]:
        """What the guests need of the nodes, beside what the user asked for."""
        fitted = job.fitted
        resources = [] if fitted.nodes is None else [f"nodes={fitted.nodes}"]
        resources += [f"{name}={mib}mb" for name, mib in fitted.memory]
        if job.node_access is not None and not chooses_node_access(job.options):
            resources.append(f"naccesspolicy={job.node_access}")
        return resources
