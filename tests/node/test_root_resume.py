"""What root does with the files of a suspended job: hostile overlays and states end in one line, and touch nothing."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import subprocess
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from guestsite import content, in_guest, kernel
from nodesite import Node, an_image, make_node, plain_qcow2

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image
from vmgr.node import record
from vmgr.node.incoming import SavedState
from vmgr.node.jobgroup import JobGroup
from vmgr.node.launch import Files, Guest, pin_and_run, start
from vmgr.node.qemu import GuestPlan
from vmgr.node.staging.disks import close_disk, stage
from vmgr.node.staging.model import Disk, StageRequest
from vmgr.node.staging.saved import SavedOverlay, restore_overlays
from vmgr.node.undo import undo
from vmgr.node.user import User
from vmgr.topology.model import Layout

pytestmark = pytest.mark.root
MIB = 1 << 20
SIZE = 16 * MIB


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


@pytest.fixture
def node(base: Path) -> Node:
    return make_node(base / "node")


@pytest.fixture
def image(base: Path) -> Image:
    folder = base / "image"
    folder.mkdir()
    plain_qcow2(folder / "disk.qcow2")
    disk = folder / "disk.qcow2"
    facts = {"sha256": hashlib.sha256(disk.read_bytes()).hexdigest(), "size": disk.stat().st_size}
    return an_image(folder, virtual_size=SIZE)._replace(files={disk.name: facts})


class Staged:
    """Fresh disks of an attempt, and its undoing."""

    def __init__(self, node: Node, user: User, image: Image, fs_type: str = "overlay") -> None:
        self.place = node.place()
        self._lock, self._listener = record.create(self.place, {"job_id": "12.host", "user": user.name})
        self.request = StageRequest(
            node.config, self.place, image, user, ["vn1-1"], fs_type, 256, None, lambda _text: None
        )  # fmt: skip
        self.disk: Disk = run(self._stage())
        self._ended = False

    async def _stage(self) -> Disk:
        (disk,) = await stage(self.request)
        assert disk is not None
        return disk

    def restore(self, file: Path, size: int) -> None:
        fd = os.open(file, os.O_RDONLY)
        try:
            run(restore_overlays(self.request, [self.disk.overlay], [SavedOverlay(fd, size, "the stored disk")]))
        finally:
            os.close(fd)

    def end(self) -> None:
        """Give everything back; a second time there is nothing."""
        if self._ended:
            return
        self._ended = True
        close_disk(self.disk)
        os.close(self._lock)
        self._listener.close()
        assert undo(self.place) == []


@pytest.fixture
def staged(node: Node, user: User, image: Image) -> Iterator[Callable[..., Staged]]:
    made: list[Staged] = []

    def make(fs_type: str = "overlay") -> Staged:
        made.append(Staged(node, user, image, fs_type))
        return made[-1]

    yield make
    for each in made:
        each.end()
    assert node.left() == []


def stored(base: Path, user: User, data: bytes) -> Path:
    """A file of the user's own with this content."""
    file = base / "0.qcow2"
    file.write_bytes(data)
    os.chown(file, user.uid, user.gid)
    file.chmod(0o600)
    return file


@pytest.mark.parametrize("fs_type", ["overlay", "ramdisk"])
def test_an_overlay_is_what_it_was(fs_type: str, staged: Callable[..., Staged], base: Path, user: User) -> None:
    before = staged()
    in_guest(before.disk, "write -P 7 65536 262144", "write -P 8 12M 1M", "discard 65536 65536")
    seen = content(before.disk)
    data = os.pread(before.disk.overlay, 64 * MIB, 0)
    before.end()
    after = staged(fs_type)
    assert content(after.disk) != seen
    after.restore(stored(base, user, data), len(data))
    assert content(after.disk) == seen
    in_guest(after.disk, "write -P 9 0 512", "read -P 8 12M 1M")


def test_holes_take_no_room(staged: Callable[..., Staged], base: Path, user: User) -> None:
    file = stored(base, user, b"")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(file), str(SIZE)], check=True)
    os.truncate(file, 8 * MIB)
    after = staged()
    after.restore(file, 8 * MIB)
    assert os.fstat(after.disk.overlay).st_blocks * 512 < MIB


