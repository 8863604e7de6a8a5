"""The image pool: immutable, numbered revisions of guest images below one root-owned directory.

    <pool>/<name>/<revision>/image.yaml    what the image is (class Image), with the SHA-256 of every file
    <pool>/<name>/<revision>/.hold         locked (flock(2), shared) by whoever uses the revision
    <pool>/<name>/<revision>/…             disk, kernel, initial RAM disk, packages.txt
    <pool>/<name>/.lock                    locked by whoever changes the image; holds the last number given

A revision appears whole, by one rename, never changes afterwards, and goes by one rename; files are 0444. The newest
is the default. image.yaml is YAML that is laid out as JSON, so that it is read without a YAML library.

This module reads and holds; `vmgr.images.writing` and `vmgr.images.removing` change the pool. Kept light (no
third-party imports): `vsub` reads the pool on every submission.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional, Union

from vmgr.errors import Code, VTorqueError
from vmgr.trust import check_trusted

if TYPE_CHECKING:
    from pathlib import Path

SIDECAR = "image.yaml"
HOLD = ".hold"
VERSION = 2
NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
REVISION = r"[1-9][0-9]{0,8}"
REFERENCE = rf"({NAME})(?:@({REVISION}))?"
PARTS = ("disk", "kernel", "initrd", "packages")
_KINDS: dict[str, type] = {
    **dict.fromkeys(("family", "distro", "arch", "description", "created", "added_by", "disk_format", "cmdline"), str),
    "min_ram_mib": int,
    "virtual_size": int,
    "features": list,
    "files": dict,
}
"""What the fields of a description that are used without a look are."""


class Image(NamedTuple):
    """One revision of an image; the fields but the first three are those of image.yaml.

    `disk`, `kernel`, `initrd` and `packages` are file names inside the revision, `files` maps each file to
    its `sha256` and `size`. `disk` is None for an image that lives in its initial RAM disk, `kernel` and
    `initrd` are None for one that boots from its own disk. `parent` is the image (`NAME@REVISION`) whose disk this
    disk is a layer on, None for a disk that stands alone.
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
    added_by: str = ""
    parent: Optional[str] = None

    def path(self, which: str) -> Path:
        """The file of the part `which`: disk, kernel, initrd, packages. Raises VTorqueError if none."""
        name = getattr(self, which, None) if which in PARTS else None
        if not name:
            raise VTorqueError(
                f"the image {self.reference} has no {which}", code=Code.IMAGE, hint="see `vmgr image show`"
            )
        return self.directory / str(name)

    @property
    def reference(self) -> str:
        """The image's name with its revision, `debian-12@3`; the path of a user's own."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def is_own(self) -> bool:
        """Whether this is a disk of a user's, which lies in no pool: its name is its path, it has no revision."""
        return self.revision == 0

    @property
    def directory(self) -> Path:
        """The folder of the revision."""
        from pathlib import Path  # a submission does without

        return Path(self.folder)

    @property
    def size(self) -> int:
        """Bytes that the revision takes in the pool."""
        return sum(int(entry["size"]) for entry in self.files.values())


def split_reference(text: str) -> tuple[str, Optional[int]]:
    """The name and the revision in `debian-12@3`; None where it names no revision.

    Raises VTorqueError (VT-IMAGE) for what names no image.
    """
    match = re.fullmatch(REFERENCE, text)
    if match is None:
        raise VTorqueError(
            f"{text!r} names no image", code=Code.IMAGE, hint=f"NAME or NAME@REVISION is needed, a name is {NAME}"
        )
    return match[1], int(match[2]) if match[2] else None


Broken = Callable[[VTorqueError], object]


