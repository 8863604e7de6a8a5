"""Work in a child of the agent, with root's or the user's rights: it is recorded before it begins, and can be ended.

Copying takes long, and a file system may hang: the agent's loop waits for neither. The child tells how far it is, can
hand over descriptors that it has opened, and is gone when the agent is, however that ends.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterable, Sequence
from typing import Any, Callable, NamedTuple, Optional

from vmgr.errors import Code, VTorqueError, printable
from vmgr.node import process, record
from vmgr.node.user import User
from vmgr.node.userchild import MAX_DESCRIPTORS, become, reap_later
from vmgr.node.userio import REAP_SECONDS

_MAX_BYTES = 8192
_MAX_TEXT = 300
_MAX_FDS = 8


class Channel:
    """The child's way to the agent."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def tell(self, text: str) -> None:
        """Say what is being done."""
        self._send({"tell": text})

    def wait(self, text: str) -> None:
        """Say what is waited for, which may take any time, until something else is told."""
        self._send({"tell": text, "waits": True})

    def give(self, *descriptors: int) -> None:
        """Hand over descriptors, at most 8 at a time."""
        fds = array.array("i", descriptors)
        self._send({}, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])

    def end(self, verdict: dict[str, Any]) -> None:
        """Say how it went: `result`, or `failed` with `hint`."""
        self._send(verdict)

    def _send(self, message: dict[str, Any], ancillary: Iterable[tuple[int, int, Any]] = ()) -> None:
        self._link.sendmsg([json.dumps(message).encode()], ancillary)


class Outcome(NamedTuple):
    """What the work gave: its result, plain data, and the descriptors handed over, which are the caller's now."""

    result: Any
    descriptors: list[int]


async def in_child(
    place: record.Place,
    user: Optional[User],
    work: Callable[[Channel], Any],
    *,
    keep: Sequence[int],
    tell: Callable[[str], None],
    silence_s: float,
) -> Outcome:
    """Do `work` in a child with the rights of `user`, or root's, and the descriptors `keep`.

    Nothing is done before the child stands in the record. It is killed when the caller is cancelled, and when it has
    told nothing for `silence_s` seconds. Raises VTorqueError: what `work` raised, or VT-STAGE.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    dies = process.dies_with(os.getpid())
    received: list[int] = []
    try:
        try:
            pid = os.fork()
        except OSError as err:
            theirs.close()
            raise VTorqueError(f"no process can be started: {err.strerror}", code=Code.STAGE) from err
        if pid == 0:
            _child(user, work, theirs, keep, dies)
        theirs.close()
        gone = reap_later(pid)
        try:
            ours.setblocking(False)
            found = process.identify(pid)
            if found is not None:
                record.append(place, {"do": "process", "role": "stager", **found._asdict()})
                ours.send(b"go")
            result = await _listen(ours, received, tell, silence_s)
        finally:
            await _end(pid, gone)
    except BaseException as err:
        for fd in received:
            os.close(fd)
        if isinstance(err, (EOFError, ConnectionError)):
            raise VTorqueError("the process that makes the disk has died", code=Code.STAGE) from err
        raise
    finally:
        ours.close()
    return Outcome(result, received)


async def _end(pid: int, gone: asyncio.Future[None]) -> None:
    """Kill the child unless it is gone; one that hangs in the kernel is left behind without being waited for."""
    if not gone.done():
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait([gone], timeout=REAP_SECONDS)


async def _listen(link: socket.socket, received: list[int], tell: Callable[[str], None], silence_s: float) -> Any:
    """The result that the child tells. Raises EOFError when it ends without one."""
    limit: Optional[float] = silence_s
    while True:
        message = await _receive(link, received, limit)
        if message is None:
            raise VTorqueError(
                f"the disk is not ready, and nothing has moved for {silence_s:g} s",
                code=Code.STAGE,
                hint="do the image pool and the workspace answer?",
            )
        if "failed" in message:
            raise VTorqueError(_text(message["failed"]), code=Code.STAGE, hint=_text(message.get("hint")) or None)
        if "result" in message:
            return message["result"]
        if "tell" in message:
            limit = None if message.get("waits") else silence_s
            tell(_text(message["tell"]))


def _text(value: object) -> str:
    return printable(str(value or "")[:_MAX_TEXT])


async def _receive(link: socket.socket, received: list[int], limit_s: Optional[float]) -> Optional[dict[str, Any]]:
    """The next message, None when none comes in time; the descriptors that come with it are added to `received`.

    Raises EOFError when the child has ended.
    """
    loop = asyncio.get_running_loop()
    coming: asyncio.Future[bool] = loop.create_future()

    def settle(there: bool) -> None:
        if not coming.done():
            coming.set_result(there)

    timer = loop.call_later(limit_s, settle, False) if limit_s is not None else None
    loop.add_reader(link, settle, True)
    try:
        if not await coming:
            return None
    finally:
        loop.remove_reader(link)
        if timer is not None:
            timer.cancel()
    # not socket.recv_fds, which leaves its flags aside before Python 3.12
    space = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
    data, ancillary, _, _ = link.recvmsg(_MAX_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received += array.array("i", content)
    if not data:
        raise EOFError
    try:
        message = json.loads(data)
    except ValueError:
        message = None
    return message if isinstance(message, dict) else {}


def _child(
    user: Optional[User],
    work: Callable[[Channel], Any],
    link: socket.socket,
    keep: Sequence[int],
    dies: Callable[[], None],
) -> None:
    """In the child: be nobody else's, wait for the word, do the work, say how it went, end without returning."""
    try:
        channel = Channel(link)
        try:
            let_go([link.fileno(), *keep])
            if user is not None:
                become(user.uid, user.gid, user.gids)
            dies()
            os.umask(0o077)
            if link.recv(16) == b"go":
                channel.end({"result": work(channel)})
        except VTorqueError as err:
            channel.end({"failed": err.message, "hint": err.hint})
        except OSError as err:
            channel.end({"failed": err.strerror or "failed"})
    finally:
        os._exit(0)


def let_go(keep: Iterable[int]) -> None:
    """Close all descriptors but these, the attempt's lock first of all, and have nobody wait for our output."""
    signal.set_wakeup_fd(-1)
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sig, signal.SIG_DFL)
    last = 2
    for fd in sorted(fd for fd in keep if fd > 2):
        os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, MAX_DESCRIPTORS)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    os.close(nowhere)
