"""Making revisions in the image pool: under a lock of the image's, in a temporary directory, by one rename.

A process that is killed leaves a temporary directory (`.tmp-…` in the image's folder, `.gone-…` in the pool's), which
no reader sees; the next one that changes the pool removes it. `.last-NAME` in the pool's folder is the last number of a
name whose folder was about to become another's: who next has the lock of that name notes it there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import HOLD, NAME, SIDECAR, VERSION, Pool, listed, read_sidecar
from vmgr.signals import undisturbed

TEMPORARY = ".tmp-"
GONE = ".gone-"
_LOCK = ".lock"
_KEPT = ".last-"


def check_name(name: str) -> None:
    """Refuse what cannot be the name of an image. Raises VTorqueError (VT-IMAGE)."""
    if not re.fullmatch(NAME, name):
        raise VTorqueError(f"illegal image name {name!r}", code=Code.IMAGE, hint=f"a name looks like {NAME}")


@contextlib.contextmanager
def locked(pool: Path, name: str, progress: Optional[Callable[[str], None]]) -> Iterator[int]:
    """The lock of the image `name` in `pool`, and what killed processes left of it removed.

    Waits for another holder, saying so by `progress`; with None gives up with BlockingIOError. The lock ends with its
    holder. Afterwards nothing is left of a name that has never had a revision. Raises VTorqueError (VT-BUILD).
    """
    home = pool / name
    lock = _open_locked(home, name, progress)
    try:
        _note_kept(pool, name, lock)
        for left in home.glob(f"{TEMPORARY}*"):
            remove_tree(left)
        yield lock
    finally:
        with undisturbed():  # a signal would leave the rest
            if not _last(lock) and not Pool(pool).revisions(name):
                with contextlib.suppress(OSError):
                    (home / _LOCK).unlink()
                    home.rmdir()
            os.close(lock)


def _open_locked(home: Path, name: str, progress: Optional[Callable[[str], None]]) -> int:
    """The open lock. One that another process has meanwhile removed or moved, with the folder, does not count."""
    path = home / _LOCK
    try:
        _make_folder(home.parent)
        home.parent.stat()  # a link may lead nowhere
    except OSError as err:
        raise cannot_write(home.parent, err) from err
    while True:
        try:
            _make_folder(home)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # the folder was removed in between
        except OSError as err:
            raise cannot_write(home.parent, err) from err
        try:
            _lock(lock, name, progress)
            there, ours = os.stat(path), os.fstat(lock)
            if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _make_folder(folder: Path) -> None:
    """Make a folder that everybody can read, whatever the umask; fine when it is there."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
        folder.chmod(0o755)


def cannot_write(pool: Path, err: OSError) -> VTorqueError:
    return VTorqueError(f"cannot write the pool {pool}: {err.strerror}", code=Code.BUILD)


def _lock(descriptor: int, name: str, progress: Optional[Callable[[str], None]]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if progress is None:
            raise
        progress(f"another process is at work on {name}; waiting for it")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _last(lock: int) -> int:
    """The last number that was given to a revision, 0 for none."""
    text = os.pread(lock, 16, 0).strip()
    return int(text) if text.isdigit() else 0


def last_number(pool: Path, name: str, lock: int) -> int:
    """The highest number that a revision of `name` has ever had, under its lock."""
    return max(_last(lock), *Pool(pool).revisions(name), 0)


def note_number(lock: int, number: int) -> None:
    """Remember that `number` was given to a revision, so that it is never given to another."""
    data = f"{number}\n".encode()
    os.pwrite(lock, data, 0)
    os.ftruncate(lock, len(data))


def keep_number(pool: Path, name: str, number: int) -> None:
    """As `note_number`, under the lock of `name`, where that is about to go with its folder. Raises OSError."""
    fd = os.open(pool / f"{_KEPT}{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        note_number(fd, number)
        os.fsync(fd)
    finally:
        os.close(fd)
    _flush(pool.resolve())


def _note_kept(pool: Path, name: str, lock: int) -> None:
    """Note what was kept of a name, now that its lock is held. Raises VTorqueError (VT-BUILD)."""
    path = pool / f"{_KEPT}{name}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            note_number(lock, max(_last(fd), last_number(pool, name, lock)))
        finally:
            os.close(fd)
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as err:
        raise cannot_write(pool, err) from err


@contextlib.contextmanager
def staging(pool: Path, name: str, progress: Callable[[str], None]) -> Iterator[Path]:
    """As `Pool.staging`."""
    check_name(name)
    sweep(pool)
    with locked(pool, name, progress):
        work: Optional[Path] = None
        try:
            try:
                with undisturbed():  # an exception of a signal's would lose what has just been made
                    work = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=pool / name))
            except OSError as err:
                raise cannot_write(pool, err) from err
            yield work
        finally:
            if work is not None:
                with undisturbed():  # a signal would leave the rest
                    remove_tree(work)


