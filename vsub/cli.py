"""The `vsub` command: stands in for `qsub`, and makes the job a guest job unless told otherwise."""

from __future__ import annotations

import os
import sys
import time
from typing import NamedTuple, Optional

from vmgr.config import Config, load_config
from vmgr.errors import Code, VTorqueError
from vmgr.paths import Installation, installation
from vmgr.request import Request
from vsub.account import account
from vsub.asked import requested
from vsub.directives import PREFIX, read_directives
from vsub.engines import Engine, checked_qsub, engine
from vsub.options import Line, Option, parse_line
from vsub.process import become, ending_by_exception, feed_standard_input
from vsub.qsub import Submitted, run_qsub
from vsub.report import debug, say, set_debugging
from vsub.script import Script, read_script, read_standard_input

INTERRUPTED = 130
NOTHING = parse_line([])
"""A script without directives."""

HELP = """\
usage: vsub [options of qsub] [-vm KEY=VALUE[,KEY=VALUE...]]... [SCRIPT]

Submits a batch job as qsub does; the job's script runs inside a virtual machine
made from the site's defaults and what -vm asks for. SCRIPT is read from standard
input when it is not given; its lines "#PBS -vm ..." count as well.

  -vm off            submit to qsub untouched: no guest
  -vm img=NAME       image of the guest (see: vmgr list)
  -vm distro=NAME    refuse unless the image is this distribution
  -vm vcpus=N        vCPUs
  -vm ram=SIZE       RAM: 512M, 1.5G; a bare number is MiB
  -vm vms_per_node=N guests on each node (1)
  -vm vm_prologue=FILE, -vm vm_epilogue=FILE
                     your own script, run in the guest before and after the job
  --wait             follow the job, wait for its end, exit with its status
  --debug            say what is done; show the traceback of a fault
  --version, --help

Prints the job's id. Ends with 2 when a request is refused (nothing is submitted
then), else with qsub's status. All other options are qsub's: man qsub.
"""


def main(argv: Optional[list[str]] = None) -> int:
    """Run `vsub` with `argv` (default: the command line's); gives the exit status."""
    words = sys.argv[1:] if argv is None else argv
    set_debugging("--debug" in words)
    try:
        return _run(words)
    except VTorqueError as err:
        if "--debug" in words:
            _traceback()
        say(str(err))
        return err.code.status
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return 1
    except Exception as err:
        if "--debug" in words:
            _traceback()
        say(f"{Code.INTERNAL.text}: {type(err).__name__}: {err}; run it again with --debug and report it")
        return Code.INTERNAL.status


def _traceback() -> None:
    import traceback  # only for --debug

    traceback.print_exc()


class Context(NamedTuple):
    """What a submission works with."""

    line: Line
    config: Config
    install: Installation
    engine: Engine
    qsub: str


def _run(words: list[str]) -> int:
    line = parse_line(words)
    if "--help" in line.own:
        sys.stdout.write(HELP)
        return 0
    if "--version" in line.own:
        from vmgr import __version__

        print(f"vsub {__version__}")
        return 0
    install = installation()
    config = load_config(install)
    debug(f"configuration {config.source}, engine {config.engine}")
    batch = engine(config, install)
    return _submit(Context(line, config, install, batch, checked_qsub(batch.qsub, install)))


def _submit(context: Context) -> int:
    line = context.line
    on_line = requested(line.vm)
    if on_line is None:
        return _plain(context, None, NOTHING)
    without_vm = context.config.submit.without_vm
    script, directives = _read(line, lenient=not line.vm and without_vm == "qsub")
    in_script = requested(directives.vm)
    if line.vm or (in_script is not None and (directives.vm or without_vm == "guest")):
        return _guest(context, script, directives, {**(in_script or {}), **on_line})
    return _plain(context, script, directives)


def _read(line: Line, *, lenient: bool) -> tuple[Optional[Script], Line]:
    """The script and its directives; None for the script when there is none to read.

    `lenient`: a script that cannot be read is left for qsub to complain of.
    """
    operand = line.operands[0] if line.operands else "-"
    if operand == "-":
        if line.last("I"):
            return None, NOTHING
        script = read_standard_input()
    else:
        try:
            script = read_script(operand)
        except VTorqueError:
            if lenient:
                return None, NOTHING
            raise
    prefix = line.last("C")
    mark = os.environ.get("PBS_DPREFIX", PREFIX) if prefix is None else prefix.value or ""
    return script, read_directives(script.data, mark, script.name)


def _plain(context: Context, script: Optional[Script], directives: Line) -> int:
    """Hand everything to qsub, without our words, and with the standard input that it would have had."""
    line = context.line
    arguments = list(line.rest)
    variables = directives.last("v")
    if directives.vm and variables and not line.last("v"):
        # qsub reads a directive `-vm …` as `-v m`, and of several -v only the last counts
        arguments = [*variables.argv(), *arguments]
    argv = [context.qsub, *arguments]
    debug(f"no guest; running {argv}")
    if script is not None and script.from_stdin:
        feed_standard_input(script.data)
    if "--wait" not in line.own:
        become(argv)
    _check_wait(line.options + directives.options)
    started = time.monotonic()
    status, output = run_qsub(argv)
    submitted = Submitted(status, output, None)
    _print_id(submitted)
    return _follow(context, submitted, started) if status == 0 else status


def _guest(context: Context, script: Optional[Script], directives: Line, request: Request) -> int:
    line = context.line
    wait = "--wait" in line.own
    if wait:
        _check_wait(line.options + directives.options)
    started = time.monotonic()
    from vsub.submission import GuestJob  # policy and images: a job without guests need not load them

    no_script = Script(b"", "no script", "STDIN", False)
    job = GuestJob(line, directives, script or no_script, request, account(), context.config)
    with ending_by_exception():
        submitted = job.submit(context.qsub, context.install, keep=wait)
    _print_id(submitted)
    if submitted.directory is not None:
        from vsub.sweep import sweep  # by now the job is the batch system's

        sweep(submitted.directory, context.engine)
    return _follow(context, submitted, started) if wait and submitted.status == 0 else submitted.status


def _check_wait(options: tuple[Option, ...]) -> None:
    for option in options:
        if option.letter in "Iz":
            reason = "an interactive job is its own wait" if option.letter == "I" else "it hides the job's id"
            raise VTorqueError(f"--wait cannot be combined with {option} ({option.source}): {reason}", code=Code.OPTION)


def _follow(context: Context, submitted: Submitted, started: float) -> int:
    """Wait for the end of a job that was submitted; gives its exit status."""
    from vsub.follow import Follower  # only a vsub that waits needs it

    words = submitted.output.split()
    if not words:
        raise VTorqueError(f"{context.qsub} printed no job id to wait for", code=Code.ENGINE)
    return Follower(context.engine, os.fsdecode(words[-1]), submitted.directory, started).run()


def _print_id(submitted: Submitted) -> None:
    """What qsub printed, as it is."""
    sys.stdout.write(os.fsdecode(submitted.output))
    sys.stdout.flush()
