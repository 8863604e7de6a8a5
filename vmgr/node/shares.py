"""The file servers of a guest's shares of kind `virtiofs`: one for each, with the rights of the job's user alone.

A server is a child of the agent that gives up root before it becomes virtiofsd: it opens the folder with the user's
ids and groups, makes of it what nobody can write where the share is read-only, and serves just that. So no path of
the user's is looked at as root, and a file system that does not answer holds up the child alone. QEMU gets the other
end of a connection that is made here; the socket's name is gone before anybody else could use it.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, NamedTuple, NoReturn, Optional

from vmgr.config import Mount
from vmgr.errors import Code, VTorqueError
from vmgr.logs import LOGGER
from vmgr.node import process, record, syscalls
from vmgr.node.jobgroup import JobGroup
from vmgr.node.user import User
from vmgr.node.userchild import MAX_DESCRIPTORS
from vmgr.node.virtiofsd import Virtiofsd, examine

MAX_SAID_BYTES = 4096
MAX_OPEN_FILES = 1_000_000
"""A server holds a descriptor for each file that the guest's kernel remembers."""
KILL_SECONDS = 5.0
_LISTENER, _FOLDER = 3, 4
_NO_GROUP = JobGroup()
_ASK_FEATURES = struct.pack("<III", 1, 1, 0)
"""vhost-user's VHOST_USER_GET_FEATURES, version 1, without a payload; QEMU asks the same again."""
_FEATURES_BYTES = 20


class Server:
    """One running virtiofsd: it ends when QEMU's end of its connection closes, and dies with this process."""

    def __init__(self, share: str, pid: int, connection: socket.socket, errors: int) -> None:
        self.share = share
        self.pid = pid
        self.status: Optional[int] = None
        """What waitpid gave; None as long as it lives."""
        self._connection: Optional[socket.socket] = connection
        self._errors = errors
        self._said = b""
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(pid)
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._reap)
        self._loop.add_reader(errors, self._listen)

    @property
    def socket_fd(self) -> int:
        """QEMU's end of the connection, until it is let go of."""
        assert self._connection is not None
        return self._connection.fileno()

    def let_go(self) -> None:
        """Close the end of the connection that QEMU has by now, so that the server notices QEMU's end."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def ended(self) -> None:
        """Return when it has ended and is reaped."""
        await asyncio.shield(self._done)

    def describe_end(self) -> str:
        """How it ended, with the last of what it said."""
        code = None if self.status is None else os.waitstatus_to_exitcode(self.status)
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        said = self._said.decode("utf-8", "replace").strip().splitlines()
        return f"{how}{': ' + said[-1][:300] if said else ''}"

    async def kill(self) -> None:
        """End it at once; one that waits for a file system that does not answer is left to the record."""
        self.let_go()
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)  # not reaped yet: the number is still its own
            await asyncio.wait([self._done], timeout=KILL_SECONDS)
            if self.status is None:
                LOGGER.warning("the file server of the share %s (pid %d) does not end", self.share, self.pid)

    async def settle(self, timeout_s: float) -> None:
        """Wait until it answers: it has the folder, and no right that the user has not. Raises VTorqueError."""
        assert self._connection is not None
        answering = asyncio.ensure_future(_ask(self._connection))
        try:
            await asyncio.wait([answering, self._done], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if answering.done() and answering.exception() is None:
                return
            if answering.done():  # the connection broke, so it is about to end
                await asyncio.wait([self._done], timeout=timeout_s)
            if self.status is None:
                raise self.refused(f"its file server did not answer within {timeout_s:g} s")
            raise self.refused(f"its file server: {self.describe_end()}")
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)  # it lets go of the connection

    def refused(self, reason: str) -> VTorqueError:
        return VTorqueError(f"the share {self.share} cannot be served: {reason}", code=Code.LAUNCH)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._listen()
        if self._errors >= 0:
            self._close_errors()
        self.status = os.waitpid(self.pid, os.WNOHANG)[1]
        self._done.set_result(None)

    def _listen(self) -> None:
        """Keep the end of what it says, and let it say more: a full pipe would stop it."""
        try:
            data = os.read(self._errors, 65536) if self._errors >= 0 else b""
        except BlockingIOError:
            return
        if data:
            self._said = (self._said + data)[-MAX_SAID_BYTES:]
        elif self._errors >= 0:
            self._close_errors()

    def _close_errors(self) -> None:
        self._loop.remove_reader(self._errors)
        os.close(self._errors)
        self._errors = -1


class Shares(NamedTuple):
    """The file servers of one guest, one for each of its shares in their order, None where the kind needs none."""

    servers: tuple[Optional[Server], ...]

    @property
    def running(self) -> list[Server]:
        return [server for server in self.servers if server is not None]

    @property
    def fds(self) -> tuple[Optional[int], ...]:
        """QEMU's ends of the connections, for `qemu.Descriptors.shares`."""
        return tuple(None if server is None else server.socket_fd for server in self.servers)

    def let_go(self) -> None:
        """Close the ends that QEMU has: to be called as soon as it is started, or will not be."""
        for server in self.running:
            server.let_go()

    async def ended(self) -> str:
        """Wait until one of them ends; the guest's use of that share hangs then. Gives what happened, as one line.

        They end with QEMU too: whoever waits for this looks at that first. Without servers this waits for ever.
        """
        waiting = [asyncio.ensure_future(server.ended()) for server in self.running]
        try:
            if not waiting:
                await asyncio.get_running_loop().create_future()
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        server = next(server for server in self.running if server.status is not None)
        return f"the file server of the share {server.share} ended ({server.describe_end()})"

    async def kill(self) -> None:
        """End all of them; they are gone by themselves where QEMU is."""
        await asyncio.gather(*(server.kill() for server in self.running))


