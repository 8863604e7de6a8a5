"""fs_type=ramdisk: a copy of the image and the overlays on it in memory, in a tmpfs of the attempt's own.

The tmpfs is mounted nowhere (fsopen(2), fsmount(2)): nobody can reach it by a path, and it goes with the last
descriptor of a file in it, which QEMU has. So there is nothing to undo, whatever dies first.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from vmgr.errors import Code, VTorqueError
from vmgr.node import record
from vmgr.node.staging.chain import names_of
from vmgr.node.staging.child import Channel, in_child
from vmgr.node.staging.copying import copy_image, original
from vmgr.node.staging.model import Disk, Source, StageRequest, disk_of
from vmgr.node.staging.overlay import CREATE, MIB, reserved, write_overlay

_libc = ctypes.CDLL(None, use_errno=True)
# system calls of Linux 5.2, the same numbers on every machine; constants of <linux/mount.h>
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC = 1
_SET_STRING, _CREATE = 1, 6
_NOSUID, _NODEV, _NOEXEC = 0x2, 0x4, 0x8
_TABLES = 4096
"""A qcow2 file takes for its tables 8 bytes of each cluster's 64 KiB, and 2 for its references: less than this part."""


async def stage_ramdisk(request: StageRequest, sources: Sequence[Source], empty: bytes) -> list[Disk]:
    """The disks, their files in memory. Raises VTorqueError (VT-STAGE)."""
    copied = sum(original(source.image, "disk").size for source in sources)
    size = ramdisk_bytes(copied, request.image.virtual_size, len(request.names))
    _reserve(request, size)
    fds: list[int] = []
    mount = _tmpfs(size)
    copies = names_of([source.image for source in sources])
    try:
        for source, name in zip(sources, copies):
            await _copy(request, source, mount, name)
        for guest in request.names:
            fds.append(write_overlay(f"{guest}.qcow2", empty, folder=mount))
            for name in copies:
                fds.append(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=mount))
    except BaseException as err:
        for fd in fds:
            os.close(fd)
        if isinstance(err, OSError):
            raise VTorqueError(f"cannot write to the ramdisk: {err.strerror}", code=Code.STAGE) from err
        raise
    finally:
        os.close(mount)
    each = 1 + len(sources)
    return [disk_of(fds[at : at + each], sources) for at in range(0, len(fds), each)]


async def _copy(request: StageRequest, source: Source, mount: int, name: str) -> None:
    """One disk of the chain into the ramdisk, by a child."""
    copy = os.open(name, CREATE, 0o600, dir_fd=mount)
    try:

        def fill(channel: Channel) -> None:
            copy_image(source.fd, copy, original(source.image, "disk"), channel.tell)

        silence_s = request.config.timeouts.boot
        await in_child(request.place, None, fill, keep=[source.fd, copy], tell=request.tell, silence_s=silence_s)
    finally:
        os.close(copy)


def ramdisk_bytes(copy: int, virtual_size: int, guests: int) -> int:
    """What a ramdisk may take at most: the copy, and for each guest an overlay that is written full."""
    return copy + guests * (virtual_size + virtual_size // _TABLES + MIB) + MIB


def available_bytes(meminfo: str) -> int:
    """The memory that can be had without swapping, from the text of /proc/meminfo (proc(5)); 0 when it is not told."""
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _reserve(request: StageRequest, size: int) -> None:
    """Write the ramdisk's size to the record, if it may be had: by the site's bound, and of the node's memory.

    The guests' own RAM is left for them. Counting and writing happen under the node's lock.
    """
    config = request.config
    with record.node_lock(config.paths, "ramdisks"):
        taken, bound = reserved(config, "ramdisk"), config.images.ramdisk_max * MIB
        overlays = f"{len(request.names)} overlays of {_mib(request.image.virtual_size)}"
        needed = f"a ramdisk of {_mib(size)} (the image, {overlays})"
        if taken + size > bound:
            raise VTorqueError(
                f"{needed} does not fit: {_mib(taken)} of {_mib(bound)} are given away",
                code=Code.STAGE,
                hint=f"ask for fs_type=overlay; images.ramdisk_max, {config.origin('images.ramdisk_max')}",
            )
        available, ram = available_bytes(Path("/proc/meminfo").read_text()), request.ram_mib * MIB
        if size + ram > available:
            raise VTorqueError(
                f"{needed} does not fit: {_mib(available)} of memory are available on the node, "
                f"of which the guests get {_mib(ram)}",
                code=Code.STAGE,
                hint="ask for fs_type=overlay, or for less RAM",
            )
        record.append(request.place, {"do": "ramdisk", "reserved": size})


def _mib(size: int) -> str:
    return f"{-(-size // MIB)} MiB"


def _tmpfs(size: int) -> int:
    """A tmpfs of this many bytes that is mounted nowhere: the descriptor of its folder (0700)."""
    context = -1
    try:
        context = _call("fsopen", _FSOPEN, b"tmpfs", _CLOEXEC)
        for key, value in ((b"size", b"%d" % size), (b"mode", b"0700")):
            _call("fsconfig", _FSCONFIG, context, _SET_STRING, key, value, 0)
        _call("fsconfig", _FSCONFIG, context, _CREATE, None, None, 0)
        return _call("fsmount", _FSMOUNT, context, _CLOEXEC, _NOSUID | _NODEV | _NOEXEC)
    except OSError as err:
        hint = "vTorque needs Linux 5.2" if err.errno == errno.ENOSYS else None
        raise VTorqueError(f"no ramdisk can be made: {err}", code=Code.STAGE, hint=hint) from err
    finally:
        if context >= 0:
            os.close(context)


def _call(name: str, number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
