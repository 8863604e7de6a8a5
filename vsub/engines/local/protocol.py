"""What clients and daemon of the embedded batch system say to each other: JSON lines over a unix socket.

A request is one line, `{"op": …}`; a submission is followed by the `script_size` bytes of its script. The
answer is one line. The connection of an interactive job stays: the daemon says `{"event": "ready"}` when the
job starts, or `{"event": "cancelled"}`; from then on what qsub sends is typed at the job's terminal, and what
the job writes comes in frames, an empty one being the end.

Who asks is taken from the socket (SO_PEERCRED), never from the request. Error numbers are TORQUE's
(pbs_error_db.h), so that a client's exit status, the number modulo 256, is what users of TORQUE know.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, Optional

MAX_REQUEST = 4 << 20
"""Longest line of a request, in bytes: the environment of `qsub -V` is the bulk of it."""
MAX_SCRIPT = 64 << 20
"""Largest job script, in bytes."""

UNKNOWN_JOB = 15001
INVALID = 15004
PERMISSION = 15007
SYSTEM = 15012
BAD_VALUE = 15016
BAD_STATE = 15018
BAD_USER = 15025
UNKNOWN_RESOURCE = 15037
EXCEEDS = 15038
NO_RERUN = 15040
TOO_MANY = 15048
BAD_DEPEND = 15056
UNKNOWN_NODE = 15064
BAD_ARRAY = 15083
NOT_HELD = 15174

TEXTS = {
    UNKNOWN_JOB: "Unknown Job Id Error",
    INVALID: "Invalid request",
    PERMISSION: "Unauthorized Request ",
    SYSTEM: " System error: ",
    BAD_VALUE: "Illegal attribute or resource value for",
    BAD_STATE: "Request invalid for state of job",
    BAD_USER: "Bad UID for job execution",
    UNKNOWN_RESOURCE: "Unknown resource type ",
    EXCEEDS: "Job exceeds queue resource limits",
    NO_RERUN: "job is not rerunnable",
    TOO_MANY: "Maximum number of jobs already in queue",
    BAD_DEPEND: "Invalid Job Dependency",
    UNKNOWN_NODE: "Unknown node ",
    BAD_ARRAY: "Bad Job Array Request",
    NOT_HELD: "The requested state or substate can't be set from the job's current state",
}


class ProtocolError(Exception):
    """A line that is not a message: too long, not JSON, not an object."""


class Refused(Exception):
    """A request that the daemon declines, with TORQUE's number for the reason."""

    def __init__(self, code: int, detail: str = "") -> None:
        self.code = code
        self.detail = detail
        text = TEXTS.get(code, "")
        super().__init__(f"{text} MSG={detail}" if detail else text)

    @property
    def status(self) -> int:
        """Exit status of a client that was told so."""
        return self.code % 256


class Peer(NamedTuple):
    """The process at the other end of a connection."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """Who is connected, as the kernel noted it when the connection was made."""
    credentials = struct.Struct("iII")  # struct ucred: user and group ids have no sign
    return Peer(*credentials.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)))


def encode(message: Mapping[str, object]) -> bytes:
    """One message as a line."""
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"


def _bounded_int(text: str) -> int:
    if len(text) > 18:
        raise ValueError("number too long")
    return int(text)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a value")


def decode(line: bytes) -> dict[str, Any]:
    """The message in one line. Raises ProtocolError for anything that is not a JSON object."""
    if len(line) > MAX_REQUEST:
        raise ProtocolError("message too long")
    try:
        message = json.loads(line, parse_int=_bounded_int, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("not a JSON message") from error
    if not isinstance(message, dict):
        raise ProtocolError("not a JSON object")
    return message


def connect(socket_path: str, timeout_s: Optional[float] = None) -> socket.socket:
    """A connection to the daemon; no call on it waits longer than `timeout_s`. Raises OSError when none listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(timeout_s)
    try:
        connection.connect(socket_path)
    except OSError:
        connection.close()
        raise
    return connection


def read_line(connection: socket.socket) -> bytes:
    """Everything up to the first newline or the end of the connection."""
    chunks = []
    while True:
        chunk = connection.recv(65536)
        chunks.append(chunk)
        if not chunk or b"\n" in chunk:
            return b"".join(chunks)


def request(
    socket_path: str,
    message: Mapping[str, object],
    payload: Optional[bytes] = None,
    *,
    timeout_s: Optional[float] = None,
) -> dict[str, Any]:
    """Ask the daemon and return its answer.

    Raises Refused when it declines, OSError when it cannot be reached, ProtocolError when it hangs up.
    """
    with connect(socket_path, timeout_s) as connection:
        try:
            connection.sendall(encode(message) + (payload or b""))
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have answered before it had read everything
        line = read_line(connection)
    if not line:
        raise ProtocolError("the batch server closed the connection")
    answer = decode(line)
    if "error" in answer:
        raise Refused(int(answer["error"]), str(answer.get("detail", "")))
    return answer


MAX_FRAME = 0xFFFF
_FRAME = struct.Struct(">H")


def frame(data: bytes) -> bytes:
    """A frame with up to MAX_FRAME bytes; one without is the end."""
    return _FRAME.pack(len(data)) + data


def take_frames(buffer: bytearray) -> Iterator[bytes]:
    """The frames that are whole; what is left of the buffer is the beginning of the next one."""
    while len(buffer) >= _FRAME.size:
        (length,) = _FRAME.unpack_from(buffer)
        if len(buffer) < _FRAME.size + length:
            return
        yield bytes(buffer[_FRAME.size : _FRAME.size + length])
        del buffer[: _FRAME.size + length]


def is_text(value: object, limit: int) -> bool:
    """Whether `value` can be a path, an argument or a variable: a string, bounded, no NUL, encodable."""
    if not isinstance(value, str) or len(value) > limit or "\0" in value:
        return False
    try:
        return len(os.fsencode(value)) <= limit
    except UnicodeEncodeError:
        return False