async def serve_all(
    mounts: Sequence[Mount],
    user: User,
    place: record.Place,
    *,
    virtiofsd: str,
    timeout_s: float,
    group: JobGroup = _NO_GROUP,
) -> Shares:
    """Start what serves a guest's shares, before its QEMU. Each stands in the attempt's record.

    `mounts` are those of the user; `virtiofsd` is the program's path; they are in the job's control `group` from their
    start. Raises VTorqueError (VT-LAUNCH, VT-NODE,
    VT-TRUST); none of them is left then.
    """
    if not any(mount.kind == "virtiofs" for mount in mounts):
        return Shares((None,) * len(mounts))
    program = await examine(virtiofsd)
    starting = [
        asyncio.ensure_future(serve(mount, user, place, program=program, timeout_s=timeout_s, group=group))
        for mount in mounts
        if mount.kind == "virtiofs"
    ]
    try:
        await asyncio.gather(*starting)
    except BaseException:
        for task in starting:
            task.cancel()
        done = await asyncio.gather(*starting, return_exceptions=True)
        await asyncio.gather(*(server.kill() for server in done if isinstance(server, Server)))
        raise
    servers = iter(task.result() for task in starting)
    return Shares(tuple(next(servers) if mount.kind == "virtiofs" else None for mount in mounts))


async def serve(
    mount: Mount,
    user: User,
    place: record.Place,
    *,
    program: Virtiofsd,
    timeout_s: float,
    group: JobGroup = _NO_GROUP,
) -> Server:
    """Start the file server of one share and wait until it answers. Raises VTorqueError (VT-LAUNCH)."""
    try:
        with group.opened() as joins:
            server = _start(mount, user, place, program, joins)
    except OSError as err:
        raise VTorqueError(f"the share {mount.name} cannot be served: {err.strerror or err}", code=Code.LAUNCH) from err
    try:
        found = process.identify(server.pid)
        if found is not None:  # else it has ended, and says why
            record.append(place, {"do": "process", "role": "virtiofsd", **found._asdict()})
        await server.settle(timeout_s)
    except BaseException as err:
        await server.kill()
        if isinstance(err, OSError):
            raise server.refused(f"the record cannot be written: {err.strerror}") from err
        raise
    return server


