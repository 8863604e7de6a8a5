"""A disk that was saved from a running guest: a new revision in the pool, checked as a disk that somebody brings."""

from __future__ import annotations

import os
import shutil
from typing import Any, Callable, NamedTuple

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image, Pool
from vmgr.images.unprivileged import Source, check, inspect
from vmgr.node.staging.copying import copy_data, percent
from vmgr.node.staging.overlay import CREATE

SHOWN_AS = "the copy of the disk"


class Saved(NamedTuple):
    """What is saved: the new image's `name`, what it is for, the image that the guest booted, and whether it is whole.

    A disk that is not whole is a layer on the disk of `origin`.
    """

    name: str
    description: str
    origin: Image
    whole: bool


def publish_saved(
    pool: Pool, disk: int, saved: Saved, *, most: int, tell: Callable[[str], None], wait: Callable[[str], None]
) -> Image:
    """Make the qcow2 disk that is open as `disk` the next revision of an image; it boots as the guest's image does.

    Only a copy is looked at and published: whoever else has `disk` open may go on changing that. It may have `most`
    bytes. `wait` is called with what may take any time. Raises VTorqueError (VT-IMAGE, VT-BUILD).
    """
    origin = saved.origin
    size = os.fstat(disk).st_size
    if size > most:
        raise VTorqueError(f"{SHOWN_AS} has {size} bytes, more than {most}", code=Code.IMAGE)
    with pool.staging(saved.name, wait) as staging:
        out = staging / "out"
        out.mkdir()
        target = out / "disk.qcow2"
        fd = os.open(target, CREATE, 0o600)
        try:
            copy_data(disk, fd, size, percent("writing it to the pool", size, tell))
        finally:
            os.close(fd)
        wait("checking it")
        target.chmod(0o444)
        staging.chmod(0o711)
        out.chmod(0o711)  # for the process without rights that looks into the copy
        with target.open("rb") as stream:
            inspect(stream.fileno(), shown_as=SHOWN_AS, said="qcow2", bound=origin.virtual_size)
            virtual_size = check(Source(stream.fileno(), "qcow2"), shown_as=SHOWN_AS)
        if virtual_size != origin.virtual_size:
            raise VTorqueError(
                f"{SHOWN_AS} has {virtual_size} bytes for the guest, not {origin.virtual_size}", code=Code.IMAGE
            )
        for part in ("kernel", "initrd"):
            if getattr(origin, part) is not None:
                shutil.copyfile(origin.path(part), out / origin.path(part).name)
        wait("hashing it and publishing it in the pool")
        return pool.publish(out, saved.name, _facts(saved, target.name))


def _facts(saved: Saved, disk: str) -> dict[str, Any]:
    own = ("folder", "name", "revision", "created", "added_by", "files")
    return {
        **{key: value for key, value in saved.origin._asdict().items() if key not in own},
        "description": saved.description,
        "disk": disk,
        "disk_format": "qcow2",
        "features": list(saved.origin.features),
        "packages": None,
        "recipe_hash": "",
        "parent": None if saved.whole else saved.origin.reference,
    }
