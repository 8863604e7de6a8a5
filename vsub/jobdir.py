"""The job directory ~/.vtorque/<ruid>/<sha256>/: written whole before the job is submitted, or not there at all.

Everything in it belongs to the user, and root believes none of it; the modes keep other users out (the
folder holds the job's private key).
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable
from typing import Optional

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import DIRECTORY, Spec, dump_spec, parse_job_directory, parse_spec, spec_hash
from vmgr.signals import undisturbed
from vsub.process import end_child, spawn, wait_status
from vsub.report import debug

KEYGEN = "/usr/bin/ssh-keygen"
JOB_ID = "job_id"
"""File beside the job directory that says whose it is, for `vsub.sweep`."""
_HOME = re.compile(r"[A-Za-z0-9._/+@:~-]+")
"""Characters of a home that mean nothing to shells, to the batch system's lists or in options of ssh."""
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class JobDirectory:
    """The files of one submission; used as a context manager, it takes them away again unless `keep()` was called.

    `stand_in` is a folder in which they are made instead of in the home, whose paths they hold all the same.
    """

    def __init__(self, home: str, uid: int, *, stand_in: Optional[str] = None) -> None:
        self.home = home
        self.uid = uid
        self.ruid = new_ruid()
        self.base = f"{stand_in or home}/{DIRECTORY}"
        self.outer = f"{self.base}/{self.ruid}"
        self.path = ""
        self._made_base = False
        self._kept = False
        self._keygen: Optional[int] = None

    def __enter__(self) -> JobDirectory:
        """Make the outer folder and start making the key pair in it, which takes a while."""
        if not _HOME.fullmatch(self.home) or parse_job_directory(f"{self._named()}/{'0' * 64}") is None:
            raise VTorqueError(
                f"the home {self.home!r} cannot hold a job's directory", code=Code.HOME,
                hint="its path must be absolute and short, of letters, digits and ._/+@:~- and without `..`; "
                "ask the administrator, or add -vm off",
            )  # fmt: skip
        try:
            with undisturbed() as mask:  # an exception of a signal's would lose what has just been made or started
                self._make_outer()
                self._keygen = self._start_keygen(mask)
        except OSError as err:
            self.remove()
            raise _failed(err, self.outer) from err
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            self.remove()

    def keep(self, job_id: bytes) -> None:
        """The job has been submitted: its files stay, with its id beside them."""
        self._kept = True
        try:
            folder = os.open(self.outer, _FOLDER)
            try:
                _write(folder, JOB_ID, job_id + b"\n", 0o600)
            finally:
                os.close(folder)
        except OSError as err:
            debug(f"cannot note the job's id in {self.outer}: {err.strerror}")

    def _make_outer(self) -> None:
        for _ in range(100):  # another submission that failed may take the base away between the two calls
            try:
                os.mkdir(self.base, 0o700)  # noqa: PTH102
                self._made_base = True
            except FileExistsError:
                pass
            self._check_base()
            try:
                os.mkdir(self.outer, 0o700)  # noqa: PTH102
                return
            except FileNotFoundError:
                continue
        raise VTorqueError(f"cannot make {self.outer}: {self.base} keeps vanishing", code=Code.HOME)

    def _check_base(self) -> None:
        try:
            info = os.lstat(self.base)
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != self.uid:
            raise VTorqueError(f"{self.base} is not a folder of yours", code=Code.HOME, hint="move it away")

    def _start_keygen(self, mask: Iterable[int]) -> int:
        return spawn(
            [
                KEYGEN,
                "-q",
                "-t", "ed25519",
                "-N", "",
                "-C", f"vtorque-{self.ruid}",
                "-f", f"{self.outer}/key",
            ],
            stdin=os.devnull,
            mask=mask,
        )  # fmt: skip

    def public_key(self) -> str:
        """Type and body of the job's public key, once it is made."""
        status = wait_status(self._keygen) if self._keygen is not None else 1
        self._keygen = None
        if status != 0:
            raise VTorqueError(f"{KEYGEN} failed with status {status}", code=Code.HOME, hint="quota, disk full?")
        try:
            with open(f"{self.outer}/key.pub", encoding="ascii") as stream:
                return " ".join(stream.read(1024).split()[:2])
        except OSError as err:
            raise _failed(err, f"{self.outer}/key.pub") from err

    def write(self, spec: Spec, files: dict[str, bytes], programs: dict[str, list[str]]) -> str:
        """Write the specification, `files` and small `programs` that start something else; gives the path.

        A program's argument `{}` stands for the job directory.
        """
        data = dump_spec(spec)
        name = spec_hash(data)
        _check_readable(data, name)
        self.path, named = f"{self.outer}/{name}", f"{self._named()}/{name}"
        try:
            os.mkdir(self.path, 0o700)  # noqa: PTH102
            folder = os.open(self.path, _FOLDER)
            try:
                for name in ("key", "key.pub"):
                    os.rename(f"{self.outer}/{name}", name, dst_dir_fd=folder)
                _write(folder, "spec.json", data, 0o600)
                for name, content in files.items():
                    _write(folder, name, content, 0o700)
                for name, argv in programs.items():
                    _write(folder, name, exec_wrapper([named if word == "{}" else word for word in argv]), 0o700)
            finally:
                os.close(folder)
        except OSError as err:
            raise _failed(err, self.path) from err
        return named

    def _named(self) -> str:
        """The outer folder by the name that it has in the home."""
        return f"{self.home}/{DIRECTORY}/{self.ruid}"

    def remove(self) -> None:
        """Take everything away that this submission made; what is gone already is no error."""
        with undisturbed():  # a second signal would leave the rest
            if self._keygen is not None:
                end_child(self._keygen)
                self._keygen = None
            remove_tree(self.outer)
            if self._made_base:
                _quietly(os.rmdir, self.base)


def _check_readable(data: bytes, name: str) -> None:
    """Refuse what root would refuse to read on the node. Raises VTorqueError (VT-VALUE)."""
    try:
        parse_spec(data, sha256=name, source="of this job")
    except VTorqueError as err:
        raise VTorqueError(err.message, code=Code.VALUE, hint="ask for less, or for something shorter") from None


def remove_tree(path: str) -> None:
    """Remove a folder of job files, two levels deep; symbolic links are removed, never followed."""
    try:
        entries = list(os.scandir(path))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(entry.path)
        else:
            _quietly(os.unlink, entry.path)
    _quietly(os.rmdir, path)


def exec_wrapper(argv: list[str]) -> bytes:
    """A POSIX shell script that becomes `argv`, with the arguments that it is given."""
    return os.fsencode("#!/bin/sh\nexec " + " ".join(shlex.quote(word) for word in argv) + ' "$@"\n')


def new_ruid() -> str:
    """The random id of a submission: 16 of [0-9a-z]."""
    text = ""
    while len(text) < 16:
        text += "".join(_DIGITS[byte % 36] for byte in os.urandom(16) if byte < 252)
    return text[:16]


def _write(folder: int, name: str, content: bytes, mode: int) -> None:
    descriptor = os.open(name, _NEW, mode, dir_fd=folder)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)


def _quietly(act: Callable[[str], None], path: str) -> None:
    try:
        act(path)
    except OSError:
        pass


def _failed(err: OSError, path: str) -> VTorqueError:
    return VTorqueError(f"cannot write {err.filename or path}: {err.strerror}", code=Code.HOME)
