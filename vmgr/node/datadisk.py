"""The persistent disk of a job's first guest: a file of the user's, opened and locked with the user's rights.

Its format is raw and is never probed. The lock belongs to the open file (fcntl(2), F_OFD_SETLK), which the agent and
QEMU have and nobody else: it is there as long as one of the two, nothing has to be undone, and file systems that
several nodes share tell each of them. A new disk is made where the job runs, with an ext4 file system of the user's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from vmgr.config import Config
from vmgr.errors import Code
from vmgr.jobspec import Spec
from vmgr.node import record
from vmgr.node.guestjob import Job
from vmgr.node.hookargs import place_name
from vmgr.node.process import dies_with
from vmgr.node.user import User
from vmgr.node.userio import open_file, open_own

MKFS = "/usr/sbin/mkfs.ext4"
LABEL = "vtorque-data"
SECTOR = 512
MIB = 1 << 20

FEATURES = (
    "none", "has_journal", "ext_attr", "resize_inode", "dir_index", "filetype", "extent", "64bit", "flex_bg",
    "sparse_super", "large_file", "huge_file", "dir_nlink", "extra_isize", "metadata_csum",
)  # fmt: skip
"""Those of ext4 that every kernel since Linux 3.18 can mount, whatever the node's tools make by themselves."""

_FLOCK = "hhqqi4x"
"""`struct flock` on 64-bit Linux: type, whence, start, length, pid."""
_SUPERBLOCK = 1024
_MAGIC_AT, _UUID_AT = _SUPERBLOCK + 0x38, _SUPERBLOCK + 0x68
_MAGIC = b"\x53\xef"


def disk_path(spec: Spec, job_id: str) -> Optional[str]:
    """The file of a job's persistent disk; None when it has none. A new one lies in the job's working directory."""
    if spec.disk is None:
        return None
    return spec.disk.image or f"{spec.workdir.rstrip('/')}/vtorque-{place_name(job_id)}.disk"


async def open_disk(job: Job, config: Config) -> int:
    """The job's persistent disk, locked and open for reading and writing; a new one is made before.

    That there is one is written to the record: an epilogue lets its guest shut down. Raises VTorqueError (VT-STAGE),
    also when another guest has it.
    """
    path, spec = disk_path(job.spec, job.job_id), job.spec
    assert path is not None and spec.disk is not None
    user, size_mib = job.user, spec.disk.size_mib
    if size_mib is None:
        timeout_s, hint = config.timeouts.user_file, "disk=FILE names a raw disk of your own that no other job uses"
    else:
        timeout_s, hint = config.timeouts.user_file + config.timeouts.launch, "disk=SIZE makes a new one"
    # the same for every attempt of this job, and for no other
    mark = _mark(spec.ruid, job.job_id)
    fd = await open_file(
        user,
        lambda: _open(path, user) if size_mib is None else _open_new(path, user, size_mib * MIB, mark),
        path,
        timeout_s=timeout_s,
        code=Code.STAGE,
        hint=hint,
    )
    try:
        record.append(job.place, {"do": "disk", "path": path})
    except BaseException:
        os.close(fd)
        raise
    return fd


def _mark(ruid: str, job_id: str) -> bytes:
    import uuid  # few jobs have a disk

    return uuid.uuid5(uuid.NAMESPACE_OID, f"vtorque {ruid} {job_id}").bytes


# what follows runs in the child, with the user's rights


def _open(path: str, user: User) -> int:
    fd, info = open_own(path, user, os.O_RDWR)
    if not info.st_size or info.st_size % SECTOR:
        raise OSError(0, f"its size of {info.st_size} bytes is no multiple of {SECTOR}")
    _lock(fd)
    os.set_blocking(fd, True)
    return fd


def _lock(fd: int) -> None:
    whole = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole)
    except OSError as err:
        if err.errno in (errno.EAGAIN, errno.EACCES):
            raise OSError(0, "in use by another guest") from None
        raise OSError(0, f"it cannot be locked: {err.strerror}") from None


def _open_new(path: str, user: User, size: int, mark: bytes) -> int:
    """The disk that this job has made, in an earlier attempt or now."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        _make(path, user, size, mark)
    fd = _open(path, user)
    start = os.pread(fd, _UUID_AT + 16, 0)
    if start[_MAGIC_AT : _MAGIC_AT + 2] != _MAGIC or start[_UUID_AT:] != mark or os.fstat(fd).st_size != size:
        raise OSError(0, "it is there already, and not of this job")
    return fd


def _make(path: str, user: User, size: int, mark: bytes) -> None:
    """Make a disk with a file system; it has its name when it is whole."""
    folder, _, name = path.rpartition("/")
    hidden = f"{folder}/.{name}.new"
    Path(hidden).unlink(missing_ok=True)
    fd = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.truncate(fd, size)
        _make_file_system(hidden, user, mark)
        os.fsync(fd)
        os.rename(hidden, path)
    except BaseException:
        Path(hidden).unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _make_file_system(path: str, user: User, mark: bytes) -> None:
    text = mark.hex()
    done = _run(
        [
            MKFS,
            "-q",
            "-F",
            "-b", "4096",
            "-I", "256",
            "-m", "0",
            "-L", LABEL,
            "-U", "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])),
            "-O", ",".join(FEATURES),
            "-E", f"root_owner={user.uid}:{user.gid},lazy_itable_init=1,lazy_journal_init=1",
            path,
        ]
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise OSError(0, f"{MKFS} failed: {said[0][:200] if said else f'status {done.returncode}'}")


def _run(argv: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Run a program of the node's, which is killed with the caller."""
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            cwd="/",
            preexec_fn=dies_with(os.getpid()),
        )
    except OSError as err:
        raise OSError(0, f"{argv[0]}: {err.strerror}; is it installed on the node?") from None
