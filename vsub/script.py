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


def read_standard_input(*, bounded: bool = True) -> Script:
    """The script on standard input, byte for byte. Raises VTorqueError (VT-SCRIPT) when it is too large.

    One that goes to qsub as it is may have any size.
    """
    return Script(_read_all(0, "standard input", bounded=bounded), "standard input", "STDIN", True)


def read_user_file(path: str, what: str, *, kind: str = "script") -> bytes:
    """The bytes of a text file of the user's, a script or another `kind`. Raises VTorqueError (VT-SCRIPT)."""
    data = _read_file(path, what)
    check_text(data, f"the {what} {path!r}", kind)
    return data.replace(b"\r\n", b"\n")


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


def as_job_script(script: Script) -> tuple[Script, tuple[str, ...]]:
    """The script as the job runs it, with Unix line ends, and what is to be said of that.

    Of standard input qsub turns DOS line ends itself; a file with them it refuses. Raises VTorqueError (VT-SCRIPT).
    """
    what = "the job script" if script.from_stdin else f"the job script {script.name!r}"
    check_text(script.data, what)
    if b"\r\n" not in script.data:
        return script, ()
    turned = script._replace(data=script.data.replace(b"\r\n", b"\n"))
    return turned, () if script.from_stdin else (f"{what} has DOS line ends; the job gets it with Unix line ends",)


def check_text(data: bytes, what: str, wanted: str = "script") -> None:
    """Refuse what no shell can read. Raises VTorqueError (VT-SCRIPT)."""
    head = data[:_HEAD]
    if b"\0" in head:
        kind = "a program" if head.startswith(b"\x7fELF") else "binary"
        hint = "start it from a shell script" if wanted == "script" else None
        raise VTorqueError(f"{what} is {kind}, not a {wanted}", code=Code.SCRIPT, hint=hint)


def _read_all(descriptor: int, what: str, *, bounded: bool = True) -> bytes:
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
        if bounded and size > MAX_SCRIPT_BYTES:
            raise VTorqueError(f"{what} is larger than {MAX_SCRIPT_BYTES >> 20} MiB", code=Code.SCRIPT)
