"""`qsub -I`: waits for the job to start and is its terminal until it ends.

What is said and which signals do what follows cmds/qsub_functions.c of TORQUE 6.1. The window's size is sent
once, with the submission.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import signal
import termios
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn, Optional

from vsub.engines.local import command, protocol
from vsub.engines.local.command import Failure
from vsub.engines.local.protocol import ProtocolError, Refused

DEFAULT_SIZE = (20, 80, 0, 0)
PATIENCE_S = 60
"""How long the question whether to end the job waits for its answer."""
CHUNK = 4096
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGTSTP)
"""What qsub ignores while the job runs: the keys belong to the job."""
_CONTROLS = (termios.VINTR, termios.VQUIT, termios.VERASE, termios.VKILL, termios.VEOF, termios.VSUSP)


class _Bailout(Exception):
    """The user gives up waiting."""


class _HungUp(Exception):
    """The terminal has gone."""


def _have_terminal() -> bool:
    return os.isatty(0) and os.isatty(1)


def _say(text: str) -> None:
    """Write to standard output at once: signal handlers do so as well."""
    os.write(1, text.encode("utf-8", "surrogateescape"))


def _size() -> list[int]:
    size = array.array("H", DEFAULT_SIZE)
    if _have_terminal():
        try:
            fcntl.ioctl(0, termios.TIOCGWINSZ, size)
        except OSError:
            pass
    return list(size)


def terminal(program: Optional[str]) -> dict[str, Any]:
    """What the job is to know of qsub's terminal. Raises Failure when there is none and the job needs one."""
    if not _have_terminal():
        if program is None:
            text = "standard input and output must be a terminal for \n\tinteractive job submission"
            raise Failure(f"qsub:\t{text}", 1)
        controls = [0] * len(_CONTROLS)
    else:
        characters = termios.tcgetattr(0)[6]
        controls = [ord(characters[which]) for which in _CONTROLS]
    term = os.fsencode(os.environ.get("TERM", "unknown"))[:74].decode("ascii", "replace")
    return {"term": term, "size": _size(), "controls": controls}


