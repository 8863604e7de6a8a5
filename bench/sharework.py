"""What `bench/shares` does in a folder, on the node and in the guest alike.

Prints one JSON object of rates: MB/s of one large file, files a second of small ones.
`sharework.py FOLDER MEGABYTES FILES`; with `--forget` the large file's pages are forgotten before it is read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Callable

BLOCK = 1 << 20


def rate(amount: float, work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return amount / (time.perf_counter() - start)


def measure(folder: Path, megabytes: int, files: int, *, forget: bool) -> dict[str, float]:
    """The rates in a folder, which is as before afterwards."""
    large, many = folder / "large", folder / "many"
    block = os.urandom(BLOCK)
    paths = [f"{many}/{number}" for number in range(files)]

    def write() -> None:
        with open(large, "wb", buffering=0) as stream:
            for _ in range(megabytes):
                stream.write(block)
            os.fsync(stream.fileno())

    def read() -> None:
        with open(large, "rb", buffering=0) as stream:
            if forget:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while stream.read(BLOCK):
                pass

    def create() -> None:
        many.mkdir()
        for path in paths:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(fd, b"small")
            os.close(fd)

    def look() -> None:
        for path in paths:
            os.stat(path)

    def again() -> None:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            os.read(fd, 100)
            os.close(fd)

    def remove() -> None:
        for path in paths:
            os.unlink(path)  # noqa: PTH108
        many.rmdir()

    size = megabytes * BLOCK / 1e6
    rates = {"write": rate(size, write), "read": rate(size, read)}
    large.unlink()
    for name, work in (("create", create), ("stat", look), ("open", again), ("remove", remove)):
        rates[name] = rate(files, work)
    return rates


if __name__ == "__main__":
    place, amount, count = sys.argv[1:4]
    json.dump(measure(Path(place), int(amount), int(count), forget="--forget" in sys.argv), sys.stdout)
