"""Persistent disks and workspaces of real jobs: what a job has written there, and what is left of it afterwards."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .conftest import CONFIG, Site, User, eventually, on_engine

ENGINES = ("local", "slurm", "torque")
OWN = CONFIG.replace("policy:\n", "policy:\n  disk: {{enabled: true, max: 1G}}\n") + (
    'workspace: {{folder: "{root}/scratch/{{user}}/{{job}}", wipe: true}}\n'
)
WRITES = """\
set -e
echo synced >/data/synced && sync /data/synced
echo merely >/data/merely
echo "$VTORQUE_WORKSPACE $(stat -c %a:%u "$VTORQUE_WORKSPACE")"
mkdir "$VTORQUE_WORKSPACE/results" && echo result >"$VTORQUE_WORKSPACE/results/1"
"""


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """An installation with disks and workspaces; the folder of workspaces is one in which every user may make one."""
    with on_engine(request.param, OWN) as here:
        (here.root / "scratch").mkdir()
        (here.root / "scratch").chmod(0o1777)
        yield here


@pytest.fixture
def scratch(site: Site, user: User) -> Path:
    """Where the user's workspaces are."""
    return site.root / "scratch" / user.name


def content(disk: Path, name: str) -> str:
    return subprocess.run(
        ["debugfs", "-R", f"cat {name}", str(disk)], capture_output=True, text=True, check=True
    ).stdout


def is_clean(disk: Path) -> bool:
    """Whether the file system was unmounted, and is whole."""
    said = subprocess.run(["dumpe2fs", "-h", str(disk)], capture_output=True, text=True, check=True).stdout
    return " needs_recovery" not in said and subprocess.run(["e2fsck", "-fn", str(disk)], check=False).returncode == 0


def test_a_disk_goes_from_job_to_job_and_the_workspace_with_its_job(site: Site, user: User, scratch: Path) -> None:
    first = user.job(WRITES, "-vm", "disk=64M")
    disk = user.home / f"vtorque-{site.whole(first.job_id)}.disk"
    assert (first.status, first.err) == (0, ""), first
    assert first.out == f"/workspace 700:{user.uid}\n"
    assert f"vsub: {first.job_id}  persistent disk: {disk}\n" in first.progress
    info = disk.stat()
    assert (info.st_uid, info.st_mode & 0o777, info.st_size) == (user.uid, 0o600, 64 << 20)
    assert is_clean(disk)
    assert list(scratch.iterdir()) == [], "the workspace is wiped"
    second = user.job("cat /data/synced /data/merely; echo again >/data/again\n", "-vm", f"disk={disk.name}")
    assert (second.status, second.out) == (0, "synced\nmerely\n"), second
    assert content(disk, "again") == "again\n" and is_clean(disk)


def test_what_a_deleted_job_has_written_is_there(site: Site, user: User, scratch: Path) -> None:
    """Not only what it has synced: the guest shuts down before its epilogue goes on."""
    job = user.submit(WRITES + "trap '' TERM; touch running; while :; do sleep 1; done\n", "-vm", "disk=64M")
    eventually((user.home / "running").exists, "the job runs")
    assert len(list(scratch.iterdir())) == 1
    assert site.client("qdel", job).returncode == 0
    site.wait(job)
    disk = user.home / f"vtorque-{site.whole(job)}.disk"
    assert content(disk, "synced") == "synced\n" and content(disk, "merely") == "merely\n"
    assert is_clean(disk)
    eventually(lambda: not list(scratch.iterdir()), "the workspace is wiped", limit_s=15)


@contextmanager
def in_use(disk: Path) -> Iterator[None]:
    """The lock of another guest, which another node may have."""
    fd = os.open(disk, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        yield
    finally:
        os.close(fd)


def test_a_disk_that_cannot_be_had_ends_the_job_with_one_line(site: Site, user: User) -> None:
    disk = user.write("mine.disk", "", mode=0o600)
    os.truncate(disk, 16 << 20)
    with in_use(disk):
        done = user.job("true\n", "-vm", "disk=mine.disk")
    assert done.status == 73 and done.err.count("\n") == 1, done
    assert done.err.startswith(f"VT-STAGE: {disk} cannot be used: in use by another guest; ")
    done = user.job("true\n", "-vm", "disk=mine.disk")
    assert done.status == 75 and "there is no ext4 file system on the persistent disk" in done.err
    done = user.job("true\n", "-vm", "disk=absent.disk")
    assert done.status == 73 and "absent.disk cannot be used: No such file or directory" in done.err
