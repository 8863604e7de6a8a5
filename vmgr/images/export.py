"""A disk of the pool as one file of its own, for use elsewhere."""

from __future__ import annotations

import functools
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Optional

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image, Pool
from vmgr.images.report import Report
from vmgr.images.unprivileged import Source, convert
from vmgr.newfile import new_file

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
            with new_file(file, 0o666, replace=force) as target, report.bar("writing", 100) as advance:
                convert(chain, target, virtual_size=image.virtual_size, advance=advance)
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
