"""The persistent disk in a real guest: mounted before the hooks, written by the user, clean when the guest is gone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from guestmachine import Machine, Setup, decode
from guestsetup import MakeSetup

from vmgr.node.datadisk import FEATURES, LABEL, MKFS

pytestmark = pytest.mark.guest
MIB = 1 << 20
"""Each with its own way of having ext4: a module that is loaded on demand, and e2fsck beside it."""

PROLOGUE = """#!/bin/sh
grep ' /data ' /proc/mounts
stat -c 'owner %u:%g' /data
"""


def make_disk(path: Path, setup: Setup) -> Path:
    """A disk as the node makes one."""
    path.touch()
    os.truncate(path, 64 * MIB)
    extended = f"root_owner={setup.user.uid}:{setup.user.gid},lazy_itable_init=1,lazy_journal_init=1"
    subprocess.run(
        [MKFS, "-q", "-F", "-b", "4096", "-m", "0", "-L", LABEL, "-O", ",".join(FEATURES), "-E", extended, str(path)],
        check=True,
    )
    os.chown(path, setup.user.uid, setup.user.gid)
    return path


def disk_of(setup: Setup) -> Path:
    return setup.directory.parent / "data.disk"


def state(path: Path) -> tuple[str, bool]:
    """What the superblock says of the file system, and whether e2fsck agrees that nothing is wrong."""
    said = subprocess.run(["dumpe2fs", "-h", str(path)], capture_output=True, text=True, check=True).stdout
    clean = next(line.split()[-1] for line in said.splitlines() if line.startswith("Filesystem state"))
    recover = " needs_recovery" in said
    checked = subprocess.run(["e2fsck", "-fn", str(path)], capture_output=True, check=False).returncode
    return ("needs recovery" if recover else clean), checked == 0


def read_file(disk: Path, name: str) -> str:
    return subprocess.run(
        ["debugfs", "-R", f"cat {name}", str(disk)], capture_output=True, text=True, check=True
    ).stdout


def run(machine: Machine, command: str) -> str:
    done = machine.ssh(command)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=["micro", pytest.param("debian-12", marks=pytest.mark.slow)])
def with_disk(request: pytest.FixtureRequest, setup_for: MakeSetup) -> Setup:
    setup = setup_for(request.param, prologue=PROLOGUE, hostname="vn1-1")
    setup.data = make_disk(disk_of(setup), setup)
    return setup


def test_what_is_written_is_there_in_the_next_guest_and_clean(with_disk: Setup) -> None:
    setup = with_disk
    assert setup.data is not None
    user = setup.user
    with Machine(setup) as machine:
        prologue = machine.wait_for("prologue")
        assert prologue["status"] == 0, decode(prologue["output"])
        said = decode(prologue["output"])
        options = said.split()[3].split(",")
        assert said.split()[1:3] == ["/data", "ext4"] and {"rw", "nosuid", "nodev", "errors=remount-ro"} <= set(options)
        assert f"owner {user.uid}:{user.gid}" in said
        machine.wait_for("ready")
        # a job that is not even told to stop: one file synced, one in memory only, one that is still being written
        run(machine, "echo synced >/data/synced && sync /data/synced && echo merely >/data/merely && mkdir /data/more")
        run(machine, "(exec >/data/growing 2>&1 </dev/null; while :; do echo line; sleep 0.1; done) & cd /data; true")
        machine.send("shutdown")
        machine.wait_for("epilogue")
        assert machine.ended(), machine.console_text()[-2000:]
    assert state(setup.data) == ("clean", True)
    assert read_file(setup.data, "synced") == "synced\n" and read_file(setup.data, "merely") == "merely\n"
    assert read_file(setup.data, "growing").startswith("line\n")
    for path in setup.directory.iterdir():
        if path.suffix in (".sock", ".qcow2", ".iso"):
            path.unlink()
    with Machine(setup) as machine:
        machine.wait_for("ready")
        assert (
            run(machine, "cat /data/synced /data/merely && stat -c %u /data/merely") == f"synced\nmerely\n{user.uid}\n"
        )
        run(machine, "echo cut >/data/cut && sync /data/cut")
        assert machine.process is not None
        machine.process.kill()  # as an epilogue ends one that does not obey
        machine.process.wait()
    assert state(setup.data)[0] == "needs recovery"
    for path in setup.directory.iterdir():
        if path.suffix in (".sock", ".qcow2", ".iso"):
            path.unlink()
    with Machine(setup) as machine:
        machine.wait_for("ready")
        assert run(machine, "cat /data/cut /data/merely") == "cut\nmerely\n"
        machine.send("quiesce")
        assert machine.wait_for("quiesce")["status"] == 0
        assert state(setup.data)[0] == "clean", "a guest that holds still has let go of it"
        machine.send("mount")
        assert machine.wait_for("mount")["status"] == 0
        assert run(machine, "cat /data/cut") == "cut\n"


def failure(setup: Setup) -> str:
    with Machine(setup) as machine:
        while True:
            event = machine.next_event()
            assert event, machine.console_text()[-2000:]
            assert event["event"] != "ready"
            if event["event"] == "failed":
                return decode(event["reason"])


@pytest.mark.parametrize("kind", ["empty", "qcow2", "half"])
def test_a_disk_without_a_file_system(setup_for: MakeSetup, kind: str) -> None:
    setup = setup_for("micro")
    disk = disk_of(setup)
    if kind == "half":  # its superblock is there, and behind it nothing
        make_disk(disk, setup)
        os.truncate(disk, 1 * MIB)
        os.truncate(disk, 2 * MIB)
    else:
        disk.touch()
        os.truncate(disk, 16 * MIB)
        if kind == "qcow2":
            with disk.open("r+b") as stream:
                stream.write(b"QFI\xfb\0\0\0\3")
    os.chown(disk, setup.user.uid, setup.user.gid)
    setup.data = disk
    said = failure(setup)
    if kind == "half":
        assert said.startswith("cannot mount the persistent disk on /data: ")
    else:
        assert said == (
            "there is no ext4 file system on the persistent disk; make one: mkfs.ext4 -F -E "
            f"root_owner={setup.user.uid}:{setup.user.gid} FILE"
        )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a small file system")
def test_a_node_without_room_is_an_error_in_the_guest_and_no_standstill(setup_for: MakeSetup) -> None:
    """By default QEMU stops a guest whose disk has no room to grow, until somebody comes."""
    setup = setup_for("micro")
    small = setup.directory.parent / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12M,mode=755", "tmpfs", str(small)], check=True)
    try:
        setup.data = make_disk(small / "data.disk", setup)
        with Machine(setup) as machine:
            machine.wait_for("ready")
            assert machine.ssh("dd if=/dev/urandom of=/data/large bs=1M count=32 conv=fsync").returncode != 0
            assert run(machine, "echo alive") == "alive\n"
            machine.send("shutdown")
            assert machine.ended(), machine.console_text()[-2000:]
    finally:
        subprocess.run(["umount", str(small)], check=True)
