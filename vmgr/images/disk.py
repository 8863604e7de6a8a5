"""Disks of images: a system installed in a folder becomes a qcow2 disk that boots directly or by itself.

The disk has an MBR, a FAT partition with SYSLINUX, kernel and initial RAM disk, and an ext4 partition with the
system. It is put together from files (mtools, mke2fs -d): no loop device, no mount of it.
"""

from __future__ import annotations

import struct
import uuid
from pathlib import Path
from typing import Any, Callable

from vmgr.errors import Code, VTorqueError
from vmgr.images.initramfs import Archive
from vmgr.images.layers import apply_layers
from vmgr.images.micro import add_busybox, add_modules, kernel_file, kernel_of
from vmgr.images.recipe import Recipe
from vmgr.images.sandbox import EPOCH, run

ROOT_LABEL = "vtorque-root"
_MIB = 1 << 20
_BOOT_AT, _BOOT_MIB, _ROOT_AT = 1 * _MIB, 63, 64 * _MIB
_MBR_CODE = Path("/usr/lib/syslinux/mbr/mbr.bin")
_NAMESPACE = uuid.UUID("b5a0f5c6-9d0e-4c57-8a43-6f6c0d6e1f2a")


def finish_disk(
    recipe: Recipe, root: Path, busybox: Path, work: Path, out: Path, log: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Make the image's files in `out` from the system that is installed below `root`; `work` is for scratch.

    The recipe's files and scripts are put into it first. `busybox` is the root of an installation with BusyBox, for
    the initial RAM disk. Returns facts for the image's description.
    """
    apply_layers(recipe.layers, root, log, progress)
    progress("writing the kernel and the initial RAM disk")
    (out / "vmlinuz").write_bytes(kernel_of(root))
    archive = Archive()
    for path in ("/dev", "/proc", "/sys", "/sysroot"):
        archive.directory(path)
    add_busybox(archive, busybox)
    add_modules(archive, root, recipe.modules)
    if recipe.initrd is not None:
        archive.tree(recipe.initrd)
    (out / "initrd").write_bytes(archive.cpio())
    progress("writing the disk")
    raw = work / "disk.raw"
    _make_disk(recipe, root, out / "initrd", work, raw)
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(out / "disk.qcow2")], cwd=work)
    return {"disk": "disk.qcow2", "virtual_size": recipe.disk_mib * _MIB}


def _make_disk(recipe: Recipe, root: Path, initrd: Path, work: Path, raw: Path) -> None:
    identity = uuid.uuid5(_NAMESPACE, recipe.name)
    kernel = kernel_file(root)
    if not _MBR_CODE.exists():
        raise VTorqueError(f"{_MBR_CODE} is not there", code=Code.BUILD, hint="install syslinux-common")
    with raw.open("wb") as stream:
        stream.write(boot_record(_MBR_CODE.read_bytes(), identity.int & 0xFFFFFFFF, recipe.disk_mib))
        stream.truncate(recipe.disk_mib * _MIB)
    _make_boot_partition(recipe, kernel, initrd, work, raw, serial=identity.int >> 96)
    run(
        [
            "mke2fs",
            "-q",
            "-t", "ext4",
            "-O", "^has_journal",
            "-L", ROOT_LABEL,
            "-U", str(identity),
            "-E", f"offset={_ROOT_AT},hash_seed={identity},lazy_itable_init=0,root_owner=0:0",
            "-m", "0",
            "-i", "32768",
            "-d", str(root),
            str(raw),
            f"{recipe.disk_mib - _ROOT_AT // _MIB}M",
        ],
        cwd=work,
        environment={"E2FSPROGS_FAKE_TIME": EPOCH},
    )  # fmt: skip


def boot_record(code: bytes, disk_id: int, disk_mib: int) -> bytes:
    """The disk's first sector: boot code, and the two partitions (FAT to boot from, ext4) by sector numbers."""
    end = disk_mib * _MIB
    table = b""
    for flag, kind, start, size in (
        (0x80, 0x0C, _BOOT_AT, _BOOT_MIB * _MIB),
        (0x00, 0x83, _ROOT_AT, end - _ROOT_AT),
    ):
        no_chs = b"\xfe\xff\xff"
        table += struct.pack("<B3sB3sII", flag, no_chs, kind, no_chs, start // 512, size // 512)
    return code[:440].ljust(440, b"\0") + struct.pack("<IH", disk_id, 0) + table.ljust(64, b"\0") + b"\x55\xaa"


def _make_boot_partition(recipe: Recipe, kernel: Path, initrd: Path, work: Path, raw: Path, *, serial: int) -> None:
    """FAT with SYSLINUX, which needs the kernel in its original wrapping."""
    partition = f"{raw}@@{_BOOT_AT}"
    config = work / "syslinux.cfg"
    config.write_text(
        f"SERIAL 0 115200\nDEFAULT linux\nLABEL linux\n  KERNEL vmlinuz\n  INITRD initrd\n  APPEND {recipe.cmdline}\n"
    )
    run(
        [
            "mformat",
            "-i", partition,
            "-v", "BOOT",
            "-N", f"{serial:08x}",
            "-T", str(_BOOT_MIB * 2048),
            "-h", "16",
            "-s", "63",
            "-H", str(_BOOT_AT // 512),
            "::",
        ],
        cwd=work,
    )  # fmt: skip
    for source, name in ((kernel, "vmlinuz"), (initrd, "initrd"), (config, "syslinux.cfg")):
        run(["mcopy", "-i", partition, "-m", str(source), f"::{name}"], cwd=work)
    run(["syslinux", "--install", "--offset", str(_BOOT_AT), str(raw)], cwd=work)
