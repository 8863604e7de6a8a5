"""The image pool: immutable, numbered revisions of guest images below one root-owned directory.

    <pool>/<name>/<revision>/image.json    what the image is (class Image), with the SHA-256 of every file
    <pool>/<name>/<revision>/…             disk, kernel, initial RAM disk, packages.txt

A revision appears whole, by one rename, and never changes afterwards; files are 0444. The newest is the
default. Kept light (no third-party imports): `vsub` reads the pool on every submission.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional, Union

from vmgr.errors import Code, VTorqueError
from vmgr.trust import check_trusted

if TYPE_CHECKING:
    from pathlib import Path

SIDECAR = "image.json"
VERSION = 1
NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
_TEMPORARY = ".tmp-"
_LOCK = ".lock"
_KINDS: dict[str, type] = {
    **dict.fromkeys(("family", "distro", "arch", "description", "created", "disk_format", "cmdline"), str),
    "min_ram_mib": int,
    "virtual_size": int,
    "features": list,
    "files": dict,
}
"""What the fields of a description that are used without a look are."""


class Image(NamedTuple):
    """One revision of an image; the fields are those of image.json.

    `disk`, `kernel`, `initrd` and `packages` are file names inside the revision, `files` maps each file to
    its `sha256` and `size`. `disk` is None for an image that lives in its initial RAM disk, `kernel` and
    `initrd` are None for one that boots only from its own disk.
    """

    folder: str
    name: str
    revision: int
    family: str
    distro: str
    arch: str
    description: str
    created: str
    disk: Optional[str]
    disk_format: str
    virtual_size: int
    kernel: Optional[str]
    initrd: Optional[str]
    cmdline: str
    min_ram_mib: int
    features: tuple[str, ...]
    files: Mapping[str, Mapping[str, Any]]
    packages: Optional[str]
    recipe_hash: str

    def path(self, which: str) -> Path:
        """The file of the part `which`: disk, kernel, initrd, packages. Raises VTorqueError if none."""
        name = getattr(self, which, None) if which in ("disk", "kernel", "initrd", "packages") else None
        if not name:
            raise VTorqueError(
                f"image {self.name} revision {self.revision} has no {which}",
                code=Code.IMAGE,
                hint="see `vmgr image show`",
            )
        return self.directory / str(name)

    @property
    def directory(self) -> Path:
        """The folder of the revision."""
        from pathlib import Path  # a submission does without

        return Path(self.folder)

    @property
    def size(self) -> int:
        """Bytes that the revision takes in the pool."""
        return sum(int(entry["size"]) for entry in self.files.values())


class Pool:
    """The images below `path`; the directory need not exist to ask, only to publish."""

    def __init__(self, path: Union[str, os.PathLike[str]]) -> None:
        self._folder = os.fspath(path)

    @property
    def path(self) -> Path:
        """The folder of the pool."""
        from pathlib import Path  # a submission does without

        return Path(self._folder)

    def names(self) -> list[str]:
        """The names of all images that have at least one revision, sorted."""
        return [name for name in sorted(_listed(self._folder)) if re.fullmatch(NAME, name) and self.revisions(name)]

    def revisions(self, name: str) -> list[int]:
        """The revisions of the image `name`, oldest first; empty when there is no such image."""
        if not re.fullmatch(NAME, name):
            return []
        entries = _listed(f"{self._folder}/{name}")
        return sorted(int(entry) for entry in entries if entry.isascii() and entry.isdigit() and entry[0] != "0")

    def get(self, name: str, revision: Optional[int] = None) -> Image:
        """The image `name`, its newest revision unless another is asked for.

        Raises VTorqueError (VT-IMAGE) naming the images that there are; as root also VT-TRUST when anybody
        else could write the revision.
        """
        revisions = self.revisions(name)
        if not revisions:
            known = ", ".join(self.names()) or "none: build one with `vmgr image build`"
            raise VTorqueError(
                f"unknown image {name!r} in the pool {self.path}", code=Code.IMAGE, hint=f"images: {known}"
            )
        if revision is None:
            revision = revisions[-1]
        if revision not in revisions:
            raise VTorqueError(
                f"image {name} has no revision {revision}",
                code=Code.IMAGE,
                hint=f"revisions: {', '.join(map(str, revisions))}",
            )
        directory = f"{self._folder}/{name}/{revision}"
        check_trusted(directory)
        image = _read_sidecar(directory, name, revision)
        for file in image.files:
            check_trusted(f"{directory}/{file}")
        return image

    @contextlib.contextmanager
    def staging(self, name: str, progress: Callable[[str], None] = lambda _line: None) -> Iterator[Path]:
        """A temporary directory in which to make a revision of `name`, removed afterwards unless published.

        One at a time per image, by a lock that ends with its holder; so whatever temporary directory is found
        under the lock was left by a killed build, and is swept.
        """
        if not re.fullmatch(NAME, name):
            raise VTorqueError(f"illegal image name {name!r}", code=Code.IMAGE, hint=f"a name looks like {NAME}")
        import tempfile  # only a build needs these; a submission reads the pool
        from pathlib import Path

        home = self.path / name
        lock = self._locked(home, progress)
        try:
            for left in home.glob(f"{_TEMPORARY}*"):
                _remove(left)
            work = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=home))
            try:
                yield work
            finally:
                _remove(work)
        finally:
            if _listed(os.fspath(home)) == [_LOCK]:
                (home / _LOCK).unlink()
                home.rmdir()
            os.close(lock)

    def _locked(self, home: Path, progress: Callable[[str], None]) -> int:
        """The lock of an image's folder, both made where they are missing. Who leaves the folder empty removes it."""
        while True:
            try:
                home.mkdir(parents=True, exist_ok=True)
                lock = os.open(home / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue
            except OSError as err:
                raise VTorqueError(f"cannot write the pool {self.path}: {err.strerror}", code=Code.BUILD) from err
            try:
                _lock(lock, home.name, progress)
                if os.path.samestat(os.fstat(lock), (home / _LOCK).stat()):
                    return lock
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)

    def publish(self, directory: Path, name: str, facts: Mapping[str, Any]) -> Image:
        """Make the files in `directory` (on the pool's file system) the next revision of `name`.

        `facts` are the fields of image.json except name, revision, created and files, which are filled in
        here. Call it inside `staging` of the same name. The files become 0444 and, when root calls, root's.
        """
        revision = (self.revisions(name) or [0])[-1] + 1
        files = {path.name: _digest(path) for path in sorted(directory.iterdir())}
        sidecar = {
            "version": VERSION,
            "name": name,
            "revision": revision,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **facts,
            "files": files,
        }
        (directory / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n")
        for path in directory.iterdir():
            if os.geteuid() == 0:
                os.chown(path, 0, 0)
            path.chmod(0o444)
        directory.chmod(0o755)
        image = _read_sidecar(os.fspath(directory), name, revision)
        target = f"{self._folder}/{name}/{revision}"
        directory.rename(target)
        return _read_sidecar(target, name, image.revision)


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []


def _lock(descriptor: int, name: str, progress: Callable[[str], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress(f"another build of {name} is running; waiting for it")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _remove(directory: Path) -> None:
    if directory.is_symlink() or not directory.is_dir():
        with contextlib.suppress(FileNotFoundError):
            directory.unlink()
        return
    import shutil  # as above

    shutil.rmtree(directory, ignore_errors=True)


def _digest(path: Path) -> dict[str, Any]:
    import hashlib  # as above

    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "size": path.stat().st_size}


def _read_sidecar(directory: str, name: str, revision: int) -> Image:
    path = f"{directory}/{SIDECAR}"
    try:
        with open(path, "rb") as stream:
            data = json.loads(stream.read())
    except (OSError, ValueError) as err:
        raise VTorqueError(f"cannot read {path}: {err}", code=Code.IMAGE, hint="build it anew") from err
    wanted = set(Image._fields) - {"folder"}
    missing = sorted(wanted - set(data)) if isinstance(data, dict) else ["everything"]
    if missing or data.get("version") != VERSION or (data["name"], data["revision"]) != (name, revision):
        reason = f"it lacks {', '.join(missing)}" if missing else "it is of another version, name or revision"
        raise VTorqueError(f"{path} is no description of this image: {reason}", code=Code.IMAGE)
    values = {key: data[key] for key in wanted}
    for part in (data["disk"], data["kernel"], data["initrd"], data["packages"], *data["files"]):
        if part is None:
            continue
        if not isinstance(part, str) or "/" in part or part == "" or part.startswith("."):
            raise VTorqueError(f"{path} names a file outside of its image: {part!r}", code=Code.IMAGE)
    wrong = next((key for key, kind in _KINDS.items() if not isinstance(data[key], kind)), None)
    if wrong is not None:
        raise VTorqueError(f"{path}: {wrong} cannot be {data[wrong]!r}", code=Code.IMAGE, hint="build it anew")
    values["features"] = tuple(map(str, data["features"]))
    return Image(folder=directory, **values)


def describe(image: Image) -> dict[str, Any]:
    """The image as plain data, for `vmgr image show`."""
    data = image._asdict()
    data["directory"] = data.pop("folder")
    data["features"] = list(image.features)
    return data
