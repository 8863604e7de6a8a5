"""Programs on other nodes, run as the caller over the caller's own SSH (`login.py`); on this node without it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmgr.errors import Code, VTorqueError
from vmgr.reach.login import connect, reason

if TYPE_CHECKING:
    import paramiko

MAX_OUTPUT_BYTES = 16 << 20
MAX_ERROR_BYTES = 64 << 10
_CHUNK = 1 << 16
_END_SECONDS = 2.0
_NODE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9])?")


class Completed(NamedTuple):
    """How a program ended, and what it printed, both bounded; a negative status is a signal's number."""

    status: int
    out: bytes
    err: bytes


def is_here(node: str) -> bool:
    """Whether a node of the batch system is this machine: by its name, which may be short on one side."""
    own = os.uname().nodename
    if node in (own, "localhost"):
        return True
    either_short = "." not in node or "." not in own
    return either_short and node.partition(".")[0] == own.partition(".")[0]


def run_on(node: str, argv: Sequence[str], *, timeout_s: float, limit: int = MAX_OUTPUT_BYTES) -> Completed:
    """Run a program on a node, with nothing on its standard input, and wait for its end.

    Raises VTorqueError (VT-CONNECT) when the node cannot be reached, forbids the login, or the time is over.
    """
    deadline = _Deadline(timeout_s)
    with _opened(node, argv, timeout_s) as stream, deadline.closing(stream):
        with contextlib.suppress(OSError):
            stream.socket.shutdown(socket.SHUT_WR)
        out = bytearray()
        while data := _receive(stream.socket):
            out += data[: max(0, limit + 1 - len(out))]
        status = stream.wait()
        if deadline.over:
            raise VTorqueError(f"node {node} has not answered within {timeout_s:g} s", code=Code.CONNECT)
        if len(out) > limit:
            raise VTorqueError(f"node {node} answers with more than {limit} bytes", code=Code.CONNECT)
        return Completed(status, bytes(out), stream.errors())


def open_on(node: str, argv: Sequence[str], *, timeout_s: float) -> Stream:
    """Start a program on a node, its standard input and output connected to `Stream.socket`.

    `timeout_s` bounds the connection, not the program. Raises VTorqueError (VT-CONNECT), also for what can be no node's
    name: another node may have said it, and it becomes a word of command lines. Close what is given.
    """
    if not _NODE.fullmatch(node):
        raise VTorqueError(f"{node[:80]!r} is no node's name", code=Code.CONNECT)
    return _Local(argv) if is_here(node) else _Remote(node, argv, timeout_s)


@contextlib.contextmanager
def _opened(node: str, argv: Sequence[str], timeout_s: float) -> Iterator[Stream]:
    stream = open_on(node, argv, timeout_s=timeout_s)
    try:
        yield stream
    finally:
        stream.close()


class _Deadline:
    """Closes a stream when the time is over."""

    def __init__(self, timeout_s: float) -> None:
        self.over = False
        self._timeout_s = timeout_s

    @contextlib.contextmanager
    def closing(self, stream: Stream) -> Iterator[None]:
        def end() -> None:
            self.over = True
            stream.close()

        timer = threading.Timer(self._timeout_s, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class Stream:
    """A program that runs on a node: `socket` is its standard input and output; what it says beside is kept."""

    def __init__(self) -> None:
        self.socket, self._theirs = socket.socketpair()
        self._errors = bytearray()

    def wait(self) -> int:
        """The exit status, at the program's end."""
        raise NotImplementedError

    def close(self) -> None:
        """End the program, if it still runs, and the connection; idempotent, from any thread."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def errors(self) -> bytes:
        """The beginning of what the program has printed on standard error; complete when it has ended."""
        return bytes(self._errors)

    def failure(self, printed: bytes) -> VTorqueError:
        """Why the program has ended, from its last line on standard error, else of what it has `printed`.

        That is its own failure, or words of the site's, as those of a login shell that lets nobody in.
        """
        lines = (self.errors().strip() or printed).decode(errors="replace").strip().splitlines()
        code, colon, text = (lines[-1] if lines else "").partition(": ")
        known = Code.named(code) if colon else Code.INTERNAL
        if known is not Code.INTERNAL:
            return VTorqueError(text, code=known)
        said = f": {lines[-1][:300]}" if lines else ""
        return VTorqueError(f"{self._place()} has not answered as vTorque does{said}", code=Code.CONNECT)

    def _place(self) -> str:
        raise NotImplementedError

    def _keep(self, data: bytes) -> None:
        self._errors += data[: max(0, MAX_ERROR_BYTES - len(self._errors))]


class _Local(Stream):
    """A program on this node."""

    def __init__(self, argv: Sequence[str]) -> None:
        super().__init__()
        try:
            self._child = subprocess.Popen(
                list(argv),
                stdin=self._theirs.fileno(),
                stdout=self._theirs.fileno(),
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as err:
            self.socket.close()
            raise VTorqueError(f"cannot run {argv[0]}: {err.strerror}", code=Code.CONNECT) from None
        finally:
            self._theirs.close()
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    def _read_errors(self) -> None:
        assert self._child.stderr is not None
        with self._child.stderr as stream:
            while data := os.read(stream.fileno(), _CHUNK):
                self._keep(data)

    def wait(self) -> int:
        status = self._child.wait()
        self._reader.join(_END_SECONDS)
        return status

    def close(self) -> None:
        super().close()
        if self._child.poll() is None:
            try:
                self._child.wait(0.2 if self._reader.is_alive() else 0)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._child.pid, signal.SIGKILL)
                self._child.wait()

    def _place(self) -> str:
        return "this node"


class _Remote(Stream):
    """A program on another node."""

    def __init__(self, node: str, argv: Sequence[str], timeout_s: float) -> None:
        super().__init__()
        self._node = node
        try:
            self._client = connect(node, timeout_s)
        except BaseException:
            self.socket.close()
            self._theirs.close()
            raise
        try:
            self._channel = self._start(argv, timeout_s)
        except BaseException:
            self.socket.close()
            self._theirs.close()
            self._client.close()
            raise
        self._pumps = [
            threading.Thread(target=work, daemon=True) for work in (self._send, self._receive, self._read_errors)
        ]
        for pump in self._pumps:
            pump.start()

    def _start(self, argv: Sequence[str], timeout_s: float) -> paramiko.Channel:
        import paramiko

        transport = self._client.get_transport()
        try:
            if transport is None:
                raise paramiko.SSHException("the connection has ended")
            channel = transport.open_session(timeout=timeout_s)
            channel.exec_command(shlex.join(argv))
            return channel
        except (paramiko.SSHException, OSError, EOFError) as err:
            raise VTorqueError(
                f"node {self._node} runs no program for you: {reason(err)}",
                code=Code.CONNECT,
                hint="does the site forbid it? Then use vmgr on the node, from within the job",
            ) from None

    def _send(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while data := _receive(self._theirs):
                self._channel.sendall(data)
            self._channel.shutdown_write()

    def _receive(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while data := self._channel.recv(_CHUNK):
                self._theirs.sendall(data)
        with contextlib.suppress(OSError):
            self._theirs.shutdown(socket.SHUT_WR)

    def _read_errors(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while data := self._channel.recv_stderr(_CHUNK):
                self._keep(data)

    def wait(self) -> int:
        status = int(self._channel.recv_exit_status())  # at the latest when the connection is closed: then -1
        self._pumps[2].join(_END_SECONDS)
        return status

    def close(self) -> None:
        super().close()
        self._client.close()

    def _place(self) -> str:
        return f"node {self._node}"


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(_CHUNK)
    except OSError:
        return b""
