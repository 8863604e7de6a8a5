"""What a QEMU writes into a pipe, copied into a file by a child: QEMU, which is the user's, never has it open."""

from __future__ import annotations

import errno
import os
from typing import Callable

_BLOCK = 1 << 20


def copy_pipe(source: int, target: int, most: int, progress: Callable[[int], None]) -> int:
    """In a child: what comes through the pipe into the file, where zeros take no room; gives how many bytes.

    Raises OSError, also for more than `most` bytes.
    """
    zeros, size = bytes(_BLOCK), 0
    while block := os.read(source, _BLOCK):
        if size + len(block) > most:
            raise OSError(errno.EFBIG, f"QEMU sends more than {most} bytes")
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
