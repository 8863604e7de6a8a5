"""Reading and writing a user's files with the user's rights, from root, without trusting what is there.

Any path of a user's may be a FIFO, a link, a huge file, or lie on a file system that hangs. So each access is made by
a child that has the user's credentials and nothing else, is awaited with a limit, and is killed when it takes longer.
Bytes come back, never objects.
"""

from __future__ import annotations

import asyncio
import errno
import grp
import os
import pwd
import re
import select
import signal
import socket
import stat
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.node.process import dies_with

REAP_SECONDS = 0.5
REAP_NOW_SECONDS = 0.05
"""The same where a hook of the batch system waits for it."""
_GROUP_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")

MAX_DESCRIPTORS = 4096
"""As many as an agent may have open: a child of its own closes all of them."""


class User(NamedTuple):
    """A user of the node, as its name service knows it. `groups` holds (name, gid) of the supplementary groups."""

    name: str
    uid: int
    gid: int
    group: str
    home: str
    shell: str
    groups: tuple[tuple[str, int], ...]

    @property
    def gids(self) -> list[int]:
        return [gid for _, gid in self.groups]


def look_up(name: str) -> User:
    """The user `name`. Raises VTorqueError (VT-NODE) when the node does not know it, or when it is root."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise VTorqueError(f"the node does not know the user {name}", code=Code.NODE) from None
    if entry.pw_uid == 0:
        raise VTorqueError("jobs of root do not run in guests", code=Code.NODE)
    gids = [gid for gid in os.getgrouplist(name, entry.pw_gid) if gid not in (0, entry.pw_gid)]
    return User(
        name=entry.pw_name,
        uid=entry.pw_uid,
        gid=entry.pw_gid,
        group=_group_name(entry.pw_gid),
        home=entry.pw_dir,
        shell=entry.pw_shell or "/bin/sh",
        groups=tuple((_group_name(gid), gid) for gid in gids),
    )


def primary_group(user: User) -> Optional[str]:
    """The name of the user's primary group exactly as the node's name service has it, None when it knows none."""
    try:
        return grp.getgrgid(user.gid).gr_name
    except KeyError:
        return None


def _group_name(gid: int) -> str:
    """The group's name, or one that every guest can have: directory services know names with blanks."""
    try:
        name = grp.getgrgid(gid).gr_name
    except KeyError:
        name = ""
    return name if _GROUP_NAME.fullmatch(name) else f"g{gid}"


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

    pid, results = _start(user, work, passes_files=True)
    try:
        data, files = await asyncio.wait_for(_receive(results), timeout_s)
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
        pid, results = _start(user, lambda _: work())
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
        _reap_within(pid, REAP_NOW_SECONDS)
    verdict = said.rpartition(b"\0")[2]
    if verdict != b"ok":
        raise OSError(f"{path}: {verdict.decode('utf-8', 'replace') or 'the process for it died'}")


def _reap_within(pid: int, timeout_s: float) -> None:
    """Collect a child that ends in time; one that hangs in the kernel is left behind."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if poll.poll(timeout_s * 1000):
            os.waitpid(pid, 0)
    finally:
        os.close(fd)


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
    pid, results = _start(user, work)
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


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, in as many pieces as it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


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
    pid, results = _start(user, work)
    try:
        data = await asyncio.wait_for(_drain(results, limit + 4096), timeout_s)
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


def _start(user: User, work: Callable[[int], None], *, passes_files: bool = False) -> tuple[int, int]:
    """Start `work` in a child with the user's credentials: its pid, and where to read what it writes.

    With `passes_files` that is a socket. Raises VTorqueError (VT-INTERNAL).
    """
    dies = dies_with(os.getpid())
    ends: list[int] = []
    try:
        if passes_files:
            ends += [end.detach() for end in socket.socketpair()]
            os.set_blocking(ends[0], False)
        else:
            ends += os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(ends[1], True)
        pid = os.fork()
    except OSError as err:
        for end in ends:
            os.close(end)
        raise VTorqueError(f"no process can be started for the user: {err.strerror}", code=Code.INTERNAL) from err
    results, out = ends
    if pid == 0:
        _child(user, work, out, dies)
    os.close(out)
    return pid, results


def become(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Have these ids from now on, and no way back."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _child(user: User, work: Callable[[int], None], out: int, dies: Callable[[], None]) -> None:
    """In the child: drop to the user for good, do the work, say how it went, end without returning."""
    verdict = b"failed"
    try:
        signal.set_wakeup_fd(-1)
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(sig, signal.SIG_DFL)
        os.closerange(3, out)  # the attempt's lock first of all: one that hangs must not hold it
        os.closerange(out + 1, MAX_DESCRIPTORS)
        become(user.uid, user.gid, user.gids)
        dies()
        os.umask(0o077)
        work(out)
        verdict = b"ok"
    except OSError as err:
        texts = {errno.ELOOP: "a symbolic link", errno.ENXIO: "not a regular file"}
        verdict = texts.get(err.errno or 0, err.strerror or "failed").encode("utf-8", "backslashreplace")
    except BaseException:
        verdict = b"failed"
    finally:
        try:
            write_all(out, b"\0" + verdict)
        finally:
            os._exit(0)


async def _drain(fd: int, limit: int) -> bytes:
    """Everything written to a pipe until its last writer closes it, at most `limit` bytes."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bytes] = loop.create_future()
    chunks: list[bytes] = []

    def readable() -> None:
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        chunks.append(data)
        if (not data or sum(map(len, chunks)) > limit) and not done.done():
            done.set_result(b"".join(chunks)[:limit])

    loop.add_reader(fd, readable)
    try:
        return await done
    finally:
        loop.remove_reader(fd)


async def _receive(fd: int) -> tuple[bytes, list[int]]:
    """What comes over a socket until its other end is closed, with the descriptors that come along."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    chunks: list[bytes] = []
    files: list[int] = []

    def readable() -> None:
        came = array("i")
        try:
            # not socket.recv_fds, which ignores its flags (Python 3.11)
            data, parts, _, _ = way.recvmsg(4096, socket.CMSG_LEN(came.itemsize), socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, parts = b"", []
        chunks.append(data)
        for level, kind, content in parts:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                came.frombytes(content[: len(content) - len(content) % came.itemsize])
        files.extend(came)
        if not data and not done.done():
            done.set_result(None)

    with socket.socket(fileno=os.dup(fd)) as way:
        loop.add_reader(fd, readable)
        try:
            await done
        except BaseException:
            for each in files:
                os.close(each)
            raise
        finally:
            loop.remove_reader(fd)
    return b"".join(chunks), files


def reap_later(pid: int) -> asyncio.Future[None]:
    """Collect the child when it ends; one that hangs in the kernel is left behind without being waited for.

    Gives what is done when it is collected.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        done.set_result(None)
        return done

    def ended() -> None:
        loop.remove_reader(fd)
        os.close(fd)
        os.waitpid(pid, os.WNOHANG)
        done.set_result(None)

    loop.add_reader(fd, ended)
    return done
