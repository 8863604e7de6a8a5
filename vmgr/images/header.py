"""What the header of a disk says of it. The file may be anybody's: nothing that it names is followed, or believed.

The formats are described in QEMU's docs/interop/qcow2.txt, VMware's Virtual Disk Format 5.0, and QEMU's block/vdi.c.
"""

from __future__ import annotations

import array
import os
import re
import struct
import sys
from typing import BinaryIO, NamedTuple, Optional

from vmgr.errors import Code, VTorqueError

SECTOR = 512
FORMATS = ("qcow2", "raw")
"""What QEMU gets as a guest's disk."""
FOREIGN = ("vmdk", "vdi", "vhdx")
"""What can be converted to qcow2."""

_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
"""The start of a qcow2 file: magic, version, backing file offset and length, cluster bits, virtual size, encryption,
entries and offset of the L1 table, offset and clusters of the refcount table, number and offset of snapshots."""
_MORE = struct.Struct(">QQQII")
"""Version 3 goes on at 72: incompatible, compatible and autoclear features, order of refcounts, the header's length."""
_MORE_AT = 72
_HEADER_BYTES = 104
_DIRTY, _COMPRESSION_TYPE, _EXTENDED_L2 = 1 << 0, 1 << 3, 1 << 4
_OFFSET, _COMPRESSED = 0x00FF_FFFF_FFFF_FE00, 1 << 62
MAX_L1_ENTRIES = 1 << 22
MAX_REFCOUNT_TABLE = 8 << 20
_MAX_DESCRIPTOR = 1 << 16
_LOOKED_THROUGH = 64 << 20
"""Bytes of tables up to which each entry is looked at here; `qemu-img check` looks at all."""
_FLATTEN = "flatten it: qemu-img convert -O qcow2"


class Header(NamedTuple):
    """A disk's format, and its virtual size in bytes where the header tells it without further reading."""

    format: str
    virtual_size: Optional[int]


def read_header(disk: BinaryIO, *, shown_as: str, said: Optional[str], bound: int) -> Header:
    """What the header of `disk` says, which must stand alone.

    `said` is the format that its owner says it has; without that one with no known header is refused, because a raw
    disk has none. `bound` is the largest virtual size in bytes. Raises VTorqueError (VT-IMAGE).
    """
    start = disk.read(SECTOR)
    found = _format_of(start)
    if found is None and said is None:
        raise refused(shown_as, "of no known format", "a raw disk has no header: say --format raw")
    if said is not None and said != (found or "raw"):
        raise refused(shown_as, f"of format {found or 'raw'} by its header, not {said}", "say nothing, or what it is")
    if found is None:
        return Header("raw", _raw_size(disk, shown_as, bound))
    if found == "qcow2":
        disk.seek(0)
        return Header("qcow2", check_qcow2(disk, shown_as=shown_as, bound=bound))
    if found == "vmdk":
        _check_vmdk(disk, start, shown_as)
    return Header(found, None)


def refused(path: str, what: str, remedy: str) -> VTorqueError:
    return VTorqueError(f"{path} is {what}", code=Code.IMAGE, hint=remedy)


def check_size(size: int, shown_as: str, bound: int) -> None:
    """Refuse a virtual size outside of the site's bound."""
    if not 0 < size <= bound:
        raise refused(shown_as, f"a disk of {size} bytes", f"1 to {bound} are allowed (images.max_virtual_size)")


def _format_of(start: bytes) -> Optional[str]:
    """The format that the first sector of a file shows."""
    if start[:4] == b"QFI\xfb":
        return "qcow2"
    if start[:4] in (b"KDMV", b"COWD") or start.startswith(b"# Disk DescriptorFile"):
        return "vmdk"
    if start[0x40:0x44] == b"\x7f\x10\xda\xbe":
        return "vdi"
    if start[:8] == b"vhdxfile":
        return "vhdx"
    return None


def _raw_size(disk: BinaryIO, shown_as: str, bound: int) -> int:
    size = os.fstat(disk.fileno()).st_size
    if size % SECTOR:
        raise refused(shown_as, f"no disk: {size} bytes are no multiple of {SECTOR}", "was it copied whole?")
    check_size(size, shown_as, bound)
    return size


