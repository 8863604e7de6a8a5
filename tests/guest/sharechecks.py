"""What a file system does for its users, tried out inside a guest by the user, in the folder given.

Prints one JSON object: each check's name and what came of it, an error as its symbol; how long it took, on standard
error. `sharechecks.py FOLDER FILES MEGABYTES [CHECK…]`
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

CHECKS: dict[str, Callable[[Path], Any]] = {}
GROUP = 12399
"""A supplementary group of the user's."""
LINES, LINE = 300, 120


def check(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CHECKS[function.__name__] = function
    return function


def facts(path: Path) -> list[Any]:
    info = path.lstat()
    return [info.st_uid, info.st_gid, oct(info.st_mode)]


@check
def owner_and_mode(at: Path) -> Any:
    os.umask(0o022)
    (at / "file").write_text("x")
    (at / "folder").mkdir()
    os.umask(0o077)
    (at / "private").write_text("x")
    os.umask(0o022)
    (at / "file").chmod(0o751)
    (at / "folder").chmod(0o2750)
    return [facts(at / name) for name in ("file", "folder", "private")]


@check
def change_group(at: Path) -> Any:
    (at / "grouped").write_text("x")
    os.chown(at / "grouped", -1, GROUP)
    return facts(at / "grouped")[1]


@check
def give_away(at: Path) -> Any:
    (at / "gift").write_text("x")
    os.chown(at / "gift", 0, -1)
    return facts(at / "gift")


@check
def times(at: Path) -> Any:
    (at / "old").write_text("x")
    os.utime(at / "old", ns=(10**18, 10**18 + 5))
    return (at / "old").stat().st_mtime_ns


@check
def rename(at: Path) -> Any:
    (at / "a").write_text("new")
    (at / "b").write_text("old")
    with open(at / "b") as old:
        (at / "a").rename(at / "b")
        return [old.read(), (at / "b").read_text(), (at / "a").exists()]


@check
def rename_folder(at: Path) -> Any:
    (at / "d1" / "in").mkdir(parents=True)
    (at / "d1" / "in" / "f").write_text("deep")
    (at / "d1").rename(at / "d2")
    return (at / "d2" / "in" / "f").read_text()


@check
def unlinked_while_open(at: Path) -> Any:
    with open(at / "gone", "w+") as stream:
        stream.write("before ")
        stream.flush()
        (at / "gone").unlink()
        stream.write("after")
        stream.flush()
        stream.seek(0)
        return [stream.read(), (at / "gone").exists()]


@check
def unlinked_and_looked_at(at: Path) -> Any:
    with open(at / "gone", "w+") as stream:
        stream.write("12345")
        stream.flush()
        (at / "gone").unlink()
        return os.fstat(stream.fileno()).st_size


@check
def links(at: Path) -> Any:
    (at / "target").write_text("x")
    (at / "symbolic").symlink_to("target")
    os.link(at / "target", at / "hard")
    same = (at / "hard").stat().st_ino == (at / "target").stat().st_ino
    return [str((at / "symbolic").readlink()), (at / "symbolic").read_text(), (at / "hard").stat().st_nlink, same]


@check
def exclusive_create(at: Path) -> Any:
    os.close(os.open(at / "lockfile", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    os.close(os.open(at / "lockfile", os.O_CREAT | os.O_EXCL | os.O_WRONLY))


@check
def fifo(at: Path) -> Any:
    os.mkfifo(at / "fifo")
    child = subprocess.Popen(["sh", "-c", f"echo through >{at}/fifo"])
    text = (at / "fifo").read_text()
    return [text, child.wait()]


TAKE = """
import fcntl, sys
with open(sys.argv[1], "r+") as stream:
    try:
        {call}(stream, fcntl.LOCK_EX | {how})
        print("got it")
    except OSError as err:
        print("refused" if err.errno in (11, 13) else err)
"""


def exclusion(at: Path, call: str, take: Callable[[Any, int], None]) -> Any:
    """A second process is refused the lock, waits for it, and has it when it is given back."""
    path = at / f"lock-{call}"
    path.write_text("x")
    with open(path, "r+") as stream:
        take(stream, fcntl.LOCK_EX)
        argv = [sys.executable, "-c", TAKE.format(call=f"fcntl.{call}", how="fcntl.LOCK_NB"), str(path)]
        now = subprocess.run(argv, capture_output=True, text=True).stdout.strip()
        argv[2] = TAKE.format(call=f"fcntl.{call}", how="0")
        waiting = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        try:
            waiting.wait(1.0)
            waited = False
        except subprocess.TimeoutExpired:
            waited = True
        take(stream, fcntl.LOCK_UN)
        return [now, waited, waiting.communicate(timeout=60)[0].strip()]


@check
def flock(at: Path) -> Any:
    return exclusion(at, "flock", fcntl.flock)


@check
def fcntl_lock(at: Path) -> Any:
    return exclusion(at, "lockf", fcntl.lockf)


def append(path: str, mark: str) -> None:
    """Append lines of this mark, each by one write."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for number in range(LINES):
        os.write(fd, f"{mark} {number} ".ljust(LINE - 1, mark).encode() + b"\n")
    os.close(fd)


@check
def append_by_two(at: Path) -> Any:
    path = str(at / "appended")
    argv = [sys.executable, __file__, "append", path]
    children = [subprocess.Popen([*argv, mark]) for mark in "ab"]
    for child in children:
        child.wait()
    return whole_lines(path)


def whole_lines(path: str) -> list[int]:
    """How many whole lines of each writer there are, in the order in which each wrote them, and how many others."""
    counts = {"a": 0, "b": 0}
    others = 0
    for line in Path(path).read_text().splitlines():
        mark = line[:1]
        if line == f"{mark} {counts.get(mark)} ".ljust(LINE - 1, mark):
            counts[mark] += 1
        else:
            others += 1
    return [*counts.values(), others]


@check
def truncate(at: Path) -> Any:
    (at / "cut").write_bytes(b"0123456789")
    os.truncate(at / "cut", 4)
    short = (at / "cut").read_bytes().decode()
    with open(at / "cut", "r+b") as stream:
        stream.truncate(6)
        stream.seek(0)
        return [short, stream.read().hex()]


@check
def mapped_write(at: Path) -> Any:
    (at / "mapped").write_bytes(bytes(8192))
    with open(at / "mapped", "r+b") as stream, mmap.mmap(stream.fileno(), 8192) as memory:
        memory[4090:4102] = b"over a page!"
        memory.flush()
    return (at / "mapped").read_bytes()[4090:4102].decode()


@check
def sparse(at: Path) -> Any:
    with open(at / "sparse", "wb") as stream:
        stream.seek(1 << 30)
        stream.write(b"end")
    info = (at / "sparse").stat()
    return [info.st_size, info.st_blocks * 512 < 1 << 20]


@check
def long_and_strange_names(at: Path) -> Any:
    names = ["n" * 255, "with blank", "new\nline", "back\\slash", "umläut", "-rf", ".hidden", "a,b=c"]
    (at / "names").mkdir()
    for name in names:
        (at / "names" / name).write_text(name)
    return sorted(path.name for path in (at / "names").iterdir()) == sorted(names)


@check
def many_files(at: Path) -> Any:
    folder = at / "many"
    folder.mkdir()
    seconds: dict[str, float] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        start = time.monotonic()
        result = work()
        seconds[name] = round(time.monotonic() - start, 1)
        return result

    paths = [folder / str(number) for number in range(FILES)]

    def create() -> None:
        for path in paths:
            with open(path, "x") as stream:
                stream.write(path.name)

    def remove() -> None:
        for path in paths:
            path.unlink()

    step("create", create)
    sizes = step("stat", lambda: sum(path.stat().st_size for path in paths))
    names = step("list", lambda: {path.name for path in folder.iterdir()})
    step("remove", remove)
    folder.rmdir()
    print(f"{FILES} files: {seconds}", file=sys.stderr)
    return [sizes == sum(len(path.name) for path in paths), names == {path.name for path in paths}, folder.exists()]


@check
def large_file(at: Path) -> Any:
    block = hashlib.sha512(b"vtorque").digest() * 16384
    written, read = hashlib.sha256(), hashlib.sha256()
    start = time.monotonic()
    with open(at / "large", "wb") as stream:
        for number in range(MEGABYTES):
            data = number.to_bytes(8, "big") + block[8:]
            stream.write(data)
            written.update(data)
        os.fsync(stream.fileno())
    middle = time.monotonic()
    with open(at / "large", "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while data := stream.read(1 << 20):
            read.update(data)
    print(
        f"{MEGABYTES} MiB: written in {middle - start:.1f} s, read in {time.monotonic() - middle:.1f} s",
        file=sys.stderr,
    )
    return [(at / "large").stat().st_size == MEGABYTES << 20, read.digest() == written.digest(), written.hexdigest()]


def outcome(work: Callable[[Path], Any], at: Path) -> Any:
    try:
        return work(at)
    except OSError as err:
        return errno.errorcode.get(err.errno or 0, str(err))


if __name__ == "__main__":
    if sys.argv[1] == "append":
        append(sys.argv[2], sys.argv[3])
    else:
        FILES, MEGABYTES = map(int, sys.argv[2:4])
        json.dump({name: outcome(CHECKS[name], Path(sys.argv[1])) for name in sys.argv[4:] or CHECKS}, sys.stdout)
