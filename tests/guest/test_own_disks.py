"""A user's own disk as the image of a guest, which boots by itself: firmware, boot loader and kernel are the disk's."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from guestsetup import POOL, image_or_skip
from nodejob import Job, Jobs, account
from nodesite import TEMPLATES, make_node

from vmgr.errors import Code, VTorqueError
from vmgr.images.add import Given, Wish, add_disk
from vmgr.images.disk import boot_record
from vmgr.images.pool import Pool
from vmgr.images.removing import delete
from vmgr.images.report import Report
from vmgr.jobspec import GuestGroup
from vmgr.node import record

SETTINGS: dict[str, dict[str, object]] = {
    "hypervisor": {"allow_emulation": True, "overcommit_cpus": True},
    "policy": {"img": {"default": "micro"}, "ram": {"min": "192M"}},
    "timeouts": {"boot": 200},
}
pytestmark = [pytest.mark.guest, pytest.mark.root]


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    if os.geteuid() != 0:
        pytest.skip("needs root: adds a user, starts hypervisors")
    image_or_skip("debian-12")
    with tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp") as base, account() as owner:
        Path(base).chmod(0o755)
        jobs = Jobs(Path(base), owner)
        jobs.node = make_node(Path(base), images={"pool": str(POOL), "allow_user_images": True}, **SETTINGS)
        yield jobs


@pytest.fixture(scope="module")
def disk(jobs: Jobs) -> Path:
    """The user's: a FAT file system with SYSLINUX, the wrapped kernel of debian-12, and what micro lives in.

    It takes a third of the time in which debian-12 boots by itself.
    """
    home, micro = Path(jobs.owner.pw_dir), image_or_skip("micro")
    raw, start, kernel, disk = (home / name for name in ("raw", "start", "vmlinuz", "disk.qcow2"))
    source = image_or_skip("debian-12").path("disk")
    command = ["qemu-img", "dd", "-f", "qcow2", "-O", "raw", "bs=1M", "count=64", f"if={source}", f"of={start}"]
    subprocess.run(command, check=True)
    subprocess.run(["mcopy", "-i", f"{start}@@1M", "::vmlinuz", kernel], check=True)
    (home / "syslinux.cfg").write_text(
        f"DEFAULT x\nLABEL x\n KERNEL vmlinuz\n INITRD initrd\n APPEND {micro.cmdline}\n"
    )
    raw.write_bytes(boot_record(Path("/usr/lib/syslinux/mbr/mbr.bin").read_bytes(), 4711, 65))
    os.truncate(raw, 65 << 20)
    part = f"{raw}@@1M"
    subprocess.run(
        ["mformat", "-i", part, "-T", str(63 * 2048), "-h", "16", "-s", "63", "-H", "2048", "::"], check=True
    )
    (home / "initrd").write_bytes(gzip.compress(micro.path("initrd").read_bytes(), 1))  # the firmware reads slowly
    for file, name in ((kernel, "vmlinuz"), (home / "initrd", "initrd"), (home / "syslinux.cfg", "syslinux.cfg")):
        subprocess.run(["mcopy", "-i", part, file, f"::{name}"], check=True)
    subprocess.run(["syslinux", "--install", "--offset", str(1 << 20), raw], check=True)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk], check=True)
    os.chown(disk, jobs.owner.pw_uid, jobs.owner.pw_gid)
    disk.chmod(0o600)
    for path in (raw, start, kernel):
        path.unlink()
    return disk


def run(jobs: Jobs, disk: Path, script: str) -> tuple[int, str, Job]:
    path = jobs.submit(script, groups=(GuestGroup(str(disk), 1, 2, 512),))
    with jobs.job(path) as job:
        job.start(interactive=False)
        return (*job.ended(), job)


def test_a_disk_of_the_users_boots_by_itself(jobs: Jobs, disk: Path) -> None:
    before = disk.read_bytes()
    script = "#!/bin/sh\ngrep -o BOOT_IMAGE=vmlinuz /proc/cmdline\nid -un\ncat ~/hello\nexit 5\n"
    Path(jobs.owner.pw_dir, "hello").write_text("from home\n")
    path = jobs.submit(script, groups=(GuestGroup(str(disk), 1, 1, 384),))
    with jobs.job(path) as job:
        job.start(interactive=False)
        job.screen.expect("BOOT_IMAGE=vmlinuz")
        (qemu,) = psutil.Process(job.agent).children()
        line = qemu.cmdline()
        assert "-kernel" not in line and str(disk) not in " ".join(line) and qemu.uids().real == jobs.owner.pw_uid
        status, said = job.ended()
    assert status == 5 and said.splitlines()[-2:] == [jobs.owner.pw_name, "from home"], said
    assert disk.read_bytes() == before


@pytest.mark.slow
def test_an_image_of_the_pool_that_boots_by_itself(jobs: Jobs, disk: Path) -> None:
    """Added without kernel and initrd, asked for by its revision, and held by the agent as long as the job lives."""
    pool = Pool(jobs.node.base / "own")
    given = Given(disk, 1 << 40)
    wish = Wish(family="micro", features=("9p",))
    for _ in range(2):
        add_disk(given, "mine", wish, like=None, pool=pool, templates=TEMPLATES, report=Report())
    there = jobs.node
    jobs.node = make_node(there.base / "second", **{**SETTINGS, "images": {"pool": str(pool.path)}})
    path = jobs.submit("#!/bin/sh\necho $VTORQUE_IMAGE\nhead -n 1\n", groups=(GuestGroup("mine@1", 1, 1, 384),))
    shutil.copytree(TEMPLATES, jobs.node.base / "templates")
    record.make_folder(jobs.node.config.paths.run, 0o755)
    with jobs.job(path) as job:
        job.start(interactive=False)
        job.screen.expect("mine")
        with pytest.raises(VTorqueError, match=r"mine@1 is in use: process \d+"):
            delete(pool, "mine@1")
        assert job.ended()[0] == 0
    assert delete(pool, "mine@1").gone == ["mine@1"]
    jobs.node = there


def test_what_the_user_cannot_read_or_is_no_disk_is_refused(jobs: Jobs) -> None:
    home = Path(jobs.owner.pw_dir)
    others, fifo, link, overlay = (home / name for name in ("others", "fifo", "link", "overlay"))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", others, "16M"], check=True)
    others.chmod(0o600)  # root's
    os.mkfifo(fifo)
    link.symlink_to(others)
    command = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", overlay, "16M"]
    subprocess.run(command, check=True)
    for disk, reason in (
        (others, "Permission denied"), (fifo, "not a regular file"), (link, "a symbolic link"),
        (overlay, "an overlay with a backing file"), (home / "none", "No such file"),
    ):  # fmt: skip
        status, said, _ = run(jobs, disk, "#!/bin/sh\necho ran\n")
        assert status == Code.STAGE.status and f"{disk} cannot be used: " in said and reason in said, said
        assert "ran" not in said
