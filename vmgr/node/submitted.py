"""How the job wrapper learns its job directory.

`vsub` names the wrapper's program as the job's shell (`qsub -S`), so that it is the leader of the job's session: a
shell between the two would be ended by the first signal, and with it the job. A batch system gives a job's shell the
path of its copy of the submitted script, on standard input or as an argument; its last line names the program with
the job directory. Where the submitted script is run in some other way, that line runs the program with the directory.
An interactive job's shell gets `-c` and the command of `qsub -x`, which is the path of such a script in the job
directory.
"""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Sequence

from vmgr.errors import Code, VTorqueError

MAX_SUBMITTED_BYTES = 64 * 1024
MAX_LINE_BYTES = 16 * 1024


def job_directory(argv: Sequence[str]) -> str:
    """The job directory from a wrapper's arguments, else from the script that they or standard input name.

    Raises VTorqueError (VT-SPEC).
    """
    named = _named([word for word in argv if word != "-l"])
    try:
        if stat.S_ISDIR(os.stat(named).st_mode):
            return named
        with open(named, "rb") as stream:
            text = stream.read(MAX_SUBMITTED_BYTES).decode("utf-8", "surrogateescape")
        words = shlex.split(text.strip().splitlines()[-1])
    except FileNotFoundError:
        return named
    except (OSError, ValueError, IndexError) as err:
        raise VTorqueError(f"cannot read the submitted script {named}: {err}", code=Code.SPEC) from err
    if len(words) < 3 or words[0] != "exec" or not words[2].startswith("/"):
        raise VTorqueError(f"{named} was not written by vsub", code=Code.SPEC, hint="submit again by vsub")
    return words[2]


def _named(words: Sequence[str]) -> str:
    if words[:1] == ["-c"]:
        return _path(" ".join(words[1:2]))
    return words[0] if words else _path(_first_line())


def _first_line() -> str:
    return sys.stdin.buffer.readline(MAX_LINE_BYTES).decode("utf-8", "surrogateescape")


def _path(command: str) -> str:
    """The path in a shell's command, which arguments of the script's may follow."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return next((word for word in words if word != "exec"), "")
