"""Reading what the user submits: the job script, from a file or from standard input, and VM prologue and epilogue."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from vmgr.errors import Code, VTorqueError

MAX_SCRIPT_BYTES = 64 << 20
_HEAD = 4096


class Script(NamedTuple):
    """A job script: its bytes, its name in messages, the job's name when the user gives none, where it came from."""

    data: bytes
    name: str
    job_name: str
    from_stdin: bool


def read_script(path: str) -> Script:
    """The script in a file. Raises VTorqueError (VT-SCRIPT) unless it is a readable file of bounded size."""
    data = _read_file(path, "job script")
    return Script(data, path, path.rsplit("/", 1)[-1], False)


def read_standard_input() -> Script:
    """The script on standard input, byte for byte. Raises VTorqueError (VT-SCRIPT) when it is too large."""
    return Script(_read_all(0, "standard input"), "standard input", "STDIN", True)


def read_user_file(path: str, what: str) -> bytes:
    """The bytes of a text file of the user's. Raises VTorqueError (VT-SCRIPT)."""
    data = _read_file(path, what)
    check_text(data, f"the {what} {path!r}")
    return data


def _read_file(path: str, what: str) -> bytes:
    """The bytes of a regular file; a FIFO or a device is refused, and never waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as err:
        reason = err.strerror if isinstance(err, OSError) else "not a path"
        raise VTorqueError(f"cannot read the {what} {path!r}: {reason}", code=Code.SCRIPT) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise VTorqueError(f"the {what} {path!r} is not a file", code=Code.SCRIPT)
        return _read_all(descriptor, f"the {what} {path!r}")
    finally:
        os.close(descriptor)


def check_text(data: bytes, what: str) -> None:
    """Refuse what no shell can read. Raises VTorqueError (VT-SCRIPT)."""
    head = data[:_HEAD]
    if b"\0" in head:
        kind = "a program" if head.startswith(b"\x7fELF") else "binary"
        raise VTorqueError(f"{what} is {kind}, not a script", code=Code.SCRIPT, hint="start it from a shell script")
    if b"\r\n" in data:
        raise VTorqueError(
            f"{what} has DOS/Windows line ends", code=Code.SCRIPT, hint="convert it, for instance by dos2unix"
        )


def _read_all(descriptor: int, what: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        try:
            part = os.read(descriptor, 1 << 20)
        except OSError as err:
            raise VTorqueError(f"cannot read {what}: {err.strerror}", code=Code.SCRIPT) from None
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > MAX_SCRIPT_BYTES:
            raise VTorqueError(f"{what} is larger than {MAX_SCRIPT_BYTES >> 20} MiB", code=Code.SCRIPT)
