"""qsub of the embedded batch system: script and options become one request.

`qsub_main` takes the arguments after the command's name and the daemon's socket, and returns the exit
status. The socket never comes from the environment. Kept light to import: a submission should cost little
more than an interpreter.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Optional

from vmgr.signals import undisturbed
from vsub.engines.local import command, options, protocol
from vsub.engines.local.command import Failure
from vsub.engines.local.options import Options, UsageError
from vsub.engines.local.protocol import Refused

DIRECTIVES_WITHIN = 1 << 20
"""Directives are looked for in this many bytes at the head of a script."""


def _read_script(operands: list[str], *, interactive: bool) -> tuple[bytes, str]:
    """The script and the job name that follows from it; an interactive job needs none."""
    if not operands or operands[0] == "-":
        data = b"" if interactive else sys.stdin.buffer.read(protocol.MAX_SCRIPT + 1)
        name = "STDIN"
    else:
        path = operands[0]
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise Failure("qsub: script not a file", 1)
            with open(path, "rb") as file:
                data = file.read(protocol.MAX_SCRIPT + 1)
        except OSError as error:
            raise Failure(f"qsub: script file '{path}' cannot be loaded - {error.strerror}", 1) from error
        name = path.rpartition("/")[2]
    if len(data) > protocol.MAX_SCRIPT:
        raise Failure(f"qsub: script is larger than {protocol.MAX_SCRIPT >> 20} MiB", 1)
    if data.startswith(b"\x7fELF") or b"\0" in data[:4096]:
        raise Failure("qsub:  file must be an ascii script", 1)
    if data.partition(b"\n")[0].endswith(b"\r"):
        raise Failure("qsub:  script is written in DOS/Windows text format", 1)
    return data, name


def _directory(environment: Mapping[str, str]) -> str:
    """The directory of submission, by the name the user knows it under if that is the same place."""
    here, named = os.getcwd(), environment.get("PWD", "")
    try:
        if named.startswith("/") and os.path.samestat(os.stat(named), os.stat(here)):
            return named
    except OSError:
        pass
    return here


def _local_path(letter: str, value: str, directory: str, host: str) -> str:
    """The absolute path in `[host:]path`. Raises UsageError when it is on another host."""
    head, colon, rest = value.partition(":")
    if colon and "/" not in head:
        if head not in (host, host.partition(".")[0], "localhost", ""):
            raise UsageError(f"illegal -{letter} value: {value!r}: output is delivered on {host} only")
        value = rest
    if value.startswith(("~/", "$HOME/", "${HOME}/")):
        return "$HOME/" + value.partition("/")[2]
    return value if value.startswith("/") else f"{directory.rstrip('/')}/{value}"


def _shell(shells: Optional[tuple[str, ...]], host: str) -> Optional[str]:
    """The shell for this host out of `-S path[@host],…`."""
    found = None
    for text in shells or ():
        path, at, where = text.partition("@")
        if at and where in (host, host.partition(".")[0]):
            return path
        if not at and found is None:
            found = path
    return found


def _origin(environment: Mapping[str, str], directory: str, host: str) -> dict[str, str]:
    """The PBS_O_* variables: where the job came from."""
    found = {"PBS_O_WORKDIR": directory, "PBS_O_HOST": host, "PBS_O_SERVER": host, "PBS_O_HOME": "/"}
    for name in ("HOME", "LANG", "LOGNAME", "PATH", "MAIL", "SHELL", "TZ"):
        if environment.get(name):
            found[f"PBS_O_{name}"] = environment[name]
    return found


def build(asked: Options, script_name: str, environment: Mapping[str, str], here: str, host: str) -> dict[str, object]:
    """The request for a submission, without the script. Raises UsageError."""
    name = asked.name if asked.name is not None else script_name
    if not options.valid_name(name):
        raise UsageError("cannot form a valid job name from the script name")

    def inside(path: str) -> str:
        return path if path.startswith("/") else f"{here.rstrip('/')}/{path}"

    directory = here if asked.work_dir is None else inside(asked.work_dir)

    def target(letter: str, value: Optional[str]) -> str:
        return f"{directory.rstrip('/')}/" if value is None else _local_path(letter, value, directory, host)

    home = environment.get("HOME", "/")
    output, error = (
        path.replace("$HOME/", f"{home.rstrip('/')}/", 1) if path.startswith("$HOME/") else path
        for path in (target("o", asked.output), target("e", asked.error))
    )
    return {
        "op": "submit",
        "name": name,
        "account": asked.account or "",
        "queue": asked.queue or "batch",
        "resources": [
            (key, inside(value) if key in ("prologue", "epilogue") else value) for key, value in asked.resources
        ],
        "variables": {
            **options.script_variables(asked, environment),
            **_origin(environment, directory, host),
        },
        "work_dir": directory,
        "init_dir": None if asked.init_dir is None else inside(asked.init_dir),
        "output": output,
        "error": error,
        "join": asked.join or "n",
        "keep": asked.keep or "n",
        "shell": _shell(asked.shells, host),
        "umask": 0o077 if asked.umask is None else asked.umask,
        "arguments": asked.arguments or "",
        "priority": asked.priority or 0,
        "rerunnable": asked.rerunnable is not False,
        "held": asked.hold is True,
        "execute_at": asked.execute_at,
        "job_type": asked.job_type,
        "depend": asked.depend or (),
        "array": asked.array,
    }


def _check_operands(asked: Options, operands: list[str]) -> Optional[str]:
    """What `qsub -I -x` starts; None for a job without it. Raises UsageError when operands and options disagree."""
    if len(operands) > 1 and not asked.interactive:
        raise UsageError("more than one script: " + " ".join(operands))
    if not asked.execute:
        return None
    if not operands or operands[0] == "-":
        raise UsageError("'-x' used without a script specified")
    return operands[0]


def _qsub(argv: list[str], socket_path: str) -> int:
    given, operands = options.parse(argv)
    if os.geteuid() == 0:
        raise Failure("qsub can not be run as root", 1)
    script, script_name = _read_script(operands, interactive=given.interactive is True)
    head = script[:DIRECTIVES_WITHIN].decode("utf-8", "surrogateescape")
    written = options.parse_script(head, "#PBS" if given.prefix is None else given.prefix)
    asked = options.merge(options.after_interactive(given, written), written)
    program = _check_operands(asked, operands)
    message = build(asked, script_name, os.environ, _directory(os.environ), socket.gethostname())
    if asked.interactive:
        from vsub.engines.local import interactive  # what only a terminal needs

        if asked.array is not None:
            raise Failure("qsub: interactive job can not be job array.", 2)
        script = b""
        message["terminal"], message["command"] = interactive.terminal(program), program
    message["script_size"] = len(script)
    if len(protocol.encode(message)) > protocol.MAX_REQUEST:
        raise Failure("qsub: the variables of the job are too large together", 1)
    try:
        if asked.interactive:
            return interactive.submit(socket_path, message)
        with undisturbed():  # whoever ends this is to know whether there is a job
            answer = protocol.request(socket_path, message, script)
            if not asked.silent:
                print(answer["job"])
                with suppress(OSError):  # the interpreter's end says so
                    sys.stdout.flush()
    except Refused as refusal:
        raise Failure(f"qsub: submit error ({refusal})", refusal.status) from None
    return 0


def qsub_main(argv: list[str], socket_path: str) -> int:
    """`qsub [options] [script]`: prints the job's id. `qsub -I` is the job's terminal until it ends."""
    return command.run("qsub", lambda: _qsub(argv, socket_path))