def sweep(pool: Path) -> list[str]:
    """Remove what killed processes left in the pool; what is being made stays. Gives what was removed."""
    removed = []
    for left in pool.glob(f"{GONE}*"):
        remove_tree(left)
        removed.append(left.name)
    settle(pool, [path.name[len(_KEPT) :] for path in pool.glob(f"{_KEPT}*")])
    for home in pool.glob("*"):
        if not re.fullmatch(NAME, home.name) or home.is_symlink() or not home.is_dir():
            continue
        left_here = [f"{home.name}/{name}" for name in listed(home) if name.startswith(TEMPORARY)]
        if left_here or not Pool(pool).revisions(home.name):
            with contextlib.suppress(BlockingIOError, VTorqueError), locked(pool, home.name, None):
                removed += left_here
    return removed


def settle(pool: Path, names: Iterable[str]) -> None:
    """Have what was kept of these names noted; whoever has the lock of one has done it, or will."""
    for name in names:
        if re.fullmatch(NAME, name):
            with contextlib.suppress(BlockingIOError, VTorqueError), locked(pool, name, None):
                pass


def remove_tree(directory: Path) -> None:
    """Remove a temporary directory, or what stands in its place."""
    if directory.is_symlink() or not directory.is_dir():
        directory.unlink(missing_ok=True)
        return
    shutil.rmtree(directory, ignore_errors=True)


def publish(
    pool: Path, directory: Path, name: str, facts: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]
) -> Path:
    """As `Pool.publish`; gives the folder of the new revision."""
    try:
        return _publish(pool, directory, name, facts, known)
    except OSError as err:
        raise cannot_write(pool, err) from err


def _publish(
    pool: Path, directory: Path, name: str, facts: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]
) -> Path:
    files = {path.name: dict(known.get(path.name) or digest(path)) for path in sorted(directory.iterdir())}
    sidecar = {
        "version": VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "added_by": who(),
        "parent": None,
        **facts,
        "files": files,
    }
    # not escaped: YAML has no surrogates
    (directory / SIDECAR).write_text(json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / HOLD).touch(0o600)
    for path in directory.iterdir():
        if os.geteuid() == 0:
            os.chown(path, 0, 0)
        path.chmod(0o600 if path.name == HOLD else 0o444)
        _flush(path)
    directory.chmod(0o755)
    lock = os.open(pool / name / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        number = last_number(pool, name, lock) + 1
        read_sidecar(os.fspath(directory), name, number)  # what no reader could use does not get in
        note_number(lock, number)
    finally:
        os.close(lock)
    target = pool / name / str(number)
    _flush(directory)
    directory.rename(target)
    _flush(target.parent)
    return target


def _flush(path: Path) -> None:
    """Have the file or folder on its disk before what comes next."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def digest(path: Path, progress: Callable[[int], None] = lambda _count: None) -> dict[str, Any]:
    """`sha256` and `size` of a file; `progress` gets the bytes of each step."""
    found = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
            size += len(block)
            progress(len(block))
    return {"sha256": found.hexdigest(), "size": size}


def who() -> str:
    """The account of the person who runs this: behind sudo or su the one who logged in."""
    candidates = [os.environ.get("SUDO_UID", "")] if os.geteuid() == 0 else []
    with contextlib.suppress(OSError):
        candidates.append(Path("/proc/self/loginuid").read_text())
    for text in (*candidates, str(os.getuid())):
        if text.strip().isdigit() and int(text) != 2**32 - 1:  # which is loginuid's word for nobody
            try:
                return pwd.getpwuid(int(text)).pw_name
            except (KeyError, OverflowError):
                continue
    return f"uid {os.getuid()}"
