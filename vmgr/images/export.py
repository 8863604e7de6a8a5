"""A disk of the pool as one file of its own, for use elsewhere."""

from __future__ import annotations

import errno
import functools
import os
import secrets
from contextlib import ExitStack
from pathlib import Path
from typing import Optional

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image, Pool
from vmgr.images.report import Report
from vmgr.images.unprivileged import Source, convert

_MAX_LAYERS = 64


def export(pool: Pool, reference: str, file: Path, *, force: bool, report: Report) -> Image:
    """Write the disk of an image to `file`, with the caller's rights: one qcow2 disk, sparse, that stands alone.

    It appears whole. A file that is there is refused unless `force`. Raises VTorqueError (VT-IMAGE).
    """
    if not force and _is_there(file):
        raise VTorqueError(f"{file} is there already", code=Code.IMAGE, hint="--force replaces it")
    with ExitStack() as opened:
        image, chain = _chain(pool, reference, opened)
        try:
            target, name = _new_file(file)
            opened.callback(os.close, target)
            try:
                with report.bar("writing", 100) as advance:
                    convert(chain, target, virtual_size=image.virtual_size, advance=advance)
                os.fchmod(target, 0o666 & ~_umask())
                os.fsync(target)
                _appear(target, name, file, force)
            finally:
                if name is not None:
                    name.unlink(missing_ok=True)
        except OSError as err:
            raise VTorqueError(f"cannot write {file}: {err.strerror}", code=Code.IMAGE) from err
    return image


def _chain(pool: Pool, reference: str, opened: ExitStack) -> tuple[Image, list[Source]]:
    """The image, and its disk with all that it is a layer on, open, held in the pool meanwhile."""
    images: list[Image] = []
    chain: list[Source] = []
    wanted: Optional[str] = reference
    while wanted is not None:
        image, held = pool.hold(functools.partial(pool.get, wanted))
        if held is not None:
            opened.callback(os.close, held)
        try:
            fd = os.open(image.path("disk"), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as err:
            raise VTorqueError(f"cannot read {image.path('disk')}: {err.strerror}", code=Code.IMAGE) from err
        opened.callback(os.close, fd)
        images.append(image)
        chain.append(Source(fd, image.disk_format))
        if len(chain) > _MAX_LAYERS:
            raise VTorqueError(f"{reference} has more than {_MAX_LAYERS} layers", code=Code.IMAGE)
        wanted = image.parent
    return images[0], chain


def _is_there(file: Path) -> bool:
    """Whether there is such a file, or a link. Raises VTorqueError (VT-IMAGE) where one may not even look."""
    try:
        file.lstat()
    except FileNotFoundError:
        return False
    except OSError as err:
        raise VTorqueError(f"cannot write {file}: {err.strerror}", code=Code.IMAGE) from err
    return True


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _new_file(file: Path) -> tuple[int, Optional[Path]]:
    """An open file without a name, of which nothing is left if we are killed; else, as over NFS, with a hidden one."""
    try:
        return os.open(file.parent, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600), None
    except OSError as err:
        if err.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    name = _hidden(file)
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), name


def _hidden(file: Path) -> Path:
    return file.with_name(f".{file.name}.{secrets.token_hex(4)}")


def _appear(target: int, name: Optional[Path], file: Path, force: bool) -> None:
    """Give an open file, which has the hidden name `name` or none, its name; one that is there goes only by `force`."""
    there = file if name is None and not force else name or _hidden(file)
    if name is None:
        folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(str(target), there, src_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)
    if there == file:
        return
    try:
        if force:
            there.rename(file)
        else:
            os.link(there, file)
    except OSError:
        there.unlink(missing_ok=True)
        raise
