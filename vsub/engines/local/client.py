"""qsub, qstat, qdel and qrerun of the embedded batch system, and what `vsub --wait` needs of it.

Each `*_main` takes the arguments after the command's name and the daemon's socket, and returns the exit
status. The socket never comes from the environment. Kept light to import: a submission should cost little
more than an interpreter.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Mapping
from typing import Callable, NamedTuple, Optional

from vsub.engines.local import options, protocol
from vsub.engines.local.options import Options, UsageError
from vsub.engines.local.protocol import ProtocolError, Refused

USAGE = 2
NO_SERVER = 111
"""Exit status when the daemon cannot be reached, as TORQUE's (ECONNREFUSED)."""

DIRECTIVES_WITHIN = 1 << 20
"""Directives are looked for in this many bytes at the head of a script."""

LINE = 78


class JobState(NamedTuple):
    """What the batch system says about a job: Q, R, E or C, and how it ended."""

    letter: str
    exit_status: Optional[int]
    comment: str
    exec_host: str


class Failure(Exception):
    """One line for standard error and an exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _command(name: str, body: Callable[[], int]) -> int:
    """Run a client's body; failures become one line and a status."""
    try:
        return body()
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return USAGE
    except Failure as failure:
        print(failure, file=sys.stderr)
        return failure.status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer goes nowhere
        return 1
    except (OSError, ProtocolError) as error:
        print(f"{name}: cannot reach the embedded batch server: {error}", file=sys.stderr)
        return NO_SERVER


# --- qsub


def _read_script(operands: list[str]) -> tuple[bytes, str]:
    """The script and the job name that follows from it."""
    if len(operands) > 1:
        raise UsageError("more than one script: " + " ".join(operands))
    if not operands or operands[0] == "-":
        data, name = sys.stdin.buffer.read(protocol.MAX_SCRIPT + 1), "STDIN"
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
    }


def _qsub(argv: list[str], socket_path: str) -> int:
    asked, operands = options.parse(argv)
    if os.geteuid() == 0:
        raise Failure("qsub can not be run as root", 1)
    script, script_name = _read_script(operands)
    head = script[:DIRECTIVES_WITHIN].decode("utf-8", "surrogateescape")
    asked = options.merge(asked, options.parse_script(head, "#PBS" if asked.prefix is None else asked.prefix))
    here, host = _directory(os.environ), socket.gethostname()
    message = build(asked, script_name, os.environ, here, host)
    message["script_size"] = len(script)
    if len(protocol.encode(message)) > protocol.MAX_REQUEST:
        raise Failure("qsub: the variables of the job are too large together", 1)
    try:
        answer = protocol.request(socket_path, message, script)
    except Refused as refusal:
        raise Failure(f"qsub: submit error ({refusal})", refusal.status) from None
    if not asked.silent:
        print(answer["job"])
    return 0


def qsub_main(argv: list[str], socket_path: str) -> int:
    """`qsub [options] [script]`: prints the job's id."""
    return _command("qsub", lambda: _qsub(argv, socket_path))


# --- qstat


def _visible(text: str) -> str:
    return text.replace("\n", "\\n").replace("\t", "\\t").encode("utf-8", "backslashreplace").decode()


def full_lines(job_id: str, attributes: list[list[str]], wrap: bool) -> list[str]:
    """A job as `qstat -f` prints it; long values go on in lines that begin with a tab."""
    lines = [f"Job Id: {job_id}"]
    for name, value in attributes:
        line = f"    {name} = {_visible(value)}"
        while wrap and len(line) > LINE:
            lines.append(line[:LINE])
            line = "\t" + line[LINE:]
        lines.append(line)
    return [*lines, ""]


def _summary_line(job_id: str, attributes: list[list[str]]) -> str:
    known = {name: value for name, value in attributes}  # noqa: C416
    user = known["Job_Owner"].partition("@")[0]
    used = known.get("resources_used.cput", "0")
    name = known["Job_Name"]
    name = name if len(name) <= 16 else f"...{name[-13:]}"
    state, queue = known["job_state"], known["queue"]
    return f"{job_id[:25]:<25} {name:<16} {user[:15]:<15} {used:>8} {state} {queue[:15]}"


