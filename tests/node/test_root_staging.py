"""The disks of a node's guests on real file systems: what is shared, copied, verified, bounded, and gone afterwards."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Optional

import psutil
import pytest
from nodesite import Node, an_image, make_node

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image
from vmgr.node import record
from vmgr.node.staging.disks import close_disk, stage
from vmgr.node.staging.model import Disk, StageRequest
from vmgr.node.undo import undo
from vmgr.node.userio import User

pytestmark = pytest.mark.root
MIB = 1 << 20
PYTHON = sys.executable
REPOSITORY = Path(__file__).resolve().parents[2]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pool_image(folder: Path, *, mebibytes: int = 8, virtual_mib: int = 64) -> Image:
    """An image in `folder` with a disk of random data that really takes `mebibytes`."""
    folder.mkdir(exist_ok=True)
    disk = folder / "disk.raw"
    with disk.open("wb") as stream:
        for _ in range(mebibytes):
            stream.write(os.urandom(MIB))
    os.truncate(disk, virtual_mib * MIB)
    disk.chmod(0o444)
    return described(folder, disk.name, virtual_mib)


def described(folder: Path, disk: str, virtual_mib: int) -> Image:
    entry = {"sha256": sha256(folder / disk), "size": (folder / disk).stat().st_size}
    image = an_image(folder, virtual_size=virtual_mib * MIB)
    return image._replace(disk=disk, disk_format="raw", files={disk: entry})


@contextmanager
def mounted(at: Path, kind: str, *, mebibytes: int = 512) -> Iterator[Path]:
    """A file system of its own in a file beside `at`, gone afterwards."""
    backing = at.with_name(f"{at.name}.{kind}")
    with backing.open("wb") as stream:
        stream.truncate(mebibytes * MIB)
    make = ["mkfs.xfs", "-q", "-m", "reflink=1"] if kind == "xfs" else [f"mkfs.{kind}", "-q"]
    subprocess.run([*make, str(backing)], check=True)
    at.mkdir()
    subprocess.run(["mount", "-o", "loop", "-t", kind, str(backing), str(at)], check=True)
    try:
        at.chmod(0o755)
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)
        at.rmdir()
        backing.unlink()


def give(folder: Path, user: User) -> Path:
    folder.mkdir(mode=0o700)
    os.chown(folder, user.uid, user.gid)
    return folder


@pytest.fixture
def node(base: Path) -> Node:
    return make_node(base / "node", images={"overlays_max": "1G", "ramdisk_max": "1G"})


class Attempt:
    """An attempt that stages disks; it is undone at the end of the test whatever happens."""

    def __init__(self, node: Node, user: User, job_id: str = "12.host") -> None:
        self.node, self.user = node, user
        self.place = node.place(job_id)
        self.lock, self.listener = record.create(self.place, {"job_id": job_id, "user": user.name})
        self.told: list[str] = []
        self.disks: list[Disk] = []

    def request(self, image: Image, fs_type: str, workspace: Optional[Path] = None, guests: int = 1) -> StageRequest:
        return StageRequest(
            self.node.config, self.place, image, self.user, [f"n1-{n}" for n in range(1, guests + 1)], fs_type,
            256, None if workspace is None else str(workspace), self.told.append,
        )  # fmt: skip

    def stage(self, image: Image, fs_type: str, workspace: Optional[Path] = None, guests: int = 1) -> list[Disk]:
        disks = run(stage(self.request(image, fs_type, workspace, guests)))
        self.disks += disks
        return list(disks)

    def refused(self, image: Image, fs_type: str, workspace: Optional[Path] = None, guests: int = 1) -> str:
        with pytest.raises(VTorqueError) as caught:
            self.stage(image, fs_type, workspace, guests)
        assert caught.value.code is Code.STAGE and "\n" not in str(caught.value)
        return str(caught.value)

    def steps(self, kind: str) -> list[dict[str, Any]]:
        return [step for step in record.steps(self.place) if step.get("do") == kind]

    def let_go(self) -> None:
        for disk in self.disks:
            close_disk(disk)
        self.disks = []

    def end(self) -> list[str]:
        self.let_go()
        if self.lock >= 0:
            os.close(self.lock)
            self.listener.close()
            self.lock = -1
        return undo(self.place)


@pytest.fixture
def attempts(node: Node, user: User) -> Iterator[Callable[..., Attempt]]:
    made: list[Attempt] = []

    def make(job_id: str = "12.host") -> Attempt:
        made.append(Attempt(node, user, job_id))
        return made[-1]

    yield make
    for each in made:
        assert each.end() == []
    assert node.left() == []


@pytest.fixture
def attempt(attempts: Callable[..., Attempt]) -> Attempt:
    return attempts()


def content(fd: int, size: int) -> str:
    digest, at = hashlib.sha256(), 0
    while block := os.pread(fd, min(MIB, size - at), at):
        digest.update(block)
        at += len(block)
    return digest.hexdigest()


def assert_guest_sees(disk: Disk, image: Image) -> None:
    """What a guest reads through the overlay is the image; what it writes stays in the overlay."""
    entry = image.files[str(image.disk)]
    assert content(disk.backing, entry["size"]) == entry["sha256"]
    chain = (
        f"driver=qcow2,file.driver=file,file.filename=/proc/self/fd/{disk.overlay},backing.driver=raw,"
        f"backing.read-only=on,backing.file.driver=file,backing.file.filename=/proc/self/fd/{disk.backing},discard=unmap"
    )
    first = os.pread(disk.backing, 1, 0)[0]
    done = subprocess.run(
        [
            "qemu-io", "--image-opts", chain,
            "-c", f"read -P {first} 0 1",
            "-c", "write -P 77 512 512",
            "-c", "read -P 77 512 512",
            "-c", f"read -P {first} 0 1",
        ],
        pass_fds=[disk.overlay, disk.backing], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "failed" not in done.stdout, done
    assert content(disk.backing, entry["size"]) == entry["sha256"]
    info = json.loads(
        subprocess.check_output(
            ["qemu-img", "info", "--output=json", f"/proc/self/fd/{disk.overlay}"], pass_fds=[disk.overlay]
        )
    )
    assert (info["format"], info["virtual-size"]) == ("qcow2", image.virtual_size)
    assert "backing-filename" not in info, "nothing follows what a user could write there"


def assert_private(disk: Disk) -> None:
    """Whoever inherits the descriptors can write the overlay alone, and no other program inherits them."""
    flags = [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE for fd in (disk.overlay, disk.backing)]
    assert flags == [os.O_RDWR, os.O_RDONLY]
    assert not os.get_inheritable(disk.overlay) and not os.get_inheritable(disk.backing)
    with pytest.raises(OSError):
        os.pwrite(disk.backing, b"x", 0)


# overlay


def test_overlays_on_the_pool(attempt: Attempt, base: Path) -> None:
    image = pool_image(base / "pool")
    disks = attempt.stage(image, "overlay", guests=3)
    assert len(disks) == 3 and attempt.told == []
    files = sorted(attempt.node.config.images.overlays.iterdir())
    assert [step["path"] for step in attempt.steps("overlay")] == [str(path) for path in files]
    for disk, path in zip(disks, files):
        assert os.path.samestat(os.fstat(disk.backing), os.stat(image.path("disk")))
        assert os.path.samestat(os.fstat(disk.overlay), path.stat())
        info = path.stat()
        assert (info.st_uid, info.st_mode & 0o777) == (0, 0o600) and info.st_blocks * 512 < MIB
        assert_private(disk)
        assert_guest_sees(disk, image)
    numbers = [fd for disk in disks for fd in (disk.overlay, disk.backing)]
    os.lseek(numbers[1], 5, os.SEEK_SET)
    assert os.lseek(numbers[3], 0, os.SEEK_CUR) == 0, "each guest has its own position"
    assert attempt.end() == [] and attempt.node.left() == []


def test_an_overlay_takes_the_same_time_whatever_the_image_takes(attempts: Callable[..., Attempt], base: Path) -> None:
    """Nothing is read of the image: compared by what is read and written, and by time with a wide margin."""
    small, large = pool_image(base / "small", mebibytes=1), pool_image(base / "large", mebibytes=200, virtual_mib=300)
    spent: dict[str, list[tuple[float, int]]] = {"small": [], "large": []}
    for number in range(5):
        for name, image in (("small", small), ("large", large)):
            attempt = attempts(f"{name}{number}.host")
            before, start = psutil.Process().io_counters(), time.perf_counter()
            attempt.stage(image, "overlay")
            moved = psutil.Process().io_counters()
            spent[name].append((time.perf_counter() - start, moved.write_chars - before.write_chars))
            attempt.end()
    assert sorted(spent["large"])[0][0] < 3 * sorted(spent["small"])[0][0]
    assert max(written for _, written in spent["large"]) < MIB


def test_more_overlays_than_there_is_room_for(attempts: Callable[..., Attempt], base: Path) -> None:
    image = pool_image(base / "pool", mebibytes=1, virtual_mib=400)
    first, second = attempts("1.host"), attempts("2.host")
    first.stage(image, "overlay", guests=2)
    said = second.refused(image, "overlay")
    assert "1 overlays of 400 MiB do not fit: 800 of 1024 MiB" in said and "images.overlays_max" in said
    assert second.steps("overlay") == [] and len(list(first.node.config.images.overlays.iterdir())) == 2
    assert first.end() == []
    second.stage(image, "overlay", guests=2)


def test_an_image_without_a_disk_needs_none(attempt: Attempt, base: Path) -> None:
    image = an_image(base)._replace(disk=None)
    for fs_type in ("overlay", "sharedfs", "ramdisk"):
        assert run(stage(attempt.request(image, fs_type, guests=2))) == [None, None]
    assert {step["do"] for step in record.steps(attempt.place)} == {"begin", "socket"}


def test_what_cannot_be_read_or_written(attempt: Attempt, base: Path) -> None:
    image = pool_image(base / "pool", mebibytes=1)
    gone = image._replace(disk="absent.raw")
    assert "cannot read" in attempt.refused(gone, "overlay") and attempt.steps("overlay") == []
    with mounted(base / "full", "ext4", mebibytes=16):
        (base / "node" / "overlays").symlink_to(base / "full")
        with (base / "full" / "filler").open("wb", buffering=0) as stream, pytest.raises(OSError):
            while True:
                stream.write(bytes(4096))
        assert "No space left on device" in attempt.refused(image, "overlay")
        (base / "node" / "overlays").unlink()
    (base / "node" / "overlays").mkdir()


# sharedfs


def folder_of(workspace: Path, attempt: Attempt) -> Path:
    (folder,) = workspace.iterdir()
    assert folder.name.startswith(".vtorque-") and folder.name.endswith(attempt.place.attempt)
    return folder


def test_a_copy_in_the_workspace_is_the_users_and_shared_by_the_guests(
    attempt: Attempt, base: Path, user: User
) -> None:
    image, workspace = pool_image(base / "pool", mebibytes=40), give(base / "workspace", user)
    disks = attempt.stage(image, "sharedfs", workspace, guests=3)
    folder = folder_of(workspace, attempt)
    assert sorted(path.name for path in folder.iterdir()) == ["image", "n1-1.qcow2", "n1-2.qcow2", "n1-3.qcow2"]
    for path in (folder, *folder.iterdir()):
        info = path.stat()
        assert (info.st_uid, info.st_gid, info.st_mode & 0o077) == (user.uid, user.gid, 0), path
    assert sha256(folder / "image") == image.files["disk.raw"]["sha256"]
    for disk in disks:
        assert os.path.samestat(os.fstat(disk.backing), (folder / "image").stat())
        assert_private(disk)
        assert_guest_sees(disk, image)
    percents = [int(word) for text in attempt.told for word in re.findall(r"^(?:copying|checking) (\d+) %$", text)]
    assert len(percents) == len(attempt.told) and percents, attempt.told
    assert attempt.end() == [] and list(workspace.iterdir()) == []


def test_without_a_workspace_there_is_nowhere_to_copy_to(attempt: Attempt, base: Path, user: User) -> None:
    image = pool_image(base / "pool", mebibytes=1)
    assert "needs a workspace" in attempt.refused(image, "sharedfs")
    assert "No such file" in attempt.refused(image, "sharedfs", base / "absent")
    closed = base / "roots"
    closed.mkdir(mode=0o755)
    assert "Permission denied" in attempt.refused(image, "sharedfs", closed), "root's rights are not used"


def used(path: Path) -> int:
    info = os.statvfs(path)
    return (info.f_blocks - info.f_bfree) * info.f_frsize


def shared_extents(path: Path) -> bool:
    """Whether all blocks of a file are shared with another (FIEMAP, by filefrag)."""
    lines = subprocess.check_output(["filefrag", "-v", str(path)], text=True).splitlines()
    extents = [line for line in lines if re.match(r"\s*\d+:", line)]
    return bool(extents) and all("shared" in line for line in extents)


@pytest.mark.parametrize(("kind", "shares"), [("xfs", True), ("ext4", False)])
def test_blocks_are_shared_where_the_file_system_can(
    attempt: Attempt, base: Path, user: User, kind: str, shares: bool
) -> None:
    with mounted(base / "shared", kind) as at:
        image, workspace = pool_image(at / "pool", mebibytes=100, virtual_mib=120), give(at / "workspace", user)
        os.sync()
        before = used(at)
        (disk,) = attempt.stage(image, "sharedfs", workspace)
        os.sync()
        copy = folder_of(workspace, attempt) / "image"
        taken = used(at) - before
        assert shared_extents(copy) is shares
        assert taken < 5 * MIB if shares else 100 * MIB <= taken < 110 * MIB, taken
        assert any(text.startswith("copying") for text in attempt.told) is not shares
        assert any(text.startswith("checking") for text in attempt.told)
        assert_guest_sees(disk, image)
        assert attempt.end() == [] and list(workspace.iterdir()) == []


def test_holes_stay_holes(attempt: Attempt, base: Path, user: User) -> None:
    """Data at the beginning, in the middle and at the end of a gigabyte, copied between file systems and within one."""
    with mounted(base / "shared", "ext4", mebibytes=64) as at:
        (base / "pool").mkdir()
        disk = base / "pool" / "disk.raw"
        with disk.open("wb") as stream:
            for offset in (0, 500 * MIB + 12345, 1024 * MIB - 7):
                stream.seek(offset)
                stream.write(b"data!!!")
        image = described(base / "pool", disk.name, 1024)
        attempt.stage(image, "sharedfs", give(at / "workspace", user))
        copy = folder_of(at / "workspace", attempt) / "image"
        assert copy.stat().st_size == 1024 * MIB and copy.stat().st_blocks * 512 <= 16 * 4096
        assert sha256(copy) == image.files["disk.raw"]["sha256"]
        attempt.end()


def test_a_full_workspace(attempt: Attempt, base: Path, user: User) -> None:
    with mounted(base / "shared", "ext4", mebibytes=32) as at:
        image, workspace = pool_image(base / "pool", mebibytes=60), give(at / "workspace", user)
        said = attempt.refused(image, "sharedfs", workspace)
        assert "No space left on device" in said and "takes 64 MiB there on each node" in said
        assert attempt.end() == [] and list(workspace.iterdir()) == []


@pytest.mark.parametrize("fs_type", ["sharedfs", "ramdisk"])
@pytest.mark.parametrize("damage", ["digest", "bit", "cut"])
def test_a_damaged_copy_is_noticed(attempt: Attempt, base: Path, user: User, fs_type: str, damage: str) -> None:
    image, workspace = pool_image(base / "pool"), give(base / "workspace", user)
    disk = image.path("disk")
    entry = dict(image.files["disk.raw"])
    if damage == "digest":
        entry["sha256"] = "0" * 64
    elif damage == "bit":
        with disk.open("r+b") as stream:
            stream.seek(5 * MIB)
            bit = stream.read(1)[0] ^ 1
            stream.seek(5 * MIB)
            stream.write(bytes([bit]))
    else:
        os.truncate(disk, entry["size"] - 1)
    said = attempt.refused(image._replace(files={"disk.raw": entry}), fs_type, workspace)
    assert ("SHA-256" if damage != "cut" else "bytes, not") in said and str(disk) in said and "anew" in said
    assert attempt.end() == [] and list(workspace.iterdir()) == []


def test_what_is_verified_is_what_the_disk_holds(attempt: Attempt, base: Path, user: User) -> None:
    """The page cache alone would vouch for anything: while it is checked, the copy is read from the device."""
    with mounted(base / "shared", "ext4", mebibytes=128) as at:
        image, workspace = pool_image(base / "pool", mebibytes=60), give(at / "workspace", user)
        device = subprocess.check_output(["findmnt", "-no", "SOURCE", str(at)], text=True).strip()
        counters = Path(f"/sys/class/block/{Path(device).name}/stat")
        before = int(counters.read_text().split()[2])
        attempt.stage(image, "sharedfs", workspace)
        assert (int(counters.read_text().split()[2]) - before) * 512 >= 60 * MIB
        attempt.end()


@pytest.fixture
def squashed(base: Path, user: User) -> Iterator[Path]:
    """A workspace on a file system that only the user gets into, root does not: what root-squash does to root.

    A bindfs that mounts with root's rights for the real ids, which are the user's (mount.fuse(8), `user_id`).
    """
    below, at = give(base / "below", user), give(base / "squashed", user)

    def really_the_user() -> None:
        os.setresgid(user.gid, 0, 0)
        os.setresuid(user.uid, 0, 0)

    done = subprocess.run(
        ["bindfs", "--no-allow-other", f"--force-user={user.uid}", f"--force-group={user.gid}", str(below), str(at)],
        capture_output=True, text=True, cwd="/", preexec_fn=really_the_user,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"no FUSE mounts here: {done.stderr}")
    try:
        with pytest.raises(PermissionError):
            list(at.iterdir())
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def test_a_file_system_that_squashes_root(attempt: Attempt, base: Path, user: User, squashed: Path) -> None:
    image = pool_image(base / "pool")
    disks = attempt.stage(image, "sharedfs", squashed, guests=2)
    for disk in disks:
        assert content(disk.backing, 64 * MIB) == image.files["disk.raw"]["sha256"]
        assert os.pread(disk.overlay, 4, 0) == b"QFI\xfb"
    (folder,) = (base / "below").iterdir()
    assert len(list(folder.iterdir())) == 3
    assert attempt.end() == [] and list((base / "below").iterdir()) == []


def test_what_the_user_puts_in_the_way_harms_only_the_user(attempt: Attempt, base: Path, user: User) -> None:
    """The folder moved away and replaced by a link to root's: root's stays."""
    image, workspace = pool_image(base / "pool", mebibytes=1), give(base / "workspace", user)
    attempt.stage(image, "sharedfs", workspace)
    victim = base / "victim"
    victim.mkdir(mode=0o755)
    (victim / "file").write_text("root's")
    folder = folder_of(workspace, attempt)
    folder.rename(workspace / "moved")
    folder.symlink_to(victim)
    attempt.let_go()
    os.close(attempt.lock)
    attempt.listener.close()
    attempt.lock = -1
    assert undo(attempt.place) != [] and (victim / "file").read_text() == "root's"
    folder.unlink()
    assert undo(attempt.place) == []
