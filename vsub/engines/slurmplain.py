"""A job without guests on Slurm.

What is written for sbatch goes to sbatch as it is, `#SBATCH` lines in the script too. Where something is in the
language of qsub, all of it is translated, as for a guest job; but nothing is added.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from vmgr.errors import Code, VTorqueError
from vsub.engines import Plain
from vsub.engines.slurmenvironment import plain_environment
from vsub.engines.slurmlayout import layout_options
from vsub.engines.slurmoptions import USAGE, ForSbatch, from_environment, split_option
from vsub.engines.slurmrequest import (
    PBS_MEMORY,
    PBS_NODES,
    SLURM_MEMORY,
    SLURM_NODES,
    last_language,
    layout,
    read_request,
    without_counterpart,
)
from vsub.engines.slurmtranslate import (
    Circumstances,
    Translated,
    Value,
    for_session,
    output_options,
    translate,
    words,
)
from vsub.options import ONE_SCRIPT, SBATCH, Line, Option, last, parse_line
from vsub.visible import below

_NOT_WITHOUT_GUESTS = {
    "S": "sbatch takes the interpreter from the script's first line",
    "T": "hooks of Slurm's are the site's",
    "u": "the job runs as its own user",
}
_OUTPUT = frozenset("oejk")
_ONE_OF = frozenset((*SLURM_MEMORY, "mem-per-gpu"))
"""Of these sbatch takes one. One in the script counts as if it were on the command line, which cannot take it back."""
_OF_OURS = frozenset("zF")
"""What vsub sees to by itself, and the arguments of the script."""


def plain_job(
    line: Line,
    directives: Line,
    around: Circumstances,
    environ: Mapping[str, str],
    *,
    sbatch: str,
    srun: str,
    shell: str,
) -> Plain:
    """The submission of a job without guests. Raises VTorqueError for what Slurm has no counterpart of."""
    options = (*directives.options, *line.options)
    misread = next((vm for vm in directives.vm if isinstance(vm.source, ForSbatch)), None)
    if misread is not None:
        raise VTorqueError(
            f"the line `#SBATCH -vm {misread.value}` ({misread.source}) cannot be read by sbatch, and without guests "
            "sbatch reads the script",
            code=Code.OPTION,
            hint=f"write it as #PBS -vm {misread.value}",
        )
    for_sbatch = all(isinstance(option.source, ForSbatch) or option.letter in _OF_OURS for option in options)
    if for_sbatch and parse_line(list(line.rest)).problem is None:
        ignored = ["--ignore-pbs"] if directives.vm else []  # it would read a line `#PBS -vm …` as `-v m`
        return Plain([sbatch, "--parsable", *ignored, *(line.native or ()), *_script(line, options)])
    problem = line.problem or directives.problem
    if problem is not None:
        raise VTorqueError(problem, code=Code.USAGE, hint=USAGE)
    _check(options)
    interactive = last(options, "I") is not None
    found = _translated(options, around, _script_name(line), interactive=interactive)
    environment = {
        **plain_environment(options, environ, interactive=interactive),
        "PBS_O_WORKDIR": around.folder,  # by which the TaskProlog knows a job that wants the other variables of PBS
    }
    if interactive:
        return Plain([srun, "--pty", *words(found), *_session(line, options, found, shell)], environment)
    variables = from_environment(environ)
    _check_memory(found, [option for option in directives.options if option not in variables])
    return Plain([sbatch, "--parsable", "--ignore-pbs", *words(found), *_script(line, options)], environment)


def _check_memory(found: Translated, in_script: Sequence[Option]) -> None:
    """Refuse memory of two kinds, one of them in the script, as sbatch would. Raises VTorqueError (VT-OPTION)."""
    for option in in_script:
        name = split_option(option)[0] if option.letter == SBATCH else ""
        other = next((each for each in found if each in _ONE_OF and each != name), None)
        if name in _ONE_OF and other is not None:
            raise VTorqueError(
                f"{option} ({option.source}) and --{other}={found[other].text} ({found[other].source}) exclude each "
                "other, and sbatch reads the script's lines by itself",
                code=Code.OPTION,
                hint=f"take that line out, or ask in its words: --{name}",
            )


def _check(options: tuple[Option, ...]) -> None:
    """Refuse what guest jobs have, and others on Slurm have not. Raises VTorqueError (VT-OPTION)."""
    for option in options:
        if option.letter in _NOT_WITHOUT_GUESTS:
            raise without_counterpart(option, _NOT_WITHOUT_GUESTS[option.letter])
        if option.letter == "c" and (option.value or "").strip() not in ("n", "none"):
            raise without_counterpart(option, "jobs are not checkpointed")


def _script_name(line: Line) -> str:
    """The name that sbatch gives the job."""
    script = line.operands[0] if line.operands else "-"
    return "sbatch" if script in ("-", "") else script.rsplit("/", 1)[-1]


def _translated(options: tuple[Option, ...], around: Circumstances, name: str, *, interactive: bool) -> Translated:
    found = translate(options, around, name)
    named = found["job-name"]
    if not any(option.letter == "N" for option in options):
        del found["job-name"]
    folder = last(options, "d")
    if folder is not None:
        found["chdir"] = Value(below(around.folder, folder.value or ""), folder.source)
    for option in options:
        if option.letter == SBATCH and split_option(option)[0] in {"export", *SLURM_NODES, *SLURM_MEMORY}:
            found[split_option(option)[0]] = Value(split_option(option)[1], option.source)
    of_qsub = (last_language(options, PBS_NODES, SLURM_NODES), last_language(options, PBS_MEMORY, SLURM_MEMORY))
    of_sbatch = {split_option(option)[0] for option in options if option.letter == SBATCH}
    if "l" in of_qsub:
        asked = layout(read_request(options), None, {}, options)
        lies = layout_options(asked, found, "-l", "-l", one_task=interactive)
        # sbatch reads the script's lines itself: what stands there and does not count is said anew
        if "ntasks" in of_sbatch and not interactive:
            lies["ntasks"] = Value(str(asked.nodes * asked.tasks), "-l")
        if "cpus-per-task" in of_sbatch:
            lies.setdefault("cpus-per-task", Value(str(asked.cpus), "-l"))
        taken = (SLURM_NODES | {"nodelist", "constraint"} if of_qsub[0] == "l" else frozenset()) | (
            {"mem"} if of_qsub[1] == "l" else frozenset()
        )
        dropped = (SLURM_NODES if of_qsub[0] == "l" else frozenset()) | (
            SLURM_MEMORY if of_qsub[1] == "l" else frozenset()
        )
        found = {name: value for name, value in found.items() if name not in dropped}
        found.update((name, value) for name, value in lies.items() if name in taken)
    if interactive:
        return for_session(found)
    outputs = [option for option in options if option.letter in _OUTPUT]
    if outputs:
        found.update(output_options(options, around, {**found, "job-name": named}))
        if "error" in of_sbatch:
            found.setdefault("error", found["output"])
    else:
        for option in options:
            if option.letter == SBATCH and split_option(option)[0] in ("output", "error"):
                found[split_option(option)[0]] = Value(split_option(option)[1], option.source)
    return found


def _script(line: Line, options: tuple[Option, ...]) -> list[str]:
    """The script with its arguments as operands of sbatch; nothing for standard input. Raises VTorqueError."""
    script = line.operands[0] if line.operands else "-"
    if len(line.operands) > 1:
        raise VTorqueError(
            f"one script can be submitted, not also {line.operands[1]!r}", code=Code.USAGE, hint=ONE_SCRIPT
        )
    option = last(options, "F")
    arguments = shlex.split(option.value or "") if option is not None else []
    if script in ("-", ""):
        if arguments:
            raise VTorqueError("a script on standard input has no arguments on Slurm", code=Code.OPTION)
        return []
    return [*(["--"] if script.startswith("-") else []), script, *arguments]


def _session(line: Line, options: tuple[Option, ...], found: Translated, shell: str) -> list[str]:
    """What runs on the terminal: the command of `-x`, or a login shell. Raises VTorqueError (VT-OPTION)."""
    nodes = found.get("nodes")
    if nodes is not None and nodes.text != "1":
        raise VTorqueError(
            f"a session on {nodes.text} nodes ({nodes.source}) has no counterpart on Slurm without guests",
            code=Code.OPTION,
            hint="use salloc, or ask for one node",
        )
    if last(options, "x") is None:
        return [shell, "-l"]
    return _script(line, options)
