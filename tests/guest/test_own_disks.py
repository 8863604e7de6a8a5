"""A user's own disk as the image of a guest, which boots by itself: firmware, boot loader and kernel are the disk's."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from guestsetup import POOL, image_or_skip
from nodejob import Job, Jobs, account
from nodesite import make_node

from vmgr.errors import Code
from vmgr.jobspec import GuestGroup

pytestmark = [pytest.mark.guest, pytest.mark.root]


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    if os.geteuid() != 0:
        pytest.skip("needs root: adds a user, starts hypervisors")
    image_or_skip("debian-12")
    with tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp") as base, account() as owner:
        Path(base).chmod(0o755)
        jobs = Jobs(Path(base), owner)
        jobs.node = make_node(
            Path(base),
            images={"pool": str(POOL), "allow_user_images": True},
            hypervisor={"allow_emulation": True, "overcommit_cpus": True},
            policy={"img": {"default": "debian-12"}, "ram": {"min": "192M"}},
            timeouts={"boot": 200},
        )
        yield jobs


def run(jobs: Jobs, disk: Path, script: str) -> tuple[int, str, Job]:
    path = jobs.submit(script, groups=(GuestGroup(str(disk), 1, 2, 512),))
    with jobs.job(path) as job:
        job.start(interactive=False)
        return (*job.ended(), job)


def test_a_disk_that_the_user_can_read_boots_by_itself(jobs: Jobs) -> None:
    """It is of the pool only so that it need not be copied: to the node it is a path, opened as the user."""
    disk = image_or_skip("debian-12").path("disk")
    before = disk.stat()
    script = "#!/bin/sh\ngrep -o BOOT_IMAGE=vmlinuz /proc/cmdline\nid -un\ncat ~/hello\nexit 5\n"
    Path(jobs.owner.pw_dir, "hello").write_text("from home\n")
    path = jobs.submit(script, groups=(GuestGroup(str(disk), 1, 2, 512),))
    with jobs.job(path) as job:
        job.start(interactive=False)
        job.screen.expect("BOOT_IMAGE=vmlinuz")
        (qemu,) = psutil.Process(job.agent).children()
        line = qemu.cmdline()
        assert "-kernel" not in line and str(disk) not in " ".join(line) and qemu.uids().real == jobs.owner.pw_uid
        status, said = job.ended()
    assert status == 5 and said.splitlines()[-2:] == [jobs.owner.pw_name, "from home"], said
    after = disk.stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)


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
