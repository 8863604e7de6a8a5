"""The terminal of an interactive job: a pseudo terminal, and the connection to the qsub that is its other end.

The daemon carries what passes without ever waiting for either side: it reads from the job only when qsub has
taken what was there before, and from qsub only when the job has. Facts: resmom/mom_inter.c and
resmom/start_exec.c of TORQUE 6.1.
"""

from __future__ import annotations

import asyncio
import fcntl
import grp
import os
import pty
import select
import struct
import termios
from collections.abc import Mapping
from typing import Any, Callable, Optional

from vsub.engines.local import protocol, submission
from vsub.engines.local.process import readable, writable
from vsub.engines.local.submission import Account

CHUNK = 1 << 14
PATIENCE_S = 3.0
"""How long the end of a job waits for a qsub that does not read."""
QUIET_S = 0.2
"""So long nothing must come from a terminal that somebody keeps open, until the job is taken to have written all."""
GRACE_S = 1.0
"""How long a job that does not read has for what was typed before qsub went."""
_CONTROLS = (termios.VINTR, termios.VQUIT, termios.VERASE, termios.VKILL, termios.VEOF, termios.VSUSP)


def set_up(slave: int, wish: submission.Terminal) -> None:
    """Modes, keys and size of a new pseudo terminal."""
    settings: list[Any] = termios.tcgetattr(slave)
    settings[0] = termios.BRKINT | termios.IGNPAR | termios.ICRNL | termios.IXON | termios.IXOFF | termios.IMAXBEL
    settings[1] = termios.OPOST | termios.ONLCR
    settings[3] = (
        termios.ISIG | termios.ICANON | termios.ECHO | termios.ECHOE | termios.ECHOK | termios.ECHOKE | termios.ECHOCTL
    )
    for which, number in zip(_CONTROLS, wish.controls):
        settings[6][which] = bytes((number,))
    termios.tcsetattr(slave, termios.TCSANOW, settings)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", *wish.size))


def _give_to(slave: int, owner: Account) -> None:
    try:
        group = grp.getgrnam("tty").gr_gid
    except KeyError:
        group = owner.gid
    os.fchown(slave, owner.uid, group)
    os.fchmod(slave, 0o620)


class Terminal:
    """One interactive job's. It belongs to the connection of its qsub until the job starts, then to the job."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.gone = False
        """Whether qsub has gone, or does not keep to the protocol."""
        self._reader = reader
        self._writer = writer
        self._master = -1
        self._finished = asyncio.Event()
        self._read = 0
        self._passing = False
        self._output: Optional[asyncio.Task[None]] = None
        self._typing: Optional[asyncio.Task[None]] = None

    def answer(self, message: Mapping[str, object]) -> None:
        """The answer to the submission."""
        self._writer.write(protocol.encode(message))

    async def serve(self, on_gone: Callable[[], None]) -> None:
        """Carry what is typed until the job ends; `on_gone` is called when qsub does first."""
        self._typing = asyncio.ensure_future(self._type())
        finished = asyncio.ensure_future(self._finished.wait())
        closed = asyncio.ensure_future(self._closed())
        await asyncio.wait({self._typing, finished, closed}, return_when=asyncio.FIRST_COMPLETED)
        if closed.done():
            await asyncio.wait({self._typing, finished}, timeout=GRACE_S, return_when=asyncio.FIRST_COMPLETED)
        if not self._finished.is_set():
            self.gone = True
            on_gone()
        await finished
        await _end(closed)
        await _end(self._typing)

    async def _closed(self) -> None:
        """Wait for the end of the connection, which shows before all that was sent has been read."""
        with select.epoll() as hung_up:
            hung_up.register(self._writer.get_extra_info("socket").fileno(), select.EPOLLRDHUP)
            await readable(hung_up.fileno())

    async def _type(self) -> None:
        """What is typed before the job has started is against the protocol."""
        while True:
            try:
                data = await self._reader.read(CHUNK)
            except ConnectionError:
                return
            if not data or self._master < 0:
                return
            while data:
                await writable(self._master)
                try:
                    data = data[os.write(self._master, data) :]
                except BlockingIOError:
                    pass
                except OSError:
                    break  # nobody has the job's side open any more

    def open(self, wish: submission.Terminal, owner: Account) -> int:
        """Tell qsub that the job starts, and connect it; the descriptor of the job's side. Raises OSError."""
        self._master, slave = pty.openpty()
        try:
            os.set_blocking(self._master, False)
            set_up(slave, wish)
            _give_to(slave, owner)
        except BaseException:
            os.close(slave)
            raise
        self._writer.transport.set_write_buffer_limits(high=CHUNK)
        self._writer.write(protocol.encode({"event": "ready"}))
        self._output = asyncio.ensure_future(self._carry())
        return slave

    def say(self, text: str) -> None:
        """A line of the daemon's own for the user; it must be short."""
        if self._output is not None and not self.gone and not self._finished.is_set():
            self._writer.write(protocol.frame(text.replace("\n", "\r\n").encode("utf-8", "replace")))

    async def _carry(self) -> None:
        """What the job writes, until nobody has its side open any more."""
        while True:
            data = await self._written()
            if not data:
                return
            self._read += len(data)
            if not self.gone:
                self._passing = True
                self._writer.write(protocol.frame(data))
                try:
                    await self._writer.drain()
                except ConnectionError:
                    self.gone = True
                self._passing = False

    async def _written(self) -> bytes:
        while True:
            await readable(self._master)
            try:
                return os.read(self._master, CHUNK)
            except BlockingIOError:
                pass
            except OSError:
                return b""

    async def _discard(self) -> None:
        while await self._written():
            pass

    async def finish(self, *, drain: bool = False) -> None:
        """Tell qsub the end, with `drain` after all that the job wrote. What is written later goes nowhere."""
        if self._finished.is_set():
            return
        transport = self._writer.transport
        if drain and self._output is not None and not await self._passed_on(self._output):
            transport.abort()
        await _end(self._output)
        self._finished.set()
        last = protocol.encode({"event": "cancelled"}) if self._output is None else protocol.frame(b"")
        if self._master >= 0:
            self._output = asyncio.ensure_future(self._discard())
        transport.set_write_buffer_limits(high=0)
        try:
            self._writer.write(last)
            await asyncio.wait_for(self._writer.drain(), PATIENCE_S)
            self._writer.close()
        except (ConnectionError, asyncio.TimeoutError):
            transport.abort()

    async def _passed_on(self, output: asyncio.Task[None]) -> bool:
        """Wait until qsub has what the job wrote; False when it does not take it.

        A process that has left the job's session may keep the terminal open, and even go on to write.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_S
        while True:
            before = self._read
            done, _ = await asyncio.wait({output}, timeout=QUIET_S)
            is_quiet = self._read == before
            if done or (is_quiet and not self._passing):
                return True
            if loop.time() > deadline:
                return not is_quiet

    async def close(self) -> None:
        """Take the pseudo terminal away from whoever still has it."""
        await self.finish()
        await _end(self._output)
        await _end(self._typing)
        if self._master >= 0:
            os.close(self._master)
            self._master = -1


async def _end(task: Optional[asyncio.Task[None]]) -> None:
    """Cancel a task and wait until it has let go of its descriptors."""
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
