"""Shares of kind nfs in a real guest, from a real server: public data, and a user's own by Kerberos."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from guestmachine import Machine, Mount
from guestsetup import make_setup
from nfsserver import nfs_server

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: an NFS server"),
]


@pytest.fixture
def base() -> Iterator[Path]:
    folder = Path("/tmp") / f"vtorque-nfs-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def test_public_data(base: Path) -> None:
    public = base / "public"
    public.mkdir()
    (public / "readme").write_text("for all\n")
    (public / "private").write_text("root's\n")
    (public / "private").chmod(0o600)
    (public / "open").mkdir()
    (public / "open").chmod(0o777)
    (base / "server").mkdir()
    setup = make_setup(base, "debian-12", vcpus=2, ram_mib=1024)
    share = Mount("public", "/public data", Path("10.0.2.2:/export"), True, "nfs", "sys")
    setup.mounts = (*setup.mounts, share)
    with nfs_server(base / "server", public), Machine(setup) as machine:
        machine.wait_for("ready")
        said = machine.ssh(
            "cd '/public data' && cat readme; findmnt -n -o FSTYPE,OPTIONS -T . | tr ',' ' '; cat private; "
            "echo x >open/new"
        )
        lines = said.stdout.splitlines()
        assert lines[0] == "for all", said
        options = lines[1].split()
        assert {"nfs4", "ro", "nosuid", "nodev", "hard", "sec=sys", "vers=4.2"} - set(options) == set(), options
        assert "private: Permission denied" in said.stderr and "open/new: Read-only file system" in said.stderr
        machine.send("quiesce")
        assert machine.wait_for("quiesce")["status"] == 0
        machine.send("mount")
        assert machine.wait_for("mount")["status"] == 0
        assert machine.ssh("cat '/public data/readme'").stdout == "for all\n"
        machine.send("shutdown")
        assert machine.ended()
    assert list((public / "open").iterdir()) == []


def test_a_server_that_is_not_there_is_told(base: Path) -> None:
    setup = make_setup(base, "debian-12", vcpus=2, ram_mib=1024)
    setup.mounts = (*setup.mounts, Mount("data", "/data", Path("10.0.2.2:/absent"), True, "nfs", "sys"))
    (base / "server").mkdir()
    (base / "export").mkdir()
    failed = pytest.raises(AssertionError, match=r"cannot mount data \(nfs\) on /data: mount\.nfs")
    with nfs_server(base / "server", base / "export"), Machine(setup) as machine, failed:
        machine.wait_for("ready")
