"""Adding a disk that somebody made to the pool: copied, its header checked, nothing in it believed."""

from __future__ import annotations

import array
import errno
import os
import shutil
import stat
import struct
import sys
from pathlib import Path
from typing import BinaryIO, Callable

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image, Pool

_HEADER = struct.Struct(">4sIQIIQIIQQI")
"""The start of a qcow2 file: magic, version, backing file offset and length, cluster bits, virtual size, encryption,
entries and offset of the L1 table, offset and clusters of the refcount table (QEMU's docs/interop/qcow2.txt)."""
_INCOMPATIBLE = struct.Struct(">Q")
_INCOMPATIBLE_OFFSET = 72
_DIRTY = 1 << 0
_COMPRESSION_TYPE, _EXTENDED_L2 = 1 << 3, 1 << 4
_OFFSET, _COMPRESSED = 0x00FF_FFFF_FFFF_FE00, 1 << 62
MAX_L1_ENTRIES = 1 << 22
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
        with disk.open("rb") as copy:
            virtual_size = check_qcow2(copy, shown_as=file)
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
        fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as err:
        reason = "it is a symbolic link" if err.errno == errno.ELOOP else err.strerror
        raise VTorqueError(f"cannot read {source}: {reason}", code=Code.IMAGE) from err
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise VTorqueError(f"{source} is not a regular file", code=Code.IMAGE)
        with os.fdopen(os.dup(fd), "rb") as stream:
            check_qcow2(stream, shown_as=source)  # what is refused anyway need not be copied first
        free = shutil.disk_usage(target.parent).free
        if info.st_size > free:
            raise _refused(source, f"of {info.st_size} bytes", f"the pool has room for {free}")
        os.lseek(fd, 0, os.SEEK_SET)
        with os.fdopen(os.dup(fd), "rb") as stream, target.open("wb") as copy:
            left = info.st_size
            while left > 0 and (block := stream.read(min(left, 1 << 20))):
                left -= copy.write(block)
    except OSError as err:
        raise VTorqueError(f"cannot copy {source}: {err.strerror}", code=Code.IMAGE) from err
    finally:
        os.close(fd)


def check_qcow2(disk: BinaryIO, *, shown_as: Path) -> int:
    """The virtual size in bytes of a qcow2 disk that stands alone. Raises VTorqueError (VT-IMAGE) for any other."""
    length = os.fstat(disk.fileno()).st_size
    header = disk.read(104)
    if len(header) < 104 or header[:4] != b"QFI\xfb":
        raise _refused(shown_as, "no qcow2 image", "convert it: qemu-img convert -O qcow2")
    (
        _, version, backing_offset, _, cluster_bits, virtual_size, encryption, l1_entries, l1_offset,
        refcount_offset, refcount_clusters,
    ) = _HEADER.unpack_from(header)  # fmt: skip
    if version not in (2, 3):
        raise _refused(shown_as, f"qcow2 of version {version}", "2 and 3 are known")
    if backing_offset:
        raise _refused(shown_as, "an overlay with a backing file", "flatten it: qemu-img convert -O qcow2")
    incompatible = _INCOMPATIBLE.unpack_from(header, _INCOMPATIBLE_OFFSET)[0] if version == 3 else 0
    if incompatible & ~(_DIRTY | _COMPRESSION_TYPE | _EXTENDED_L2):
        raise _refused(shown_as, "corrupt or keeps its data in another file", "flatten it: qemu-img convert -O qcow2")
    if not 0 < virtual_size <= MAX_VIRTUAL_BYTES:
        raise _refused(shown_as, f"of {virtual_size} bytes", f"1 to {MAX_VIRTUAL_BYTES} are allowed")
    if encryption:
        raise _refused(shown_as, "encrypted", "decrypt it: qemu-img convert -O qcow2")
    if not 9 <= cluster_bits <= 21:
        raise _refused(shown_as, f"no qcow2 image (clusters of 2^{cluster_bits} bytes)", "2^9 to 2^21 are known")
    tables = (l1_offset + 8 * l1_entries, refcount_offset + (refcount_clusters << cluster_bits))
    step = 2 if incompatible & _EXTENDED_L2 else 1
    fits = l1_entries <= MAX_L1_ENTRIES and max(tables) <= length
    if not fits or not _whole(disk, l1_offset, l1_entries, cluster_bits, step):
        raise _refused(shown_as, f"cut off after {length} bytes", "copy it again")
    return int(virtual_size)


def _whole(disk: BinaryIO, l1_offset: int, l1_entries: int, cluster_bits: int, step: int) -> bool:
    """Whether the tables and clusters that a qcow2 file refers to lie inside it (compressed ones are not looked at)."""
    length = os.fstat(disk.fileno()).st_size
    cluster = 1 << cluster_bits
    for at in {entry & _OFFSET for entry in _entries(disk, l1_offset, l1_entries)} - {0}:
        if at % cluster or at + cluster > length:
            return False
        for entry in _entries(disk, at, cluster // 8)[::step]:
            # the data of the last cluster may end with the file
            if not entry & _COMPRESSED and entry & _OFFSET >= length:
                return False
    return True


def _entries(disk: BinaryIO, offset: int, count: int) -> array.array[int]:
    disk.seek(offset)
    entries = array.array("Q", disk.read(8 * count))
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def _refused(path: Path, what: str, remedy: str) -> VTorqueError:
    return VTorqueError(f"{path} is {what}", code=Code.IMAGE, hint=remedy)
