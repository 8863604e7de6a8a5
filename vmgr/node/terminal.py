"""An interactive job's terminal on the node: what is shown on it while the guest boots, its size, its state.

The batch system connects it to the terminal of `vsub`, and sends the size of that only once. Later sizes come through
the job directory, in the file `winsize` (`ROWS COLUMNS`), which `vsub` renames into place.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import struct
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from vmgr.errors import printable

WINSIZE = "winsize"
LOOK_AGAIN_SECONDS = 1.0
"""How often the file is read without being told of a change: NFS tells nothing of other machines' writes."""

MAX_BYTES = 32
_SIZE = re.compile(rb"([0-9]{1,5}) ([0-9]{1,5})\n?")
_WINSIZE = struct.Struct("HHHH")  # rows, columns, and two in pixels (ioctl_tty(2))
_CLEAR_LINE = "\r\x1b[K"


class Size(NamedTuple):
    """A terminal's size in characters."""

    rows: int
    columns: int


def parse_size(data: bytes) -> Optional[Size]:
    """The size in a file, None when it is none."""
    match = _SIZE.fullmatch(data)
    size = Size(int(match[1]), int(match[2])) if match else None
    return size if size and 1 <= size.rows <= 0xFFFF and 1 <= size.columns <= 0xFFFF else None


def read_size(path: Path) -> Optional[Size]:
    """The size in the file `path`, None where there is none or it is no small regular file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return parse_size(os.read(fd, MAX_BYTES)) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except OSError:
        return None
    finally:
        os.close(fd)


class Terminal:
    """The terminal at a descriptor. One that has been hung up is no error anywhere: nobody looks at it any more."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved = termios.tcgetattr(fd)
        self._rewrites = os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")
        self._shown: Optional[str] = ""

    @classmethod
    def open(cls, fd: int = 0) -> Optional[Terminal]:
        """The terminal at `fd`, None where there is none."""
        try:
            return cls(fd) if os.isatty(fd) else None
        except termios.error:
            return None

    def progress(self, snapshot: dict[str, Any]) -> None:
        """Show how far the guest is: one line that is rewritten, or where the terminal cannot, a line a stage."""
        stages = snapshot.get("stages") or [{"name": "started", "t": 0}]
        last = stages[-1]
        text = printable(f"vtorque: waiting for the guest: {last['name']} ({last['t']:.1f} s)")
        text = text[: max(10, self.size().columns - 1)]
        if self._shown is not None and text != self._shown:
            self._shown = text
            self._write(f"{_CLEAR_LINE}{text}" if self._rewrites else f"{text}\n")

    def end_progress(self) -> None:
        """Take the line of progress away; there will be no other."""
        if self._shown and self._rewrites:
            self._write(_CLEAR_LINE)
        self._shown = None

    def size(self) -> Size:
        """The size that the terminal has now; 24 by 80 where it has none."""
        try:
            rows, columns, _, _ = _WINSIZE.unpack(fcntl.ioctl(self._fd, termios.TIOCGWINSZ, bytes(_WINSIZE.size)))
        except OSError:
            rows, columns = 0, 0
        return Size(rows or 24, columns or 80)

    def resize(self, size: Size) -> None:
        """Give the terminal a size; the kernel tells the terminal's foreground processes."""
        try:
            fcntl.ioctl(self._fd, termios.TIOCSWINSZ, _WINSIZE.pack(*size, 0, 0))
        except OSError:
            pass

    def restore(self) -> None:
        """Put the terminal into the state that it was found in."""
        try:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
        except (OSError, termios.error):
            pass

    def _write(self, text: str) -> None:
        try:
            os.write(self._fd, text.encode("utf-8", "replace"))
        except OSError:
            pass

    async def follow_size(self, directory: Path, resized: Callable[[], None]) -> None:
        """Apply each new size that appears in `directory`, and call `resized` after that. Ends only by being cancelled.

        A size is applied once: who else changes the terminal's size is not contradicted.
        """
        from vmgr.node.folders import RENAMED_IN, changes  # batch jobs do without

        applied: Optional[Size] = None
        async for _ in changes(directory, RENAMED_IN, LOOK_AGAIN_SECONDS):
            size = read_size(directory / WINSIZE)
            if size is not None and size != applied:
                applied = size
                self.resize(size)
                resized()