HOSTILE: dict[str, tuple[list[str], str]] = {
    "a backing file": (["-F", "raw", "-b", "/etc/shadow", "-u"], "an overlay with a backing file"),
    "an external data file": (["-o", "data_file=/tmp/vt-none.raw,data_file_raw=on"], "keeps its data in another file"),
    "a larger disk": ([], f"a disk of {2 * SIZE} bytes"),
    "a smaller disk": ([], f"is a disk of {SIZE // 2} bytes, not of {SIZE}"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_overlay_that_is_not_this_disks_is_refused(
    kind: str, staged: Callable[..., Staged], base: Path, user: User
) -> None:
    options, said = HOSTILE[kind]
    size = {"a larger disk": 2 * SIZE, "a smaller disk": SIZE // 2}.get(kind, SIZE)
    made = base / "made.qcow2"
    try:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(made), str(size)], check=True)
    finally:
        Path("/tmp/vt-none.raw").unlink(missing_ok=True)
    data = made.read_bytes()
    assert said in refusal(staged(), stored(base, user, data), len(data))


def test_files_that_are_no_overlay_are_refused(staged: Callable[..., Staged], base: Path, user: User) -> None:
    plain = plain_qcow2(base / "whole.qcow2").read_bytes()
    after = staged()
    for data, said in (
        (b"", "no qcow2 image"),
        (os.urandom(1 << 16), "no qcow2 image"),
        (plain[: len(plain) // 2], "cut off after"),
        (plain[:100], "no qcow2 image"),
    ):
        assert said in refusal(after, stored(base, user, data), len(data))
    after.restore(stored(base, user, plain), len(plain))


def refusal(after: Staged, file: Path, size: int) -> str:
    started = time.monotonic()
    with pytest.raises(VTorqueError) as caught:
        after.restore(file, size)
    assert caught.value.code is Code.STAGE and "\n" not in str(caught.value)
    assert time.monotonic() - started < 20
    return str(caught.value)


class Waiting:
    """A real QEMU that waits for a state."""

    def __init__(self, base: Path, user: User) -> None:
        seed = base / "seed"
        seed.write_bytes(bytes(1 << 16))
        seed.chmod(0o644)
        plan = GuestPlan(
            name="12.host-vn1-1", layout=Layout.flat(1, 128), accelerator="tcg", kernel=kernel(), initrd=seed,
            cmdline="", disk_format="qcow2", mac="02:56:00:00:00:01", mounts=(), suspendable=True, incoming=True,
        )  # fmt: skip
        fd = os.open(seed, os.O_RDONLY)
        self.guest: Guest
        self.qmp: socket.socket
        self.guest, self.qmp = start(
            "qemu-system-x86_64", plan, Files(seed=fd), user, kvm_gid=None, group=JobGroup(),
            started=lambda _pid: None,
        )  # fmt: skip
        os.close(fd)

    async def read(self, fd: int, limit_s: float, version: str = "7.2.0") -> str:
        """How the reading of a state fails, within a time."""
        state = SavedState(fd, version, limit_s / 2, lambda: asyncio.sleep(0))
        started = time.monotonic()
        try:
            with pytest.raises(VTorqueError) as caught:
                await pin_and_run(self.guest, self.qmp, None, timeout_s=limit_s / 2, state=state)
            assert caught.value.code is Code.LAUNCH and time.monotonic() - started < 40
            return caught.value.message
        finally:
            await self.end()

    async def end(self) -> None:
        await self.guest.kill()
        self.guest.port.close()
        await self.guest.close()


def running_version() -> str:
    shown = subprocess.check_output(["qemu-system-x86_64", "--version"], text=True)
    return shown.partition("version ")[2].split()[0]


def test_a_state_that_never_comes_is_waited_for_no_longer_than_that(base: Path, user: User) -> None:
    """Whatever QEMU, or the file system below the store, does: it is given up."""

    async def work() -> None:
        read_end, write_end = os.pipe()
        waiting = Waiting(base, user)
        try:
            said = await waiting.read(read_end, 4, running_version())
            assert said == "QEMU did not read the guest's saved state within 4 s"
        finally:
            os.close(read_end)
            os.close(write_end)

    run(work())


def test_a_qemu_that_ends_while_it_reads_is_noticed(base: Path, user: User) -> None:
    async def work() -> None:
        read_end, write_end = os.pipe()
        waiting = Waiting(base, user)
        reading = asyncio.ensure_future(waiting.read(read_end, 30, running_version()))
        await asyncio.get_running_loop().run_in_executor(None, lambda: os.write(write_end, bytes(1 << 16)))
        await asyncio.sleep(0)
        waiting.guest.child.kill()
        said = await reading
        assert said.startswith("QEMU did not go on from the guest's saved state: "), said
        os.close(read_end)
        os.close(write_end)

    run(work())


def test_a_job_that_is_over_meanwhile_waits_for_nothing(base: Path, user: User) -> None:
    async def work() -> None:
        read_end, write_end = os.pipe()
        waiting = Waiting(base, user)
        before = asyncio.all_tasks()
        state = SavedState(read_end, running_version(), 600, lambda: asyncio.sleep(0))
        reading = asyncio.ensure_future(pin_and_run(waiting.guest, waiting.qmp, None, timeout_s=20, state=state))
        await asyncio.wait([reading], timeout=1)
        assert not reading.done()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await waiting.end()
        assert asyncio.all_tasks() == before
        os.close(read_end)
        os.close(write_end)

    run(work())


def test_another_qemus_state_is_not_tried(base: Path, user: User) -> None:
    async def work() -> None:
        waiting = Waiting(base, user)
        said = await waiting.read(-1, 30, "2.5.0")
        assert said.startswith("the guests were suspended by QEMU 2.5.0, and this node has ")

    run(work())
