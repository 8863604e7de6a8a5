"""What a QEMU writes into a pipe, copied into a file by a child: QEMU, which is the user's, never has it open."""

from __future__ import annotations

import errno
import os
import zlib
from typing import Callable

_BLOCK = 1 << 20


class Sum:
    """A checksum (CRC-32) of bytes as they come: it tells damage, and nothing of who has done it."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, data: bytes) -> None:
        self.value = zlib.crc32(data, self.value)


def sum_file(fd: int, size: int, progress: Callable[[int], None]) -> int:
    """In a child: the checksum of the first `size` bytes of a file, whoever else reads it. Raises OSError."""
    found, at = Sum(), 0
    while at < size and (block := os.pread(fd, min(_BLOCK, size - at), at)):
        found.add(block)
        at += len(block)
        progress(at)
    return found.value


def copy_pipe(
    source: int, target: int, most: int, progress: Callable[[int], None], seen: Callable[[bytes], None] = lambda _: None
) -> int:
    """In a child: what comes through the pipe into the file, where zeros take no room; gives how many bytes.

    `seen` gets every block. Raises OSError, also for more than `most` bytes.
    """
    zeros, size = bytes(_BLOCK), 0
    while block := os.read(source, _BLOCK):
        if size + len(block) > most:
            raise OSError(errno.EFBIG, f"QEMU sends more than {most} bytes")
        seen(block)
        if block != zeros[: len(block)]:
            view = memoryview(block)
            while view:
                written = os.pwrite(target, view, size)
                size, view = size + written, view[written:]
        else:
            size += len(block)
        progress(min(size, most))
    os.ftruncate(target, size)
    return size