def _check_vmdk(disk: BinaryIO, start: bytes, shown_as: str) -> None:
    """Refuse a VMDK whose data, or part of it, lies in other files."""
    capacity, _, at, sectors = struct.unpack_from("<QQQQ", start.ljust(SECTOR, b"\0"), 12)
    if start[:4] != b"KDMV" or not capacity:
        raise refused(shown_as, "a VMDK that keeps its data in other files", "make it one file: qemu-img convert")
    descriptor = b""
    if 0 < at * SECTOR < os.fstat(disk.fileno()).st_size:
        disk.seek(at * SECTOR)
        descriptor = disk.read(min(sectors * SECTOR, _MAX_DESCRIPTOR))
    parent = re.search(rb"parentCID\s*=\s*([0-9a-fA-F]+)", descriptor)
    if b"parentFileNameHint" in descriptor or (parent and int(parent[1], 16) != 0xFFFFFFFF):
        raise refused(shown_as, "a VMDK on top of another", _FLATTEN)


def check_qcow2(disk: BinaryIO, *, shown_as: str, bound: int) -> int:
    """The virtual size in bytes of a qcow2 disk that stands alone. Raises VTorqueError (VT-IMAGE) for any other."""
    length = os.fstat(disk.fileno()).st_size
    header = disk.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or header[:4] != b"QFI\xfb":
        raise refused(shown_as, "no qcow2 image", "convert it: qemu-img convert -O qcow2")
    (
        _, version, backing_offset, _, cluster_bits, virtual_size, encryption, l1_entries, l1_offset,
        refcount_offset, refcount_clusters, snapshots, _,
    ) = _HEADER.unpack_from(header)  # fmt: skip
    if version not in (2, 3):
        raise refused(shown_as, f"qcow2 of version {version}", "2 and 3 are known")
    if backing_offset:
        raise refused(shown_as, "an overlay with a backing file", _FLATTEN)
    incompatible, _, _, order, header_length = (
        _MORE.unpack_from(header, _MORE_AT) if version == 3 else (0, 0, 0, 4, 104)
    )
    if incompatible & ~(_DIRTY | _COMPRESSION_TYPE | _EXTENDED_L2):
        raise refused(shown_as, "corrupt or keeps its data in another file", _FLATTEN)
    check_size(virtual_size, shown_as, bound)
    if encryption:
        raise refused(shown_as, "encrypted", "decrypt it: qemu-img convert -O qcow2")
    if not 9 <= cluster_bits <= 21 or order > 6 or not _HEADER_BYTES <= header_length <= 1 << cluster_bits:
        raise refused(
            shown_as,
            f"no qcow2 image (clusters of 2^{cluster_bits} bytes, refcounts of 2^{order} bits, "
            f"a header of {header_length} bytes)",
            "2^9 to 2^21, 2^0 to 2^6, and a header within the first cluster are known",
        )
    if snapshots:
        raise refused(shown_as, f"a disk with {snapshots} snapshot{'' if snapshots == 1 else 's'} inside", _FLATTEN)
    refcounts = refcount_clusters << cluster_bits
    if l1_entries > MAX_L1_ENTRIES or refcounts > MAX_REFCOUNT_TABLE:
        raise refused(shown_as, f"no disk: its tables have {l1_entries} entries and {refcounts} bytes", _FLATTEN)
    tables = (l1_offset + 8 * l1_entries, refcount_offset + refcounts)
    step = 2 if incompatible & _EXTENDED_L2 else 1
    if max(tables) > length or not _whole(disk, l1_offset, l1_entries, cluster_bits, step):
        raise refused(shown_as, f"cut off after {length} bytes", "copy it again")
    return int(virtual_size)


def _whole(disk: BinaryIO, l1_offset: int, l1_entries: int, cluster_bits: int, step: int) -> bool:
    """Whether the tables and clusters that a qcow2 file refers to lie inside it (compressed ones are not looked at)."""
    length = os.fstat(disk.fileno()).st_size
    cluster = 1 << cluster_bits
    tables = {entry & _OFFSET for entry in _entries(disk, l1_offset, l1_entries)} - {0}
    if len(tables) * cluster > _LOOKED_THROUGH:
        return max(tables) + cluster <= length
    for at in tables:
        if at % cluster or at + cluster > length:
            return False
        for entry in _entries(disk, at, cluster // 8)[::step]:
            # the data of the last cluster may end with the file
            if not entry & _COMPRESSED and entry & _OFFSET >= length:
                return False
    return True


def _entries(disk: BinaryIO, offset: int, count: int) -> array.array[int]:
    disk.seek(offset)
    data = disk.read(8 * count)
    entries = array.array("Q", data[: len(data) - len(data) % 8])
    if sys.byteorder == "little":
        entries.byteswap()
    return entries
