"""An interactive guest job: `qsub -I` holds the terminal, vsub stays behind it for what qsub does not pass on.

TORQUE sends the size of the terminal only once, and qsub ends with 0 whatever the session's status was. So vsub
writes every new size into the job directory, where the job wrapper looks for it, and reads the status there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

from vmgr.errors import Code, VTorqueError
from vmgr.node.terminal import WINSIZE
from vmgr.signals import undisturbed
from vsub.jobdir import remove_tree
from vsub.process import spawn, wait_status
from vsub.report import debug, say
from vsub.status import read_result, read_statuses
from vsub.submission import Submission

RESULT_WITHIN_S = 5.0
"""How long the result of a session may take to show on a shared file system after the session's end."""
PAUSE_S = 0.05
NO_STATUS = 1


def check_terminal(has_command: bool) -> None:
    """Refuse a session without a terminal, as qsub does, unless it has a command. Raises VTorqueError (VT-USAGE)."""
    if not has_command and not (os.isatty(0) and os.isatty(1)):
        raise VTorqueError(
            "standard input and output must be a terminal for an interactive job",
            code=Code.USAGE,
            hint="submit a script without -I, or name a command with -x",
        )


def run_session(submission: Submission, qsub: str) -> int:
    """Submit an interactive job, stay until its end, and give the status of what ran in the guest."""
    with submission.written(qsub, keep=True) as (directory, written):
        debug(f"running {written.argv}")
        try:
            with _behind(directory.path):
                status = _run(written.argv, written.environment)
        except OSError as err:
            raise VTorqueError(f"cannot run {qsub}: {err.strerror}", code=Code.ENGINE) from err
        result = _result(directory.path)
        _settle(directory.outer)
    if result is not None:
        return result
    if status == 0:
        say("the session is gone and left no exit status; was the job deleted?")
        return NO_STATUS
    return status


@contextmanager
def _behind(directory: str) -> Iterator[None]:
    """While this lasts, the terminal's signals are qsub's, and its new sizes go into the job directory."""

    def resized(*_: object) -> None:
        size = _terminal_size()
        if size is not None:
            try:
                write_size(directory, size)
            except OSError as err:
                debug(f"the terminal's size is not passed on: {err.strerror}")

    held = {number: signal.signal(number, _nothing) for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP)}
    held[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, resized)
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


def _nothing(*_: object) -> None:
    """A handler, not SIG_IGN: what is ignored would stay ignored in qsub."""


def _run(argv: list[str], environment: Optional[dict[str, str]]) -> int:
    """Run qsub to its end; a TERM or HUP is passed on to it, for it deletes the job."""
    children: list[int] = []

    def pass_on(number: int, _: object) -> None:
        for child in children:
            os.kill(child, number)

    held = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with undisturbed() as mask:  # one that comes before qsub is known would be passed on to nobody
            children.append(spawn(argv, mask=mask, environment=environment))
        return wait_status(children[0])
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


def _terminal_size() -> Optional[os.terminal_size]:
    for descriptor in (0, 1, 2):
        try:
            return os.get_terminal_size(descriptor)
        except OSError:
            continue
    return None


def write_size(directory: str, size: os.terminal_size) -> None:
    """Leave a terminal's size in the job directory, whole. Raises OSError."""
    temporary = f"{directory}/.{WINSIZE}.{os.getpid()}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, f"{size.lines} {size.columns}\n".encode())
    finally:
        os.close(descriptor)
    os.rename(temporary, f"{directory}/{WINSIZE}")


def _result(directory: str) -> Optional[int]:
    """The status of the session; None for one that never began or left none."""
    deadline = time.monotonic() + RESULT_WITHIN_S
    while True:
        result = read_result(directory)
        if result is not None:
            return result.status
        if time.monotonic() > deadline or not read_statuses(directory):
            return None
        time.sleep(PAUSE_S)  # no event tells of what another machine writes


def _settle(outer: str) -> None:
    """Take the job's files away; the node agent may be writing its last word into them."""
    deadline = time.monotonic() + RESULT_WITHIN_S
    sys.stdout.flush()
    while os.path.lexists(outer) and time.monotonic() < deadline:
        remove_tree(outer)
        if os.path.lexists(outer):
            time.sleep(PAUSE_S)
