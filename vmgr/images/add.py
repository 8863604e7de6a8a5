"""Adding disks that somebody made to the pool: copied, checked, converted where asked for, never believed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

from vmgr.errors import Code, VTorqueError, printable
from vmgr.images.header import FOREIGN, FORMATS, Header, check_size, refused
from vmgr.images.holes import data_ranges
from vmgr.images.pool import Image, Pool
from vmgr.images.report import Report
from vmgr.images.unprivileged import Source, check, convert, inspect
from vmgr.images.writing import check_name, digest

FEATURES = ("9p", "virtiofs", "nfs", "mpi", "cloud-init", "direct-boot", "disk-boot")
"""What an image can say that it can do; docs/images.md says what each means."""
ARCHITECTURE = "x86_64"
MIN_RAM_MIB = 256
_TABLES = 1 << 30
"""What the tables of a disk may take beside its data."""
_BLOCK = 1 << 20
_ZEROS = bytes(_BLOCK)


class Wish(NamedTuple):
    """What is said of an image; None for what is not, which comes from the image that it is like, or from a default."""

    description: Optional[str] = None
    family: Optional[str] = None
    distro: Optional[str] = None
    min_ram_mib: Optional[int] = None
    features: Optional[tuple[str, ...]] = None


class Given(NamedTuple):
    """A disk that somebody made.

    `format` is what its owner says it is, None for what its header shows. `convert`: to qcow2. `bound` is the largest
    virtual size in bytes.
    """

    file: Path
    bound: int
    format: Optional[str] = None
    convert: bool = False


class _Disk(NamedTuple):
    """A disk in the staging directory, checked."""

    name: str
    format: str
    virtual_size: int
    known: dict[str, Any]


def families(templates: Path) -> list[str]:
    """The guest families that there are templates for."""
    return sorted(path.name for path in (templates / "guest").glob("*") if path.is_dir() and path.name != "common")


def add_disk(
    given: Given, name: str, wish: Wish, *, like: Optional[str], pool: Pool, templates: Path, report: Report
) -> Image:
    """Make a new revision of `name` from a disk, booted by kernel and initrd of the image `like`, else by itself.

    The disk must stand alone (no backing file, no external data file), because root's tools would follow it
    elsewhere. Its header is read from our copy, by a process without rights, and no tool is asked to guess its format.
    Raises VTorqueError (VT-IMAGE).
    """
    check_name(name)
    _check_wish(wish, templates)
    if like is None and wish.family is None:
        raise VTorqueError(
            f"the family of {given.file} is not known",
            code=Code.IMAGE,
            hint=f"--like IMAGE boots it as that image, --family by itself: {', '.join(families(templates))}",
        )
    with _held(pool, like) as model:
        facts = _facts_of(model) if model is not None else dict(_BY_ITSELF)
        facts["description"] = f"added from {printable(given.file.name)}" + (
            f", booted like {model.reference}" if model else ""
        )
        return _make(pool, name, {**facts, **_said(wish)}, given, model, report)


def update_image(
    reference: str, wish: Wish, given: Optional[Given], *, pool: Pool, templates: Path, report: Report
) -> Image:
    """Make a new revision of an image from a revision of it: with another disk, or another description of the same.

    Files that stay are shared by hard links. Raises VTorqueError (VT-IMAGE).
    """
    _check_wish(wish, templates)
    if given is None and not _said(wish):
        raise VTorqueError(
            f"nothing to change in {reference}", code=Code.IMAGE, hint="give a FILE, or an option such as --description"
        )
    with _held(pool, reference) as model:
        assert model is not None
        return _make(pool, model.name, {**_facts_of(model), **_said(wish)}, given, model, report)


@contextlib.contextmanager
def _held(pool: Pool, reference: Optional[str]) -> Iterator[Optional[Image]]:
    """An image of the pool, which nobody deletes meanwhile; None for none."""
    if reference is None:
        yield None
        return
    image, held = pool.hold(lambda: pool.get(reference))
    try:
        yield image
    finally:
        if held is not None:
            os.close(held)


_BY_ITSELF: Mapping[str, Any] = {
    "arch": ARCHITECTURE, "distro": "", "kernel": None, "initrd": None, "cmdline": "", "min_ram_mib": MIN_RAM_MIB,
    "features": ["disk-boot"], "packages": None, "recipe_hash": "",
}  # fmt: skip
"""What holds of an image that boots from its own disk, when nobody says more."""


def _facts_of(model: Image) -> dict[str, Any]:
    """What a new revision has from an image; the list of its packages and its recipe are not those of another disk."""
    own = ("folder", "name", "revision", "created", "added_by", "files")
    facts = {key: value for key, value in model._asdict().items() if key not in own}
    return {**facts, "features": list(model.features)}


def _said(wish: Wish) -> dict[str, Any]:
    said = {key: value for key, value in wish._asdict().items() if value is not None}
    if wish.features is not None:
        said["features"] = list(wish.features)
    if wish.family is not None:
        said.setdefault("distro", wish.family)
    return said


def _check_wish(wish: Wish, templates: Path) -> None:
    """Refuse what cannot be. Raises VTorqueError (VT-IMAGE)."""
    if wish.family is not None and wish.family not in families(templates):
        raise VTorqueError(
            f"there are no templates for guests of the family {wish.family!r} in {templates}",
            code=Code.IMAGE,
            hint=f"families: {', '.join(families(templates)) or 'none'}",
        )
    unknown = [feature for feature in wish.features or () if feature not in FEATURES]
    if unknown:
        raise VTorqueError(
            f"{unknown[0]!r} is no feature of images", code=Code.IMAGE, hint=f"features: {', '.join(FEATURES)}"
        )
    for key, text in (("description", wish.description), ("distro", wish.distro)):
        if text is not None and not text.isprintable():
            raise VTorqueError(f"the {key} {text!r} is no line of text", code=Code.IMAGE, hint="leave line breaks out")


def _make(
    pool: Pool, name: str, facts: dict[str, Any], given: Optional[Given], model: Optional[Image], report: Report
) -> Image:
    """Make and publish the revision: with the disk that is given, if one is, and otherwise the files of `model`."""
    with pool.staging(name, report.line) as staging:
        out = staging / "out"
        out.mkdir()
        known: dict[str, Any] = {}
        kept = ("kernel", "initrd") if given is not None else ("kernel", "initrd", "disk", "packages")
        if given is not None:
            disk = _stage(given, staging, out, report)
            facts.update(
                disk=disk.name, disk_format=disk.format, virtual_size=disk.virtual_size,
                parent=None, packages=None, recipe_hash="",
            )  # fmt: skip
            known[disk.name] = disk.known
        for part in kept:
            if model is not None and getattr(model, part):
                path = model.path(part)
                _link(path, out / path.name)
                known[path.name] = model.files[path.name]
        if facts["kernel"] is None and "disk-boot" not in facts["features"]:
            facts["features"] = [*facts["features"], "disk-boot"]
        report.line("publishing it in the pool")
        return pool.publish(out, name, facts, known=known)


def _link(source: Path, target: Path) -> None:
    """The same file, of a revision that never changes."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as err:
        if err.errno not in (errno.EMLINK, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP):
            raise VTorqueError(f"cannot use {source}: {err.strerror}", code=Code.IMAGE) from err
        shutil.copyfile(source, target, follow_symlinks=False)


