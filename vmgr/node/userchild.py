"""Children with a user's credentials: started from root, heard through a pipe or a socket, collected when they end.

A child says at the end of what it writes, behind a zero byte, how its work went: "ok", or what is wrong. One that hangs
in the kernel, on a file system that does not answer, is left behind, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import socket
from array import array
from collections.abc import Sequence
from typing import Callable

from vmgr.errors import Code, VTorqueError
from vmgr.node.process import dies_with
from vmgr.node.user import User

MAX_DESCRIPTORS = 4096
"""As many as an agent may have open: a child of its own closes all of them."""


def start(user: User, work: Callable[[int], None], *, passes_files: bool = False) -> tuple[int, int]:
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


def become(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Have these ids from now on, and no way back."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, in as many pieces as it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


async def drain(fd: int, limit: int) -> bytes:
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


async def receive(fd: int) -> tuple[bytes, list[int]]:
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


def reap_within(pid: int, timeout_s: float) -> None:
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
