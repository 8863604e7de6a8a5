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
from vsub.engines import Engine, checked_qsub, engine, host_name, is_this_host
from vsub.options import COMMAND_LINE, DRY_RUN, Line, Option, parse_line
from vsub.process import become, ending_by_exception, feed_standard_input, let_signals_in, restore_locale
from vsub.qsub import Submitted, run_qsub
from vsub.report import debug, put, say, set_debugging
from vsub.script import Script, read_script, read_standard_input

INTERRUPTED = 130
NOTHING = parse_line([])
"""A script without directives."""
NO_SCRIPT = Script(b"", "no script", "STDIN", False)
ALONE = {
    ("--wait", "I"): "an interactive job is its own wait",
    ("--wait", "z"): "it hides the job's id",
    ("--wait", "t"): "each member of a job array has an end of its own",
    ("--json", "I"): "the terminal is the job's",
}
"""What does not go together, and why: one of our words and an option of qsub's."""
SHOWN = frozenset(("--explain", DRY_RUN))
"""Our words with which nothing is submitted."""


def main(argv: Optional[list[str]] = None) -> int:
    """Run `vsub` with `argv` (default: the command line's); gives the exit status."""
    words = sys.argv[1:] if argv is None else argv
    restore_locale()
    own: frozenset[str] = frozenset()
    try:
        line = parse_line(words)
        own = line.own
        set_debugging("--debug" in own)
        return _run(line)
    except VTorqueError as err:
        _traceback(own)
        if "--json" in own:
            from vsub.shown import print_json  # only for programs

            print_json({"error": {"code": err.code.text, "message": err.detail, "status": err.code.status}})
        say(str(err))
        return err.code.status
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return 1
    except Exception as err:
        _traceback(own)
        say(f"{Code.INTERNAL.text}: {type(err).__name__}: {err}; run it again with --debug and report it")
        return Code.INTERNAL.status


def _traceback(own: frozenset[str]) -> None:
    if "--debug" in own:
        import traceback  # only for --debug

        traceback.print_exc()


class Context(NamedTuple):
    """What a submission works with."""

    line: Line
    config: Config
    install: Installation
    engine: Engine
    qsub: str

    def asks(self, word: str) -> bool:
        """Whether one of our own words stands on the command line."""
        return word in self.line.own


def _run(line: Line) -> int:
    if "--help" in line.own:
        from vsub.help import help_text  # seldom wanted

        sys.stdout.write(help_text())
        return 0
    if "--version" in line.own:
        from vmgr import __version__

        print(f"vsub {__version__}")
        return 0
    install = installation()
    config = load_config(install)
    debug(f"configuration {config.source}, engine {config.engine}")
    batch = engine(config, install)
    context = Context(line, config, install, batch, checked_qsub(batch.qsub, install, batch.qsub_key))
    if "--about" in line.rest:  # qsub looks for it before it reads its options
        become([context.qsub, *line.rest])
    return _submit(context._replace(line=batch.whole_line(line)))


def _submit(context: Context) -> int:
    line = context.line
    lenient = not line.vm and context.config.submit.without_vm == "qsub"
    on_line = requested(line.vm)
    script, directives = _read(context, lenient=lenient or on_line is None)
    if on_line is None:
        return _plain(context, script, directives, f"-vm off ({COMMAND_LINE})")
    in_script = requested(directives.vm)
    if line.vm or (in_script is not None and (directives.vm or not lenient)):
        return _guest(context, script, directives, {**(in_script or {}), **on_line})
    source = directives.vm[0].source if directives.vm else context.config.origin("submit.without_vm")
    return _plain(context, script, directives, source)


def _read(context: Context, *, lenient: bool) -> tuple[Optional[Script], Line]:
    """The script and its directives; None for the script when there is none to read.

    `lenient`: a script that cannot be read, or a directive that cannot be taken apart, is left for qsub to complain
    of.
    """
    line = context.line
    operand = line.operands[0] if line.operands and line.operands[0] else "-"
    script: Optional[Script] = None
    try:
        if operand != "-":
            script = read_script(operand)
        elif not line.last("I"):
            script = read_standard_input(bounded=not lenient)
        if script is None:
            return None, context.engine.whole_directives(NOTHING, None)
        prefix = os.environ.get("PBS_DPREFIX", PREFIX) if line.prefix is None else line.prefix
        return script, context.engine.whole_directives(read_directives(script.data, prefix, script.name), script)
    except VTorqueError:
        if not lenient:
            raise
        return script, NOTHING


