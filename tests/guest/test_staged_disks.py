"""Disks as the node's agent makes them ready, under the root of a real guest."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from guestmachine import BOOT_TIMEOUT_S

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))

from nodesite import make_node

from vmgr.images.pool import Pool
from vmgr.node import record
from vmgr.node.staging.disks import boot_files, close_disk, stage
from vmgr.node.staging.model import StageRequest
from vmgr.node.undo import undo
from vmgr.node.user import User

pytestmark = [pytest.mark.guest, pytest.mark.root]
POOL = Path("/var/lib/vtorque/images")


@pytest.fixture
def base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.slow  # tests/e2e/test_disks.py has the same kinds in seconds, with a disk that nothing boots from
@pytest.mark.parametrize("fs_type", ["overlay", "sharedfs", "ramdisk"])
def test_a_guest_boots_from_it(base: Path, fs_type: str) -> None:
    """Debian as far as its login prompt, QEMU as the user; with the cache where the image itself is used."""
    if os.geteuid() != 0 or not Pool(POOL).revisions("debian-12"):
        pytest.skip("needs root and the image debian-12")
    image, user = Pool(POOL).get("debian-12"), User("carol", 48211, 48212, "chem", "/nonexistent", "/bin/sh", ())
    cache = {"cache": {"folder": str(base / "cache")}} if fs_type == "overlay" else {}
    node = make_node(base / "node", images=cache)
    workspace = base / "workspace"
    workspace.mkdir(mode=0o700)
    os.chown(workspace, user.uid, user.gid)
    place = node.place()
    lock, listener = record.create(place, {"job_id": "12.host"})
    request = StageRequest(node.config, place, image, user, ["n1-1"], fs_type, 1024, str(workspace), lambda text: None)
    try:
        (disk,) = asyncio.run(stage(request))
        files = asyncio.run(boot_files(request))
        assert disk is not None
        before = os.fstat(disk.overlay).st_blocks
        seen = boot(node.config.hypervisor.qemu, disk.overlay, disk.backing, image.cmdline, *files, user)
        assert b"login:" in seen, seen[-2000:]
        assert os.fstat(disk.overlay).st_blocks > before, "what the guest writes is in its overlay"
        close_disk(disk)
    finally:
        os.close(lock)
        listener.close()
        assert undo(place) == []
    assert list(workspace.iterdir()) == [] and node.left() == []


def boot(qemu: str, overlay: int, backing: int, cmdline: str, kernel: Path, initrd: Path, user: User) -> bytes:
    """The guest's console up to its login prompt, or its end."""
    command = [
        qemu, "-nodefaults", "-display", "none", "-machine", "q35",
        "-accel", "tcg,thread=multi", "-cpu", "max,la57=off",
        "-m", "1024M", "-smp", "2", "-no-reboot", "-serial", "stdio",
        "-kernel", str(kernel), "-initrd", str(initrd), "-append", f"{cmdline} cloud-init=disabled",
        "-add-fd", f"set=2,fd={overlay}",
        "-add-fd", f"set=3,fd={backing}",
        "-blockdev", "driver=file,node-name=backing-file,filename=/dev/fdset/3,read-only=on",
        "-blockdev", "driver=qcow2,node-name=backing,file=backing-file,read-only=on",
        "-blockdev", "driver=file,node-name=overlay-file,filename=/dev/fdset/2",
        "-blockdev", "driver=qcow2,node-name=overlay,file=overlay-file,backing=backing,discard=unmap",
        "-device", "virtio-blk-pci,drive=overlay",
    ]  # fmt: skip
    guest = subprocess.Popen(
        ["timeout", str(BOOT_TIMEOUT_S), *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, pass_fds=[overlay, backing], cwd="/",
        user=user.uid, group=user.gid, extra_groups=[],
    )  # fmt: skip
    assert guest.stdin is not None and guest.stdout is not None
    seen = b""
    while b"login:" not in seen and (data := os.read(guest.stdout.fileno(), 65536)):
        seen += data
    guest.terminate()
    guest.wait()
    guest.stdin.close()
    guest.stdout.close()
    return seen
