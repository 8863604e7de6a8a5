"""qdel, qrerun, qhold and qrls of the embedded batch system, and what `vsub --wait` needs of it.

Each `*_main` takes the arguments after the command's name and the daemon's socket, and returns the exit
status. The socket never comes from the environment.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from typing import NamedTuple, Optional

from vsub.engines.local import command, protocol
from vsub.engines.local.options import UsageError
from vsub.engines.local.protocol import Refused


class JobState(NamedTuple):
    """What the batch system says about a job or array: Q, H, W, R, E or C, and how it ended."""

    letter: str
    exit_status: Optional[int]
    comment: str
    exec_host: str


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
    return command.run("qdel", lambda: _qdel(argv, socket_path))


def _qrerun(argv: list[str], socket_path: str) -> int:
    for argument in argv:
        if argument.startswith("-"):
            raise UsageError(f"option {argument} is not supported by the embedded batch system")
    return _for_each("qrerun", argv, {"op": "rerun"}, socket_path)


def qrerun_main(argv: list[str], socket_path: str) -> int:
    """`qrerun job…`."""
    return command.run("qrerun", lambda: _qrerun(argv, socket_path))


def _change_hold(name: str, operation: str, argv: list[str], socket_path: str) -> int:
    jobs, arguments = [], iter(argv)
    for argument in arguments:
        if argument.startswith("-h"):
            value = argument[2:] or next(arguments, "")
            if value != "u":
                raise UsageError(f"-h {value} is not supported by the embedded batch system, only -h u")
        elif argument.startswith("-"):
            raise UsageError(f"option {argument} is not supported by the embedded batch system")
        else:
            jobs.append(argument)
    return _for_each(name, jobs, {"op": operation}, socket_path)


def qhold_main(argv: list[str], socket_path: str) -> int:
    """`qhold [-h u] job…`: keeps jobs from starting."""
    return command.run("qhold", lambda: _change_hold("qhold", "hold", argv, socket_path))


def qrls_main(argv: list[str], socket_path: str) -> int:
    """`qrls [-h u] job…`: lets held jobs start."""
    return command.run("qrls", lambda: _change_hold("qrls", "release", argv, socket_path))


# --- for vsub


def completion(socket_path: str, job_id: str) -> socket.socket:
    """A connection that becomes readable when the job or array is complete and its output delivered.

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
    """How a job or array stands; None when the batch system does not know it (any more).

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