def _plain(context: Context, script: Optional[Script], directives: Line, source: str) -> int:
    """Hand everything to qsub, without our words, and with the standard input that it would have had."""
    line = context.line
    argv, environment = context.engine.plain(context.qsub, line, directives)
    debug(f"no guest; running {argv}")
    if line.own & SHOWN:
        from vsub.shown import print_plain  # nothing is submitted

        print_plain(argv, source, line.own)
        return 0
    if script is not None and script.from_stdin:
        feed_standard_input(script.data)
    if not line.own & {"--wait", "--json"}:
        become(argv, environment)
    _check_own(context, line.options + directives.options)
    started = time.monotonic()
    return _submitted(context, Submitted(argv, run_qsub(argv, environment), False), started)


def _guest(context: Context, script: Optional[Script], directives: Line, request: Request) -> int:
    line, config = context.line, context.config
    if is_this_host(config.submit.disabled_hosts):
        raise VTorqueError(
            f"guest jobs may not be submitted from {host_name()}",
            code=Code.POLICY,
            hint=f"submit.disabled_hosts, {config.origin('submit.disabled_hosts')}; submit elsewhere, or add -vm off",
        )
    _check_own(context, line.options + directives.options)
    started = time.monotonic()
    from vsub.plan import make_plan  # policy and images: a job without guests need not load them
    from vsub.submission import Submission

    user = account()
    plan = make_plan(line, directives, script or NO_SCRIPT, request, user, config, context.engine)
    submission = Submission(plan, user, config, context.engine, context.install)
    for note in plan.fitted.notes:
        say(f"note: {note}")
    with ending_by_exception():
        if plan.interactive:
            session = checked_qsub(context.engine.session_qsub, context.install, context.engine.qsub_key)
            context = context._replace(qsub=session)
        if line.own & SHOWN:
            from vsub.dryrun import show_submission  # nothing is submitted

            show_submission(submission, config, context.qsub, line.own)
            return 0
        if plan.interactive:
            from vsub.interactive import check_terminal, run_session  # only a session needs it

            check_terminal(plan.script is not None)
            return run_session(submission, context.qsub)
        return _submitted(context, submission.submit(context.qsub, keep=context.asks("--wait")), started)


def _submitted(context: Context, submitted: Submitted, started: float) -> int:
    """Print what qsub printed, settle what older jobs left, and wait for the job where that is asked for."""
    status = submitted.ended.status
    try:
        _print(submitted, as_json=context.asks("--json"))
    except OSError as err:  # standard output is full, or was closed from the beginning
        say(f"submitted: {os.fsdecode(submitted.output).strip()}; it cannot be printed: {err.strerror}")
    if submitted.ended.interrupted:
        say("interrupted; the job has been submitted")
        return INTERRUPTED
    let_signals_in()
    if submitted.directory is not None:
        from vsub.sweep import sweep  # by now the job is the batch system's

        sweep(submitted.directory, context.engine, context.config)
    if context.asks("--wait") and status == 0:
        return _follow(context, submitted, started)
    return status


def _print(submitted: Submitted, *, as_json: bool) -> None:
    if as_json:
        from vsub.shown import print_json  # only for programs

        job = os.fsdecode(submitted.output).strip() or None
        facts = {"job": job, "guest": submitted.guest, "status": submitted.ended.status}
        print_json({**facts, "directory": submitted.directory, "argv": submitted.argv})
        return
    put(submitted.output)


def _check_own(context: Context, options: tuple[Option, ...]) -> None:
    """Refuse to wait for, or to tell programs of, what has no end or no id of its own. Raises VTorqueError."""
    own = context.line.own
    if not own & {"--wait", "--json"} or own & SHOWN:
        return
    from vsub.attributes import read_attributes  # most submissions need not look

    letters = [(option.letter, option) for option in options]
    letters += [(attribute.letter or "", attribute.option) for attribute in read_attributes(options)]
    for letter, option in letters:
        for word in ("--wait", "--json"):
            reason = ALONE.get((word, letter))
            if word in own and reason:
                raise VTorqueError(
                    f"{word} cannot be combined with {option} ({option.source}): {reason}", code=Code.OPTION
                )
    if "--wait" in own:
        context.engine.check_state()


def _follow(context: Context, submitted: Submitted, started: float) -> int:
    """Wait for the end of a job that was submitted; gives its exit status."""
    from vsub.follow import Follower  # only a vsub that waits needs it

    words = submitted.ended.output.split()
    if not words:
        raise VTorqueError(f"{context.qsub} printed no job id to wait for", code=Code.ENGINE)
    return Follower(context.engine, os.fsdecode(words[-1]), submitted.directory, started).run()