class _Connection:
    """The connection to the daemon: lines at first, then frames."""

    def __init__(self, socket_path: str) -> None:
        self.socket = protocol.connect(socket_path)
        self.buffer = bytearray()

    def receive(self) -> None:
        """Get some more. Raises ProtocolError at the end of the connection."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise ProtocolError("it closed the connection")
        self.buffer += data

    def message(self) -> dict[str, Any]:
        """The next line. Raises Refused when it says so."""
        while b"\n" not in self.buffer:
            self.receive()
        line, _, rest = bytes(self.buffer).partition(b"\n")
        self.buffer[:] = rest
        answer = protocol.decode(line)
        if "error" in answer:
            raise Refused(int(answer["error"]), str(answer.get("detail", "")))
        return answer


# --- waiting


def _answer() -> str:
    """A line from standard input, read without looking beyond its end; empty when there is none."""
    line = b""
    while not line.endswith(b"\n"):
        character = os.read(0, 1)
        if not character:
            break
        line += character
    return line.decode("utf-8", "replace")


class _Waiting:
    """Signals while the job has not started."""

    def __init__(self) -> None:
        self._asking = False

    def ask(self, _number: int, _frame: Optional[FrameType]) -> None:
        """INT and TERM: shall the job be ended? An end of the input is a yes."""
        if self._asking:
            return
        self._asking = True
        signal.alarm(PATIENCE_S)
        _say("Do you wish to terminate the job and exit (y|[n])? ")
        while True:
            answer = _answer()
            if answer[:1] in ("n", "N", "\n"):
                break
            if answer[:1] in ("y", "Y", ""):
                raise _Bailout
            _say("yes or no please\n")
        signal.alarm(0)
        self._asking = False

    def give_up(self, _number: int, _frame: Optional[FrameType]) -> NoReturn:
        """ALRM: nobody answers."""
        _say("Timeout -- deleting job\n")
        raise _Bailout

    def stay(self, _number: int, _frame: Optional[FrameType]) -> None:
        """TSTP."""
        os.write(2, b"Sorry, you cannot suspend qsub until the job is started\n")


@contextlib.contextmanager
def _handlers(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(connection: _Connection, job: str) -> bool:
    """Wait for the start of the job; False when it was deleted meanwhile. Raises _Bailout."""
    waiting = _Waiting()
    handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM), waiting.ask)
    with _handlers(handlers), _handlers({signal.SIGALRM: waiting.give_up, signal.SIGTSTP: waiting.stay}):
        _say(f"qsub: waiting for job {job} to start\n")
        return connection.message().get("event") == "ready"


# --- being the terminal


class Escapes:
    """What is typed, without the escapes that are meant for qsub: `~.` at the beginning of a line ends it.

    `~` and the key that suspends are swallowed, as TORQUE 6.1 cannot be suspended by it.
    """

    def __init__(self, kill: bytes = b"", interrupt: bytes = b"", suspend: bytes = b"") -> None:
        self.ended = False
        self._suspend = suspend
        self._ends_line = {b"\n", b"\r", kill, interrupt}
        self._at_start = True
        self._tilde = False

    def feed(self, data: bytes) -> bytes:
        """What is to be sent."""
        out = b""
        for number in data:
            character = bytes((number,))
            if self._tilde:
                self._tilde = False
                if character == b".":
                    self.ended = True
                    return out
                if character == self._suspend:
                    continue
                out += b"~"
            elif self._at_start and character == b"~":
                self._tilde = True
                continue
            out += character
            self._at_start = character in self._ends_line
        return out


def _raw(settings: list[Any]) -> list[Any]:
    """Settings of a terminal that hands over every key and changes nothing of the output."""
    inputs, _, control, local, speed_in, speed_out, characters = settings
    inputs &= ~(termios.IGNBRK | termios.INLCR | termios.ICRNL | termios.IXON | termios.IXOFF)
    local &= ~(termios.ICANON | termios.ISIG | termios.ECHO | termios.ECHOE | termios.ECHOK)
    characters = list(characters)
    characters[termios.VMIN], characters[termios.VTIME] = 1, 0
    characters[termios.VKILL] = characters[termios.VERASE] = b"\xff"
    return [inputs, termios.OPOST, control, local, speed_in, speed_out, characters]


@contextlib.contextmanager
def _raw_terminal() -> Iterator[Escapes]:
    """The terminal in raw mode, back to what it was afterwards whatever happens."""
    if not _have_terminal():
        yield Escapes()
        return
    before = termios.tcgetattr(0)
    characters = before[6]
    try:
        termios.tcsetattr(0, termios.TCSANOW, _raw(before))
        yield Escapes(characters[termios.VKILL], characters[termios.VINTR], characters[termios.VSUSP])
    finally:
        termios.tcsetattr(0, termios.TCSANOW, before)


def _show(data: bytes) -> None:
    try:
        while data:
            data = data[os.write(1, data) :]
    except OSError as error:
        raise _HungUp from error


def _typed() -> bytes:
    try:
        return os.read(0, CHUNK)
    except OSError as error:
        raise _HungUp from error


def _relay(connection: _Connection, escapes: Escapes) -> bool:
    """Carry both ways; True when the job has ended, False when the user has."""
    there = connection.socket
    there.setblocking(False)
    typed = b""
    while True:
        for data in protocol.take_frames(connection.buffer):
            if not data:
                return True
            _show(data)
        reading: list[Any] = [there] if typed else [there, 0]
        readable, _, _ = select.select(reading, [there] if typed else [], [])
        if 0 in readable:
            keys = _typed()
            typed += escapes.feed(keys)
            if not keys:
                return False
        if typed:
            try:
                typed = typed[there.send(typed) :]
            except BlockingIOError:
                pass
        if escapes.ended and not typed:
            return False
        if there in readable:
            connection.receive()


def _hung_up(_number: int, _frame: Optional[FrameType]) -> NoReturn:
    raise _HungUp


def _converse(connection: _Connection) -> bool:
    """Be the job's terminal; False when the user left before the job ended."""
    with _handlers({signal.SIGHUP: _hung_up}), _raw_terminal() as escapes:
        try:
            return _relay(connection, escapes)
        except _HungUp:
            return False


def submit(socket_path: str, message: Mapping[str, object]) -> int:
    """Submit an interactive job and stay until it ends; the exit status of qsub, which is not the job's.

    Raises Refused when the job is not taken, Failure when the daemon goes away.
    """
    connection = _Connection(socket_path)
    try:
        connection.socket.sendall(protocol.encode(message))
        job = str(connection.message()["job"])
    except BaseException:
        connection.socket.close()
        raise
    with connection.socket, _handlers(dict.fromkeys(IGNORED, signal.SIG_IGN)):
        try:
            if not _wait(connection, job):
                raise Failure(f"qsub: Job {job} was canceled while waiting to start", 1)
            _say(f"qsub: job {job} ready\n\n")
            if _converse(connection):
                _say(f"\nqsub: job {job} completed\n")
        except _Bailout:
            _say(f"Job {job} is being deleted\n")
            _delete(socket_path, job)
        except (ProtocolError, ConnectionError) as error:
            text = f"qsub: the batch server has gone, and with it job {job}: {error}"
            raise Failure(text, command.NO_SERVER) from None
    return 0


def _delete(socket_path: str, job: str) -> None:
    try:
        protocol.request(socket_path, {"op": "delete", "job": job})
    except Refused:
        pass  # it has ended by itself