def _qstat(argv: list[str], socket_path: str) -> int:
    flags = {argument for argument in argv if argument.startswith("-")}
    letters = {letter for flag in flags for letter in flag[1:]}
    if not letters <= {"f", "1"}:
        unknown = sorted(letters - {"f", "1"})[0]
        raise UsageError(f"option -{unknown} is not supported by the embedded batch system")
    wanted: list[Optional[str]] = [argument for argument in argv if argument not in flags] or [None]
    jobs, status = [], 0
    for text in wanted:
        try:
            jobs.extend(protocol.request(socket_path, {"op": "stat", "job": text})["jobs"])
        except Refused as refusal:
            print(f"qstat: {refusal} {text}", file=sys.stderr)
            status = refusal.status
    if "f" in letters:
        for job_id, attributes in jobs:
            print("\n".join(full_lines(job_id, attributes, "1" not in letters)))
    elif jobs:
        print("Job ID                    Name             User            Time Use S Queue")
        print("------------------------- ---------------- --------------- -------- - -----")
        for job_id, attributes in jobs:
            print(_summary_line(job_id, attributes))
    sys.stdout.flush()
    return status


def qstat_main(argv: list[str], socket_path: str) -> int:
    """`qstat [-f] [-1] [job…]`."""
    return _command("qstat", lambda: _qstat(argv, socket_path))


# --- qdel, qrerun


def _for_each(name: str, jobs: list[str], message: Mapping[str, object], socket_path: str) -> int:
    """Send one request per job; the status of the last that failed."""
    if not jobs:
        raise UsageError("which job? usage: " + name + " job…")
    status = 0
    for job_id in jobs:
        try:
            protocol.request(socket_path, {**message, "job": job_id})
        except Refused as refusal:
            print(f"{name}: {refusal} {job_id}", file=sys.stderr)
            status = refusal.status
    return status


def _qdel(argv: list[str], socket_path: str) -> int:
    delay, jobs, arguments = None, [], iter(argv)
    for argument in arguments:
        if argument.startswith("-W"):
            value = argument[2:] or next(arguments, "")
            if not value.isascii() or not value.isdigit() or len(value) > 5:
                raise UsageError(f"illegal -W value: {value!r} is not a number of seconds")
            delay = int(value)
        elif argument.startswith("-"):
            raise UsageError(f"option {argument} is not supported by the embedded batch system")
        else:
            jobs.append(argument)
    return _for_each("qdel", jobs, {"op": "delete", "delay": delay}, socket_path)


def qdel_main(argv: list[str], socket_path: str) -> int:
    """`qdel [-W seconds] job…`."""
    return _command("qdel", lambda: _qdel(argv, socket_path))


def _qrerun(argv: list[str], socket_path: str) -> int:
    for argument in argv:
        if argument.startswith("-"):
            raise UsageError(f"option {argument} is not supported by the embedded batch system")
    return _for_each("qrerun", argv, {"op": "rerun"}, socket_path)


def qrerun_main(argv: list[str], socket_path: str) -> int:
    """`qrerun job…`."""
    return _command("qrerun", lambda: _qrerun(argv, socket_path))


# --- for vsub


def completion(socket_path: str, job_id: str) -> socket.socket:
    """A connection that becomes readable when the job is complete and its output delivered.

    It then gives one JSON line, `{"exit_status": N|null, "reason": …}`, or `{"error": number, "detail": …}`
    for a job that is unknown or another user's; an end without a line means that the daemon was stopped.
    Raises OSError when the daemon cannot be reached.
    """
    connection = protocol.connect(socket_path)
    try:
        connection.sendall(protocol.encode({"op": "wait", "job": job_id}))
    except OSError:
        connection.close()
        raise
    return connection


def job_state(socket_path: str, job_id: str, timeout_s: Optional[float] = None) -> Optional[JobState]:
    """How a job stands; None when the batch system does not know it (any more).

    Raises OSError or ProtocolError when the daemon cannot be asked, Refused for another user's job.
    """
    try:
        [(_, attributes)] = protocol.request(socket_path, {"op": "stat", "job": job_id}, timeout_s=timeout_s)["jobs"]
    except Refused as refusal:
        if refusal.code == protocol.UNKNOWN_JOB:
            return None
        raise
    known = {str(name): str(value) for name, value in attributes}
    exit_status = known.get("exit_status")
    return JobState(
        known["job_state"],
        None if exit_status is None else int(exit_status),
        known.get("comment", ""),
        known.get("exec_host", ""),
    )