def _start(mount: Mount, user: User, place: record.Place, program: Virtiofsd, joins: Sequence[int]) -> Server:
    dies = process.dies_with(os.getpid())
    listener, connection = _connected(place.folder, f"share.{mount.name}")
    ends: Sequence[int] = ()
    try:
        ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(ends[1], True)
        pid = os.fork()
        if pid == 0:
            _child(mount, user, program, listener.fileno(), ends[1], dies, joins)
    except OSError:
        connection.close()
        for end in ends[:1]:
            os.close(end)
        raise
    finally:
        listener.close()
        for end in ends[1:]:
            os.close(end)
    try:
        return Server(mount.name, pid, connection, ends[0])
    except OSError:  # no descriptor is left for it
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        connection.close()
        os.close(ends[0])
        raise


def _connected(folder: Path, name: str) -> tuple[socket.socket, socket.socket]:
    """A listening socket with one connection waiting, and that connection's other end; its name is gone again.

    `folder` is root's alone. It is reached through a descriptor, since the path of a socket has to be short.
    """
    at = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listener, connection = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    address = f"/proc/self/fd/{at}/{name}"
    try:
        listener.bind(address)
        try:
            listener.listen(1)
            connection.connect(address)
        finally:
            os.unlink(name, dir_fd=at)
    except OSError:
        listener.close()
        connection.close()
        raise
    finally:
        os.close(at)
    return listener, connection


def _child(
    mount: Mount,
    user: User,
    program: Virtiofsd,
    listener: int,
    errors: int,
    dies: Callable[[], None],
    joins: Sequence[int],
) -> NoReturn:
    """In the child: keep two descriptors, become the user, become the server."""
    try:
        signal.set_wakeup_fd(-1)
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(sig, signal.SIG_DFL)
        for fd in joins:
            os.write(fd, b"0")  # this process (cgroups(7))
        _keep(listener, errors)
        os.setsid()
        os.chdir("/")
        _limits()
        os.setgroups(user.gids)
        os.setresgid(user.gid, user.gid, user.gid)
        syscalls.set_file_user(user.uid)
        folder = os.open(mount.source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if mount.readonly and not program.can_refuse_writes:
            folder = syscalls.read_only_tree(folder)
        _put(folder, _FOLDER)
        syscalls.become(user.uid, user.gid, user.gids if program.takes_groups else [], program.capabilities)
        dies()
        argv = program.command(f"/proc/self/fd/{_FOLDER}/.", _LISTENER, readonly=mount.readonly)
        os.execve(argv[0], argv, {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})
    except OSError as err:
        os.write(2, f"{err.strerror}{': ' + str(err.filename) if err.filename else ''}\n".encode())
    finally:
        os._exit(1)


def _keep(listener: int, errors: int) -> None:
    """Let the child have nothing of this process open but the listening socket and the pipe for errors."""
    apart = [fcntl.fcntl(fd, fcntl.F_DUPFD, _FOLDER + 1) for fd in (listener, errors)]  # not in each other's way
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd, number in ((null, 0), (null, 1), (apart[1], 2), (apart[0], _LISTENER)):
        _put(fd, number)
    os.closerange(_LISTENER + 1, MAX_DESCRIPTORS)


def _put(fd: int, number: int) -> None:
    """Have a descriptor under this number, for the program that comes next."""
    os.dup2(fd, number)
    os.set_inheritable(number, True)  # where it had that number already


def _limits() -> None:
    """As many open files as it may have; and the kernel may kill it for want of memory, whatever the mom is spared."""
    most = max(MAX_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ValueError, OSError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    score = Path("/proc/self/oom_score_adj")
    if int(score.read_text()) < 0:
        score.write_text("0")


async def _ask(connection: socket.socket) -> None:
    """Ask a server for its features, and take the answer whole."""
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    await loop.sock_sendall(connection, _ASK_FEATURES)
    left = _FEATURES_BYTES
    while left:
        data = await loop.sock_recv(connection, left)
        if not data:
            raise ConnectionResetError
        left -= len(data)
    connection.setblocking(True)
