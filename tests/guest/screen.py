"""What stands on a terminal, read from its other end."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import termios
import time
from typing import Any

PATIENCE_S = 120


class Screen:
    """The outer end of a pseudo terminal, or of a pipe."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.seen = ""

    def expect(self, pattern: str) -> re.Match[str]:
        """Read until `pattern` matches what has not been read yet; that is taken away."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            match = re.search(pattern, self.seen)
            if match is not None:
                self.seen = self.seen[match.end() :]
                return match
            ready = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, f"{pattern!r} never came; the terminal shows {self.seen!r}"
            assert self._read(), f"the terminal is closed before {pattern!r} came; it shows {self.seen!r}"

    def rest(self) -> str:
        """All that is still said, until the other end is closed."""
        while self._read():
            pass
        said, self.seen = self.seen, ""
        return said

    def _read(self) -> bool:
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # a terminal whose other end has been closed
            return False
        self.seen += data.decode("utf-8", "replace")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def state(self) -> list[Any]:
        """The state of the terminal."""
        return termios.tcgetattr(self.fd)

    def close(self) -> None:
        os.close(self.fd)


def set_size(fd: int, rows: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