def _fail(problem: VTorqueError) -> None:
    raise problem


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
        return [name for name in sorted(listed(self._folder)) if re.fullmatch(NAME, name) and self.revisions(name)]

    def revisions(self, name: str) -> list[int]:
        """The revisions of the image `name`, oldest first; empty when there is no such image."""
        if not re.fullmatch(NAME, name):
            return []
        return sorted(int(entry) for entry in listed(f"{self._folder}/{name}") if re.fullmatch(REVISION, entry))

    def get(self, name: str, revision: Optional[int] = None) -> Image:
        """The image `name` (`debian-12` or `debian-12@3`), its newest revision unless another is asked for.

        Raises VTorqueError (VT-IMAGE) naming the images that there are; as root also VT-TRUST when anybody
        else could write the revision.
        """
        match = re.fullmatch(REFERENCE, name)
        if match is not None:
            name, revision = match[1], int(match[2]) if match[2] else revision
        while True:
            revisions = self.revisions(name)
            if not revisions:
                known = ", ".join(self.names()) or "none: build one with `vmgr image build`"
                raise VTorqueError(
                    f"unknown image {name!r} in the pool {self.path}", code=Code.IMAGE, hint=f"images: {known}"
                )
            wanted = revisions[-1] if revision is None else revision
            if wanted not in revisions:
                raise VTorqueError(
                    f"image {name} has no revision {wanted}",
                    code=Code.IMAGE,
                    hint=f"revisions: {', '.join(map(str, revisions))}",
                )
            directory = f"{self._folder}/{name}/{wanted}"
            try:
                return _read(directory, name, wanted)
            except VTorqueError:
                if os.path.isdir(directory):  # noqa: PTH112
                    raise
            # it was deleted since it was listed: look again

    def all(self, broken: Broken = _fail) -> Iterator[Image]:
        """Every revision of every image, by name, oldest first; those that go meanwhile are left out.

        `broken` gets what is wrong with one that cannot be read; unless it raises that one is left out too.
        """
        found = ((name, revision) for name in self.names() for revision in self.revisions(name))
        return (image for image in (self._if_readable(*each, broken) for each in found) if image is not None)

    def newest(self, broken: Broken = _fail) -> Iterator[Image]:
        """The newest revision of every image, by name; else as `all`."""
        return (
            image for image in (self._if_readable(name, None, broken) for name in self.names()) if image is not None
        )

    def _if_readable(self, name: str, revision: Optional[int], broken: Broken) -> Optional[Image]:
        try:
            return self.get(name, revision)
        except VTorqueError as err:
            left = self.revisions(name)
            if left and (revision is None or revision in left):
                broken(err)
            return None

    def hold(self, choose: Callable[[], Image]) -> tuple[Image, Optional[int]]:
        """What `choose` finds in the pool, kept from being deleted for as long as the descriptor is open, by whomever.

        The descriptor is None where the file may not be opened: a file server that takes root for nobody; and for a
        disk of a user's. Raises VTorqueError as `choose` does, and VT-IMAGE.
        """
        import fcntl  # a submission holds nothing

        while True:
            image = choose()
            if image.is_own:
                return image, None
            path = f"{image.folder}/{HOLD}"
            try:
                held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except PermissionError:
                return image, None
            except OSError as err:
                if not os.path.isdir(image.folder):  # noqa: PTH112
                    continue  # deleted since it was chosen: choose again
                raise VTorqueError(
                    f"cannot hold the image {image.reference}: {path}: {err.strerror}",
                    code=Code.IMAGE,
                    hint="build or add it anew",
                ) from err
            try:
                fcntl.flock(held, fcntl.LOCK_SH)  # who deletes has it for the moment of a rename
                if _is_still(held, path):
                    return image, held
            except OSError as err:
                os.close(held)
                raise VTorqueError(f"cannot hold the image {image.reference}: {err.strerror}", code=Code.IMAGE) from err
            os.close(held)

    def staging(
        self, name: str, progress: Callable[[str], None] = lambda _line: None
    ) -> contextlib.AbstractContextManager[Path]:
        """A temporary directory in which to make a revision of `name`, removed afterwards unless published.

        One at a time per image, by a lock that ends with its holder; so whatever temporary directory is found
        under the lock was left by a killed process, and is swept. Raises VTorqueError (VT-IMAGE, VT-BUILD).
        """
        from vmgr.images.writing import staging  # only those who change the pool need it

        return staging(self.path, name, progress)

    def publish(
        self,
        directory: Path,
        name: str,
        facts: Mapping[str, Any],
        *,
        known: Optional[Mapping[str, Mapping[str, Any]]] = None,
    ) -> Image:
        """Make the files in `directory` (on the pool's file system) the next revision of `name`.

        `facts` are the fields of image.yaml except created, added_by and files, which are filled in here; `parent` is
        None unless given. `known` has `sha256` and `size` of files for which they are known; others are read for it.
        Call it inside `staging` of the same name. The files become 0444 and, when root calls, root's.
        """
        from vmgr.images.writing import publish  # as above

        target = publish(self.path, directory, name, facts, known or {})
        return _read(os.fspath(target), name, int(target.name))


def listed(folder: str | os.PathLike[str]) -> list[str]:
    """The names in a folder, none where there is no folder: it may have gone just now."""
    try:
        return os.listdir(folder)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_still(descriptor: int, path: str) -> bool:
    """Whether an open file still has this path."""
    try:
        there, ours = os.stat(path), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _read(directory: str, name: str, revision: int) -> Image:
    check_trusted(directory)
    image = read_sidecar(directory, name, revision)
    for file in image.files:
        check_trusted(f"{directory}/{file}")
    return image


def read_sidecar(directory: str, name: str, revision: int) -> Image:
    """What image.yaml in `directory` says. Raises VTorqueError (VT-IMAGE) when it is none."""
    path = f"{directory}/{SIDECAR}"
    try:
        with open(path, "rb") as stream:
            data = json.loads(stream.read())
    except (OSError, ValueError) as err:
        reason = err.strerror if isinstance(err, OSError) else err
        raise VTorqueError(f"cannot read {path}: {reason}", code=Code.IMAGE, hint="build or add it anew") from err
    wanted = set(Image._fields) - {"folder", "name", "revision"}
    missing = sorted(wanted - set(data)) if isinstance(data, dict) else ["everything"]
    if missing or data.get("version") != VERSION:
        reason = f"it lacks {', '.join(missing)}" if missing else f"it is not of version {VERSION}"
        raise VTorqueError(f"{path} is no description of an image: {reason}", code=Code.IMAGE)
    values = {key: data[key] for key in wanted}
    for part in (*(data[part] for part in PARTS), *data["files"]):
        if part is None:
            continue
        if not isinstance(part, str) or "/" in part or part == "" or part.startswith("."):
            raise VTorqueError(f"{path} names a file outside of its image: {part!r}", code=Code.IMAGE)
    wrong = next((key for key, kind in _KINDS.items() if not isinstance(data[key], kind)), None)
    if wrong is None and not re.fullmatch(f"{NAME}@{REVISION}", str(data["parent"] or "a@1")):
        wrong = "parent"
    if wrong is not None:
        raise VTorqueError(f"{path}: {wrong} cannot be {data[wrong]!r}", code=Code.IMAGE, hint="build or add it anew")
    values["features"] = tuple(map(str, data["features"]))
    return Image(folder=directory, name=name, revision=revision, **values)


def describe(image: Image) -> dict[str, Any]:
    """The image as plain data, for `vmgr image show`."""
    shown_as = {"created": "added", "folder": "directory"}
    data = {shown_as.get(key, key): value for key, value in image._asdict().items()}
    data["directory"] = data.pop("directory")  # the last
    data["features"] = list(image.features)
    return data
