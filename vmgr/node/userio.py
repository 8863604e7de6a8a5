"""Reading and writing a user's files with the user's rights, from root, without trusting what is there.

Any path of a user's may be a FIFO, a link, a huge file, or lie on a file system that hangs. So each access is made by
a child that has the user's credentials and nothing else, is awaited with a limit, and is killed when it takes longer.
Bytes come back, never objects.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import stat
import time
from pathlib import Path
from typing import Callable, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.node.user import User
from vmgr.node.userchild import drain, reap_later, reap_within, receive, start, write_all

REAP_SECONDS = 0.5
REAP_NOW_SECONDS = 0.05
"""The same where a hook of the batch system waits for it."""


def open_own(path: str, user: User, flags: int) -> tuple[int, os.stat_result]:
    """A regular file of the user's own, opened in a child with the user's rights, without blocking, and what it is.

    No link is followed in the last component; FIFOs and devices are not waited for. Raises OSError saying what is
    wrong.
    """
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(0, "not a regular file")
    if info.st_uid != user.uid:
        raise OSError(0, "not owned by the job's user")
    return fd, info


async def read_file(user: User, path: str, *, limit: int, timeout_s: float) -> bytes:
    """The content of a regular file of the user's own, read as the user.

    No link is followed in the last component; FIFOs and devices are not waited for. Raises VTorqueError (VT-SPEC)
    saying what is wrong with it.
    """

    def read(out: int) -> None:
        fd, info = open_own(path, user, os.O_RDONLY)
        if info.st_size > limit:
            raise OSError(0, f"larger than {limit} bytes")
        left = limit + 1
        while left > 0:
            data = os.read(fd, min(left, 65536))
            if not data:
                return
            left -= len(data)
            write_all(out, data)
        raise OSError(0, f"larger than {limit} bytes")

    return await _as_user(user, read, path, limit=limit, timeout_s=timeout_s)


async def write_file(user: User, path: str, data: bytes, *, timeout_s: float) -> None:
    """Write a file of the user's whole and rename it into place, as the user. Raises VTorqueError (VT-SPEC)."""

    await _as_user(user, lambda _: _write_whole(path, data), path, limit=0, timeout_s=timeout_s)


async def write_in_folder(user: User, folder: str, name: str, data: bytes, *, timeout_s: float) -> None:
    """As `write_file`, in a folder that is made where it is not there."""

    def write(_: int) -> None:
        try:
            Path(folder).mkdir(0o700)
        except FileExistsError:
            pass
        _write_whole(f"{folder}/{name}", data)

    await _as_user(user, write, f"{folder}/{name}", limit=0, timeout_s=timeout_s)


async def act(
    user: User, work: Callable[[], None], path: str, *, timeout_s: float, code: Code, hint: Optional[str] = None
) -> None:
    """Do something to `path` with the user's rights. `work` says what is wrong by OSError.

    Raises VTorqueError with `code` and `hint`.
    """
    await _as_user(user, lambda _: work(), path, limit=0, timeout_s=timeout_s, code=code, hint=hint)


async def read_from(
    user: User,
    work: Callable[[], bytes],
    path: str,
    *,
    limit: int,
    timeout_s: float,
    code: Code,
    hint: Optional[str] = None,
) -> bytes:
    """What `work` gives, called with the user's rights, at most `limit` bytes; its process is collected by then.

    Raises VTorqueError with `code` and `hint`, saying what is wrong with `path`.
    """

    def write(out: int) -> None:
        data = work()
        if len(data) > limit:
            raise OSError(0, f"larger than {limit} bytes")
        write_all(out, data)

    async def everything(reader: asyncio.StreamReader) -> bytes:
        came = bytearray()
        while len(came) < limit + 4096 and (data := await reader.read(65536)):
            came += data
        return bytes(came)

    stream = await read_stream(user, write)
    try:
        data = await asyncio.wait_for(everything(stream.reader), timeout_s)
    except asyncio.TimeoutError:
        raise _too_late(path, timeout_s, code) from None
    finally:
        await stream.close()
    body, _, verdict = data.rpartition(b"\0")
    _judge(verdict, path, code, hint)
    return body


async def open_file(
    user: User, opens: Callable[[], int], path: str, *, timeout_s: float, code: Code, hint: Optional[str] = None
) -> int:
    """The descriptor that `opens` gives, called with the user's rights; whatever it locks stays locked.

    Raises VTorqueError with `code` and `hint`, saying what is wrong with `path`.
    """
    fd, _ = await open_and_look(user, lambda: (opens(), b""), path, timeout_s=timeout_s, code=code, hint=hint)
    return fd


