"""Adding a disk that somebody made to the pool: copied, its header checked, nothing in it believed."""

from __future__ import annotations

import os
import shutil
import stat
import struct
from pathlib import Path
from typing import Callable

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image, Pool

_HEADER = struct.Struct(">4sIQIIQ")
"""The start of a qcow2 file: magic, version, backing file offset and length, cluster bits, virtual size
(QEMU's docs/interop/qcow2.txt)."""
_INCOMPATIBLE = struct.Struct(">Q")
_INCOMPATIBLE_OFFSET = 72
_DIRTY = 1 << 0
_COMPRESSION_TYPE, _EXTENDED_L2 = 1 << 3, 1 << 4
MAX_VIRTUAL_BYTES = 16 << 40


def add_disk(
    file: Path, name: str, *, like: str, description: str, pool: Pool, progress: Callable[[str], None]
) -> Image:
    """Make a new revision of `name` from the qcow2 disk `file`, booted by the kernel and initrd of the image `like`.

    The disk must stand alone (no backing file, no external data file), because root's tools would follow it
    elsewhere; its header is read here, from our copy, and no tool is asked to guess its format. Raises VTorqueError
    (VT-IMAGE).
    """
    model = pool.get(like)
    with pool.staging(name, progress) as staging:
        out = staging / "out"
        out.mkdir()
        disk = out / "disk.qcow2"
        progress(f"copying {file}")
        _copy_regular(file, disk)
        virtual_size = check_qcow2(disk, shown_as=file)
        for part in ("kernel", "initrd"):
            shutil.copyfile(model.path(part), out / model.path(part).name)
        facts = {
            "family": model.family,
            "distro": model.distro,
            "arch": model.arch,
            "description": description or f"added from {file.name}, booted like {like}",
            "disk": disk.name,
            "disk_format": "qcow2",
            "virtual_size": virtual_size,
            "kernel": model.kernel,
            "initrd": model.initrd,
            "cmdline": model.cmdline,
            "min_ram_mib": model.min_ram_mib,
            "features": list(model.features),
            "packages": None,
            "recipe_hash": "",
        }
        progress("hashing it and publishing it in the pool")
        return pool.publish(out, name, facts)


def _copy_regular(source: Path, target: Path) -> None:
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as err:
        raise VTorqueError(f"cannot read {source}: {err.strerror}", code=Code.IMAGE) from err
    with os.fdopen(fd, "rb") as stream:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise VTorqueError(f"{source} is not a regular file", code=Code.IMAGE)
        with open(target, "wb") as copy:
            shutil.copyfileobj(stream, copy, 1 << 20)


def check_qcow2(disk: Path, *, shown_as: Path) -> int:
    """The virtual size in bytes of a qcow2 file that stands alone. Raises VTorqueError (VT-IMAGE) for any other file."""
    with open(disk, "rb") as stream:
        header = stream.read(104)
    if len(header) < 104 or header[:4] != b"QFI\xfb":
        raise _refused(shown_as, "no qcow2 image", "convert it: qemu-img convert -O qcow2")
    _, version, backing_offset, _, _, virtual_size = _HEADER.unpack_from(header)
    if version not in (2, 3):
        raise _refused(shown_as, f"qcow2 of version {version}", "2 and 3 are known")
    if backing_offset:
        raise _refused(shown_as, "an overlay with a backing file", "flatten it: qemu-img convert -O qcow2")
    incompatible = _INCOMPATIBLE.unpack_from(header, _INCOMPATIBLE_OFFSET)[0] if version == 3 else 0
    if incompatible & ~(_DIRTY | _COMPRESSION_TYPE | _EXTENDED_L2):
        raise _refused(shown_as, "corrupt or keeps its data in another file", "flatten it: qemu-img convert -O qcow2")
    if not 0 < virtual_size <= MAX_VIRTUAL_BYTES:
        raise _refused(shown_as, f"of {virtual_size} bytes", f"1 to {MAX_VIRTUAL_BYTES} are allowed")
    return int(virtual_size)


def _refused(path: Path, what: str, remedy: str) -> VTorqueError:
    return VTorqueError(f"{path} is {what}", code=Code.IMAGE, hint=remedy)
