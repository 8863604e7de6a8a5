"""The disks of a node's guests on real file systems: what is shared, copied, verified, bounded, and gone afterwards."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Optional

import psutil
import pytest
from nodesite import Node, an_image, make_node
from settled import children, run

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image
from vmgr.node import record
from vmgr.node.staging import child, ramdisk
from vmgr.node.staging.disks import boot_files, close_disk, stage
from vmgr.node.staging.model import Disk, StageRequest
from vmgr.node.undo import undo
from vmgr.node.user import User

pytestmark = pytest.mark.root
MIB = 1 << 20
PYTHON = sys.executable
REPOSITORY = Path(__file__).resolve().parents[2]


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
        subprocess.run(["umount", "-l", str(at)], check=True)  # a test that fails may have files open in it
        at.rmdir()
        backing.unlink()


def give(folder: Path, user: User) -> Path:
    folder.mkdir(mode=0o700)
    os.chown(folder, user.uid, user.gid)
    return folder


@pytest.fixture
def node(base: Path) -> Node:
    return make_node(base / "node", images={"overlays_max": "1G", "ramdisk_max": "1G"}, timeouts={"boot": 5})


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

    def release(self) -> None:
        """Be as dead as an agent that was killed."""
        self.let_go()
        if self.lock >= 0:
            os.close(self.lock)
            self.listener.close()
            self.lock = -1

    def end(self) -> list[str]:
        self.release()
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
    """Data at the beginning, in the middle and at the end of 256 MiB."""
    with mounted(base / "shared", "ext4", mebibytes=64) as at:
        (base / "pool").mkdir()
        disk = base / "pool" / "disk.raw"
        with disk.open("wb") as stream:
            for offset in (0, 100 * MIB + 12345, 256 * MIB - 7):
                stream.seek(offset)
                stream.write(b"data!!!")
        image = described(base / "pool", disk.name, 256)
        attempt.stage(image, "sharedfs", give(at / "workspace", user))
        copy = folder_of(at / "workspace", attempt) / "image"
        assert copy.stat().st_size == 256 * MIB and copy.stat().st_blocks * 512 <= 16 * 4096
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


@contextmanager
def squashing_mount(base: Path, user: User) -> Iterator[subprocess.Popen[bytes]]:
    """`base/squashed`, which only the user gets into and root does not, over `base/below`: what root-squash does.

    A bindfs that mounts with root's rights for the real ids, which are the user's (mount.fuse(8), `user_id`).
    """
    below, at = give(base / "below", user), give(base / "squashed", user)

    def really_the_user() -> None:
        os.setresgid(user.gid, 0, 0)
        os.setresuid(user.uid, 0, 0)

    ids = [f"--force-user={user.uid}", f"--force-group={user.gid}"]
    server = subprocess.Popen(
        ["bindfs", "-f", "--no-allow-other", *ids, str(below), str(at)], cwd="/", preexec_fn=really_the_user
    )
    try:
        deadline = time.monotonic() + 10
        while str(at) not in Path("/proc/mounts").read_text():
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.skip("no FUSE mounts here")
            time.sleep(0.01)
        with pytest.raises(PermissionError):
            list(at.iterdir())
        yield server
    finally:
        subprocess.run(["umount", "-l", str(at)], check=False)
        server.kill()
        server.wait()


def test_a_file_system_that_squashes_root(attempt: Attempt, base: Path, user: User) -> None:
    image = pool_image(base / "pool")
    with squashing_mount(base, user):
        disks = attempt.stage(image, "sharedfs", base / "squashed", guests=2)
        for disk in disks:
            assert content(disk.backing, 64 * MIB) == image.files["disk.raw"]["sha256"]
            assert os.pread(disk.overlay, 4, 0) == b"QFI\xfb"
        (folder,) = (base / "below").iterdir()
        assert len(list(folder.iterdir())) == 3
        assert attempt.end() == [] and list((base / "below").iterdir()) == []


def test_a_file_system_that_hangs(attempts: Callable[..., Attempt], base: Path, user: User) -> None:
    """Staging gives up, undoing too, in time; when the file system answers again everything goes."""
    image = pool_image(base / "pool", mebibytes=1)
    with squashing_mount(base, user) as server:
        staged, late = attempts("1.host"), attempts("2.host")
        staged.stage(image, "sharedfs", base / "squashed")
        staged.let_go()
        server.send_signal(signal.SIGSTOP)
        try:
            start = time.monotonic()
            assert "nothing has moved for 5 s" in late.refused(image, "sharedfs", base / "squashed")
            assert time.monotonic() - start < 7
            for each in (staged, late):
                each.release()
                start = time.monotonic()
                (failure,) = undo(each.place, patience_s=0.5)
                assert failure.startswith("shared: ") and failure.endswith("not done after 0.50 s")
                assert time.monotonic() - start < 1.5 and each.place.record.exists()
        finally:
            server.send_signal(signal.SIGCONT)
        assert staged.end() == late.end() == [] and list((base / "below").iterdir()) == []


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
    attempt.release()
    assert undo(attempt.place) == [] and (victim / "file").read_text() == "root's"
    assert not folder.is_symlink() and (workspace / "moved").exists(), "what they have moved is theirs"


# ramdisk


def unseen() -> set[int]:
    """The file systems that this process and its children have files of, and that are mounted nowhere.

    Nobody else can have one: who copies into it is a child.
    """
    mounted = {line.split()[2] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    found = set()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        for fd in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # it is closed meanwhile
                found.add(fd.stat().st_dev)
    return {device for device in found if f"{os.major(device)}:{os.minor(device)}" not in mounted}


def filled(fd: int) -> int:
    """The bytes that the file system of an open file takes."""
    told = os.fstatvfs(fd)
    return (told.f_blocks - told.f_bfree) * told.f_frsize


def test_a_ramdisk_is_in_memory_and_nowhere_else(attempt: Attempt, base: Path) -> None:
    image = pool_image(base / "pool", mebibytes=100, virtual_mib=120)
    mounts, before = Path("/proc/self/mountinfo").read_text(), unseen()
    disks = attempt.stage(image, "ramdisk", guests=2)
    assert Path("/proc/self/mountinfo").read_text() == mounts, "nobody gets at it by a path"
    assert 95 * MIB < filled(disks[0].backing) < 130 * MIB, "one copy for both, holes left out"
    assert unseen() - before == {os.fstat(disks[0].backing).st_dev}
    flags = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
    for disk in disks:
        assert os.path.sameopenfile(disk.backing, disks[0].backing)
        assert os.fstatvfs(disk.overlay).f_flag & flags == flags
        for fd in (disk.overlay, disk.backing):
            assert (os.fstat(fd).st_uid, os.fstat(fd).st_mode & 0o777) == (0, 0o600)
        assert_private(disk)
        assert_guest_sees(disk, image)
    assert any(text.startswith("copying") for text in attempt.told)
    attempt.let_go()
    assert unseen() <= before, "it goes with its last descriptor"
    assert attempt.end() == [] and attempt.node.left() == []


def test_a_ramdisk_does_not_grow_beyond_what_was_reserved(attempt: Attempt, base: Path) -> None:
    image = pool_image(base / "pool", mebibytes=4, virtual_mib=8)
    disk, _ = attempt.stage(image, "ramdisk", guests=2)
    (step,) = attempt.steps("ramdisk")
    assert step["reserved"] == ramdisk.ramdisk_bytes(8 * MIB, 8 * MIB, 2)
    written = 0
    with pytest.raises(OSError, match="No space left"):
        while written < 64 * MIB:
            written += os.pwrite(disk.overlay, bytes(MIB), written)
    assert 2 * 8 * MIB <= written < step["reserved"], "two guests' disks, written full"


def test_ramdisks_that_do_not_fit_are_refused(attempts: Callable[..., Attempt], base: Path) -> None:
    image = pool_image(base / "pool", mebibytes=1, virtual_mib=200)
    first, second = attempts("1.host"), attempts("2.host")
    first.stage(image, "ramdisk", guests=2)
    said = second.refused(image, "ramdisk", guests=2)
    assert re.search(r"a ramdisk of 604 MiB \(the image, 2 overlays of 200 MiB\) does not fit: 604 MiB of", said), said
    assert "images.ramdisk_max" in said and second.steps("ramdisk") == []
    first.end()
    request = second.request(image, "ramdisk")._replace(ram_mib=10**9)
    with pytest.raises(VTorqueError, match="of memory are available on the node, of which the guests get") as caught:
        run(stage(request))
    assert caught.value.code is Code.STAGE and second.steps("ramdisk") == []
    second.stage(image, "ramdisk", guests=2)


# QEMU, as the user


@pytest.mark.parametrize("fs_type", ["overlay", "sharedfs", "ramdisk"])
def test_qemu_takes_the_disks_as_the_user(attempt: Attempt, base: Path, user: User, fs_type: str) -> None:
    image = pool_image(base / "pool", mebibytes=2)
    disks = attempt.stage(image, fs_type, give(base / "workspace", user), guests=2)
    running = []
    for disk in disks:
        command = [
            "qemu-system-x86_64", "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none",
            "-monitor", "stdio",
            "-add-fd", f"set=2,fd={disk.overlay}",
            "-add-fd", f"set=3,fd={disk.backing}",
            "-blockdev", "driver=file,node-name=backing-file,filename=/dev/fdset/3,read-only=on",
            "-blockdev", f"driver={disk.backing_format},node-name=backing,file=backing-file,read-only=on",
            "-blockdev", "driver=file,node-name=overlay-file,filename=/dev/fdset/2",
            "-blockdev", "driver=qcow2,node-name=overlay,file=overlay-file,backing=backing,discard=unmap",
        ]  # fmt: skip
        running.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/",
                user=user.uid, group=user.gid, extra_groups=[], pass_fds=[disk.overlay, disk.backing],
            )
        )  # fmt: skip
    attempt.let_go()
    first = image.path("disk").read_bytes()[0]
    for qemu in running:  # both at once: neither locks the other out
        assert qemu.stdin is not None
        qemu.stdin.write(b'info block -n -v overlay\nqemu-io overlay "read -P %d 0 1"\n' % first)
        qemu.stdin.write(b'qemu-io overlay "write -P 9 0 1M"\nqemu-io overlay "read -P 9 0 1M"\n')
        qemu.stdin.flush()
    for qemu in running:
        said, _ = qemu.communicate(b"quit\n", timeout=30)
        assert qemu.returncode == 0 and b"Pattern verification failed" not in said, said
        assert said.count(b"read 1/1 bytes") == 1 and said.count(b"wrote 1048576/1048576") == 1, said
        assert b"read 1048576/1048576" in said and b"Error" not in said, said


# the end in the middle


@pytest.mark.parametrize("fs_type", ["sharedfs", "ramdisk", "overlay"])
def test_cancelled_in_the_middle(base: Path, user: User, fs_type: str) -> None:
    """A job that is deleted while its image is copied (the overlay's into the cache): it stops at once."""
    cache = {"folder": str(base / "cache")}
    node = make_node(base / "node", images={"ramdisk_max": "4G", **({"cache": cache} if fs_type == "overlay" else {})})
    image, workspace = pool_image(base / "pool", mebibytes=300, virtual_mib=300), give(base / "workspace", user)
    attempt, before, others = Attempt(node, user), unseen(), children()

    async def work() -> float:
        copying = asyncio.Event()
        request = attempt.request(image, fs_type, workspace)._replace(
            tell=lambda text: copying.set() if text.endswith("%") else None
        )
        task = asyncio.ensure_future(stage(request))
        await copying.wait()
        start = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - start

    assert run(work()) < 0.5
    assert children() == others
    assert attempt.end() == [] and node.left() == []
    assert list(workspace.iterdir()) == [] and unseen() <= before
    assert not (base / "cache").exists() or list((base / "cache").iterdir()) == []


STAGER = """\
import asyncio, json, os, sys
sys.path.insert(0, sys.argv[1])
from vmgr.config import load_config
from vmgr.images.pool import Image
from vmgr.node import record
from vmgr.node.staging.disks import stage
from vmgr.node.staging.model import StageRequest
from vmgr.node.user import User
from vmgr.paths import Installation

image, user, prefix, job_id, fs_type, workspace = json.loads(sys.argv[2])
config = load_config(Installation(prefix))
place = record.new_place(config.paths, job_id)
lock, listener = record.create(place, {"job_id": job_id})
print(place.folder, flush=True)
tell = lambda text: print(text, flush=True)
request = StageRequest(config, place, Image(**image), User(**user), ["n1-1"], fs_type, 256, workspace, tell)
(disk,) = asyncio.run(stage(request))
print(f"ready {os.fstat(disk.backing).st_ino}", flush=True)
sys.stdin.read()
"""


def stager(node: Node, image: Image, user: User, job_id: str, fs_type: str, workspace: Path) -> subprocess.Popen[str]:
    """An agent, as far as disks go: says where its record is, what is told, and `ready` with the image's inode."""
    facts = json.dumps([image._asdict(), user._asdict(), node.install.prefix, job_id, fs_type, str(workspace)])
    return subprocess.Popen(
        [PYTHON, "-I", "-c", STAGER, str(REPOSITORY), facts],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def said_until(process: subprocess.Popen[str], word: str) -> list[str]:
    """What it says up to the first line that has this word."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if word in line:
            return lines
    raise AssertionError(f"it ended before it said {word!r}: {lines}")


def dismiss(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()
    process.wait()


@pytest.mark.parametrize("fs_type", ["sharedfs", "ramdisk", "overlay"])
def test_killed_in_the_middle(base: Path, user: User, fs_type: str) -> None:
    """The agent is killed while the image is copied (the overlay's into the cache): the record has everything."""
    cache = {"folder": str(base / "cache")}
    node = make_node(base / "node", images={"ramdisk_max": "4G", **({"cache": cache} if fs_type == "overlay" else {})})
    image, workspace = pool_image(base / "pool", mebibytes=300, virtual_mib=300), give(base / "workspace", user)
    before = unseen()
    agent = stager(node, image, user, "1.host", fs_type, workspace)
    said_until(agent, "%")
    (place,) = record.places(node.config.paths)
    (pid,) = [int(step["pid"]) for step in record.steps(place) if step.get("role") == "stager"]
    copier = os.pidfd_open(pid)
    agent.kill()
    dismiss(agent)
    assert undo(place) == []
    poll = select.poll()
    poll.register(copier, select.POLLIN)
    assert poll.poll(0), "what copies is gone when the record is"
    os.close(copier)
    assert node.left() == [] and list(workspace.iterdir()) == [] and unseen() <= before
    assert not (base / "cache").exists() or list((base / "cache").iterdir()) == []


def test_nothing_is_done_by_a_child_that_is_not_recorded(
    attempt: Attempt, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        time.sleep(0.3)  # the child could do much meanwhile
        raise OSError(28, "No space left on device")

    made = base / "made"
    monkeypatch.setattr(child.record, "append", broken)
    with pytest.raises(OSError, match="No space left"):
        run(child.in_child(attempt.place, None, lambda _: made.write_text("x"), keep=[], tell=len, silence_s=5))
    assert not made.exists()


def test_a_child_that_dies_or_says_nothing(attempt: Attempt) -> None:
    def dies(_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for work, why in ((dies, "has died"), (lambda _: signal.pause(), "nothing has moved for 0.3 s")):
        start = time.monotonic()
        with pytest.raises(VTorqueError, match=why):
            run(child.in_child(attempt.place, None, work, keep=[], tell=len, silence_s=0.3))
        assert time.monotonic() - start < 2
    outcome = run(
        child.in_child(
            attempt.place, None, lambda link: (link.wait("x"), time.sleep(0.6), 5)[-1], keep=[], tell=len, silence_s=0.3
        )
    )
    assert outcome == (5, []), "what waits for another may take its time"


def test_a_child_of_the_users_has_nothing_of_roots(attempt: Attempt, user: User) -> None:
    secret, kept = os.open("/etc/shadow", os.O_RDONLY), os.open("/etc/passwd", os.O_RDONLY)

    def look(_: object) -> list[Any]:
        fds = {int(fd.name) for fd in Path("/proc/self/fd").iterdir()}
        return [
            os.getresuid(),
            os.getresgid(),
            sorted(os.getgroups()),
            sorted(fds),
            os.fspath(Path("/proc/self/fd/1").readlink()),
        ]

    uids, gids, groups, fds, output = run(
        child.in_child(attempt.place, user, look, keep=[kept], tell=len, silence_s=5)
    ).result
    os.close(secret)
    os.close(kept)
    assert uids == [user.uid] * 3 and gids == [user.gid] * 3 and groups == sorted(user.gids)
    assert kept in fds and secret not in fds and len(fds) <= 6, "three of nothing, the link, what is kept, the listing"
    assert output == "/dev/null"


# the cache


def cached_node(base: Path, most: str = "1G") -> Node:
    return make_node(base / "node", images={"cache": {"folder": str(base / "cache"), "max": most}})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_many_at_once_fill_the_cache_once(base: Path, user: User) -> None:
    node, image = cached_node(base), pool_image(base / "pool", mebibytes=100, virtual_mib=100)
    agents = [stager(node, image, user, f"{n}.host", "overlay", base) for n in range(8)]
    said = [said_until(agent, "ready") for agent in agents]
    cached = base / "cache" / image.files["disk.raw"]["sha256"]
    assert names(base / "cache") == {cached.name} and sha256(cached) == cached.name
    assert {lines[-1] for lines in said} == {f"ready {cached.stat().st_ino}"}, "all of them read the one copy"
    assert sum(any(line.endswith("%") for line in lines) for lines in said) == 1, "one has copied"
    assert (cached.stat().st_uid, cached.stat().st_mode & 0o777) == (0, 0o400)
    for agent in agents:
        dismiss(agent)
    for place in record.places(node.config.paths):
        assert undo(place) == []
    assert names(base / "cache") == {cached.name} and node.left() == []


def test_the_next_one_fills_when_the_first_is_killed(base: Path, user: User) -> None:
    node, image = cached_node(base), pool_image(base / "pool", mebibytes=300, virtual_mib=300)
    first = stager(node, image, user, "1.host", "overlay", base)
    said_until(first, "%")
    second = stager(node, image, user, "2.host", "overlay", base)
    said_until(second, "waiting")
    first.kill()
    dismiss(first)
    assert "copying" in " ".join(said_until(second, "ready"))
    cached = base / "cache" / image.files["disk.raw"]["sha256"]
    assert names(base / "cache") == {cached.name} and sha256(cached) == cached.name
    dismiss(second)
    for place in record.places(node.config.paths):
        assert undo(place) == []
    assert names(base / "cache") == {cached.name}


def stage_in(node: Node, user: User, image: Image, job_id: str) -> tuple[Attempt, Disk]:
    attempt = Attempt(node, user, job_id)
    (disk,) = attempt.stage(image, "overlay")
    return attempt, disk


def from_pool(disk: Disk, image: Image) -> bool:
    return os.path.samestat(os.fstat(disk.backing), os.stat(image.path("disk")))


def test_what_was_not_used_for_longest_goes_and_what_is_used_stays(
    base: Path, user: User, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vtorque")
    node = cached_node(base, "25M")
    a, b, c, d = (pool_image(base / f"pool-{name}", mebibytes=2, virtual_mib=8) for name in "abcd")
    keys = [image.files["disk.raw"]["sha256"] for image in (a, b, c, d)]
    for image in (a, b, c):
        attempt, disk = stage_in(node, user, image, f"{image.folder[-1]}.host")
        assert not from_pool(disk, image)
        assert attempt.end() == []
    used, _ = stage_in(node, user, a, "used.host")
    assert used.end() == []
    third, _ = stage_in(node, user, d, "d.host")
    assert names(base / "cache") == {keys[0], keys[2], keys[3]}, "b was not used for longest"
    assert f"gone from the node's cache of images: {keys[1]}" in caplog.text
    again, _ = stage_in(node, user, a, "a2.host")
    fourth, _ = stage_in(node, user, c, "c2.host")
    caplog.clear()
    fifth, disk = stage_in(node, user, b, "b2.host")
    assert from_pool(disk, b), "all are in use, so the pool is"
    assert "read in the pool" in caplog.text and "images.cache.max is 25 MiB" in caplog.text
    assert names(base / "cache") == {keys[0], keys[2], keys[3]}
    assert third.end() == fifth.end() == []
    sixth, disk = stage_in(node, user, b, "b3.host")
    assert not from_pool(disk, b) and names(base / "cache") == {keys[0], keys[1], keys[2]}
    for attempt in (again, fourth, sixth):
        assert attempt.end() == []
    assert node.left() == []


def test_an_image_that_never_fits_or_a_full_disk_is_no_failure(
    base: Path, user: User, caplog: pytest.LogCaptureFixture
) -> None:
    image = pool_image(base / "pool", mebibytes=40, virtual_mib=40)
    attempt, disk = stage_in(cached_node(base, "39M"), user, image, "1.host")
    assert from_pool(disk, image) and "there is no room" in caplog.text and names(base / "cache") == set()
    assert attempt.end() == []
    (base / "cache").rmdir()
    with mounted(base / "cache", "ext4", mebibytes=32):
        attempt, disk = stage_in(cached_node(base), user, image, "2.host")
        assert from_pool(disk, image) and names(base / "cache") == {"lost+found"}
        assert_guest_sees(disk, image)
        assert attempt.end() == []


def test_a_file_of_the_cache_that_is_cut_is_copied_again(
    base: Path, user: User, caplog: pytest.LogCaptureFixture
) -> None:
    node, image = cached_node(base), pool_image(base / "pool")
    first, _ = stage_in(node, user, image, "1.host")
    assert first.end() == []
    cached = base / "cache" / image.files["disk.raw"]["sha256"]
    os.truncate(cached, 5 * MIB)
    second, disk = stage_in(node, user, image, "2.host")
    assert "has 5242880 bytes, not 67108864: it is copied again" in caplog.text
    assert not from_pool(disk, image) and sha256(cached) == cached.name
    assert_guest_sees(disk, image)
    assert second.end() == []


def test_what_is_not_what_the_pool_says_does_not_get_into_the_cache(base: Path, user: User) -> None:
    node, image = cached_node(base), pool_image(base / "pool")
    with image.path("disk").open("r+b") as stream:
        stream.write(b"damaged")
    attempt = Attempt(node, user)
    assert "SHA-256" in attempt.refused(image, "overlay")
    assert names(base / "cache") == set() and attempt.end() == [] and node.left() == []


def test_a_cache_that_others_can_write_is_not_used(base: Path, user: User) -> None:
    node, image = cached_node(base), pool_image(base / "pool")
    (base / "cache").mkdir()
    (base / "cache").chmod(0o777)
    attempt = Attempt(node, user)
    with pytest.raises(VTorqueError) as caught:
        attempt.stage(image, "overlay")
    assert caught.value.code is Code.TRUST and attempt.end() == []


def test_kernel_and_initial_ram_disk_are_cached_for_everybody_to_read(base: Path, user: User) -> None:
    image = pool_image(base / "pool", mebibytes=1)
    files = dict(image.files)
    for name in ("vmlinuz", "initrd"):
        path = base / "pool" / name
        path.write_bytes(os.urandom(MIB))
        files[name] = {"sha256": sha256(path), "size": MIB}
    image = image._replace(files=files, disk=None)
    plain = Attempt(make_node(base / "plain"), user)
    assert run(boot_files(plain.request(image, "overlay"))) == (base / "pool" / "vmlinuz", base / "pool" / "initrd")
    assert plain.end() == []
    node = cached_node(base)
    attempt = Attempt(node, user)
    found = run(boot_files(attempt.request(image, "overlay")))
    assert [path.name for path in found] == [files[name]["sha256"] for name in ("vmlinuz", "initrd")]
    for path in found:
        assert path.parent == base / "cache" and sha256(path) == path.name
        read = subprocess.run(["cat", str(path)], user=user.uid, group=user.gid, extra_groups=[], capture_output=True)
        assert len(read.stdout) == MIB, "QEMU opens it as the user"
    assert run(boot_files(attempt.request(image, "overlay"))) == found
    assert attempt.end() == []


@pytest.mark.parametrize("fs_type", ["sharedfs", "ramdisk"])
def test_copies_are_made_from_the_cache(base: Path, user: User, fs_type: str) -> None:
    node, image, workspace = cached_node(base), pool_image(base / "pool"), give(base / "workspace", user)
    for job_id in ("1.host", "2.host"):
        attempt = Attempt(node, user, job_id)
        (disk,) = attempt.stage(image, fs_type, workspace)
        assert_guest_sees(disk, image)
        assert attempt.end() == []
        image.path("disk").unlink(missing_ok=True)  # the second one does without the pool
    assert list(workspace.iterdir()) == [] and node.left() == []