async def open_and_look(
    user: User,
    opens: Callable[[], tuple[int, bytes]],
    path: str,
    *,
    timeout_s: float,
    code: Code,
    hint: Optional[str] = None,
) -> tuple[int, bytes]:
    """As `open_file`, with what `opens` has seen in the file, up to 4000 bytes."""

    def work(out: int) -> None:
        fd, seen = opens()
        with socket.socket(fileno=os.dup(out)) as way:
            socket.send_fds(way, [b"\0"], [fd])
        write_all(out, seen[:4000])

    pid, results = start(user, work, passes_files=True)
    try:
        data, files = await asyncio.wait_for(receive(results), timeout_s)
    except BaseException as err:
        os.kill(pid, signal.SIGKILL)
        if isinstance(err, asyncio.TimeoutError):
            raise _too_late(path, timeout_s, code) from None
        raise
    finally:
        os.close(results)
        reap_later(pid)
    try:
        seen, _, verdict = data.rpartition(b"\0")
        _judge(verdict, path, code, hint)
        return files.pop(), seen[1:]
    finally:
        for fd in files:
            os.close(fd)


def act_now(user: User, work: Callable[[], None], path: str, *, timeout_s: float) -> None:
    """The same for a program without a loop, which waits for it. Raises OSError."""
    try:
        pid, results = start(user, lambda _: work())
    except VTorqueError as err:
        raise OSError(err.message) from err
    try:
        deadline = time.monotonic() + timeout_s
        said = b""
        poll = select.poll()
        poll.register(results, select.POLLIN)
        while True:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise OSError(f"{path}: not done after {timeout_s:.2f} s")
            data = os.read(results, 4096)
            if not data:
                break
            said = (said + data)[-4096:]
    finally:
        os.close(results)
        os.kill(pid, signal.SIGKILL)  # it has ended, or is to
        reap_within(pid, REAP_NOW_SECONDS)
    verdict = said.rpartition(b"\0")[2]
    if verdict != b"ok":
        raise OSError(f"{path}: {verdict.decode('utf-8', 'replace') or 'the process for it died'}")


class Stream:
    """What a child with a user's rights writes, until it is closed, which ends the child."""

    def __init__(self, reader: asyncio.StreamReader, transport: asyncio.BaseTransport, pid: int) -> None:
        self.reader = reader
        self._transport = transport
        self._pid = pid

    async def close(self) -> None:
        """End the child; one that hangs in the kernel is left behind without being waited for."""
        self._transport.close()
        os.kill(self._pid, signal.SIGKILL)  # not reaped yet: the number is still its own
        await asyncio.wait([reap_later(self._pid)], timeout=REAP_SECONDS)


async def read_stream(user: User, work: Callable[[int], None]) -> Stream:
    """Start a child with the user's credentials for `work`, which writes to the descriptor that it is given."""
    pid, results = start(user, work)
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    loop = asyncio.get_running_loop()
    try:
        transport, _ = await loop.connect_read_pipe(lambda: protocol, os.fdopen(results, "rb", buffering=0))
    except BaseException:  # given up before it has begun
        os.kill(pid, signal.SIGKILL)
        reap_later(pid)
        raise
    return Stream(reader, transport, pid)


def _write_whole(path: str, data: bytes) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    write_all(fd, data)
    os.close(fd)
    os.rename(temporary, path)


async def _as_user(
    user: User,
    work: Callable[[int], None],
    path: str,
    *,
    limit: int,
    timeout_s: float,
    code: Code = Code.SPEC,
    hint: Optional[str] = "submit again by vsub",
) -> bytes:
    """What `work` wrote to its descriptor, run in a child with the user's credentials."""
    pid, results = start(user, work)
    try:
        data = await asyncio.wait_for(drain(results, limit + 4096), timeout_s)
    except asyncio.TimeoutError:
        os.kill(pid, signal.SIGKILL)
        raise _too_late(path, timeout_s, code) from None
    finally:
        os.close(results)
        reap_later(pid)
    body, _, verdict = data.rpartition(b"\0")
    _judge(verdict, path, code, hint)
    return body


def _too_late(path: str, timeout_s: float, code: Code) -> VTorqueError:
    return VTorqueError(
        f"{path} could not be used within {timeout_s:g} s", code=code, hint="does its file system answer?"
    )  # fmt: skip


def _judge(verdict: bytes, path: str, code: Code, hint: Optional[str]) -> None:
    """Raise VTorqueError unless a child has said that all went well."""
    if verdict != b"ok":
        reason = verdict.decode("utf-8", "replace") if verdict else "the process for it died"
        raise VTorqueError(f"{path} cannot be used: {reason}", code=code, hint=hint)