def _stage(given: Given, staging: Path, out: Path, report: Report) -> _Disk:
    """Copy, check, and convert the disk. The copy is ours: nobody can change it any more."""
    copy = staging / "copy"
    known = _copy(given, copy, report)
    shown_as = str(given.file)
    with copy.open("rb") as stream:
        fd = stream.fileno()
        header = inspect(fd, shown_as=shown_as, said=given.format, bound=given.bound)
        source = Source(fd, header.format)
        size = header.virtual_size
        if header.format != "raw":
            report.line("checking it")
            size = check(source, shown_as=shown_as)
            check_size(size, shown_as, given.bound)
        assert size is not None
        if header.format in FORMATS and not given.convert:
            name = f"disk.{header.format}"
            copy.rename(out / name)
            return _Disk(name, header.format, size, known)
        target = out / "disk.qcow2"
        with target.open("xb") as made, report.bar("converting", 100) as advance:
            convert([source], made.fileno(), virtual_size=size, advance=advance)
    copy.unlink()
    with report.bar("hashing", target.stat().st_size) as advance:
        return _Disk(target.name, "qcow2", size, digest(target, advance))


def _copy(given: Given, target: Path, report: Report) -> dict[str, Any]:
    """Copy a regular file with its holes, hashing it on the way; gives `sha256` and `size`.

    What is refused by its header is refused before.
    """
    source = given.file
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as err:
        reason = "it is a symbolic link" if err.errno == errno.ELOOP else err.strerror
        raise VTorqueError(f"cannot read {source}: {reason}", code=Code.IMAGE) from err
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise VTorqueError(f"{source} is not a regular file", code=Code.IMAGE)
        header = inspect(fd, shown_as=str(source), said=given.format, bound=given.bound)
        _check_length(given, header, info, target.parent)
        if header.format in FOREIGN and not given.convert:
            raise refused(str(source), f"of format {header.format}", "--convert makes a qcow2 disk of it")
        with target.open("xb") as copy, report.bar("copying", info.st_size) as advance:
            found = hashlib.sha256()
            at = 0
            for start, end in data_ranges(fd, info.st_size):
                _hash_zeros(found, start - at)
                advance(start - at)
                at = start
                while at < end:
                    block = os.pread(fd, min(_BLOCK, end - at), at)
                    if not block:
                        raise VTorqueError(f"{source} has become shorter meanwhile", code=Code.IMAGE)
                    os.pwrite(copy.fileno(), block, at)
                    found.update(block)
                    at += len(block)
                    advance(len(block))
            _hash_zeros(found, info.st_size - at)
            os.ftruncate(copy.fileno(), info.st_size)
        target.chmod(0o444)  # in a directory of ours: for the process without rights, which opens it anew
        return {"sha256": found.hexdigest(), "size": info.st_size}
    except OSError as err:
        raise VTorqueError(f"cannot copy {source}: {err.strerror}", code=Code.IMAGE) from err
    finally:
        os.close(fd)


def _check_length(given: Given, header: Header, info: os.stat_result, folder: Path) -> None:
    """Refuse a file that has no room in the pool, or is longer than such a disk can be: holes take time too."""
    free = shutil.disk_usage(folder).free
    data = min(info.st_size, info.st_blocks * 512)
    if data > free:
        raise refused(str(given.file), f"too large: it takes {data} bytes", f"the pool has room for {free}")
    size = header.virtual_size or given.bound
    if info.st_size > size + size // 4 + _TABLES:
        raise refused(str(given.file), f"too long: {info.st_size} bytes for a disk of {size}", "is it whole?")


def _hash_zeros(found: Any, count: int) -> None:
    while count > 0:
        found.update(memoryview(_ZEROS)[: min(count, _BLOCK)])
        count -= _BLOCK
