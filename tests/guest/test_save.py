"""`vmgr image save` of a real job's guest, and a job in a guest of what was saved."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from guestsetup import POOL, image_or_skip
from nodejob import Job, Jobs, account
from nodesite import make_node

from vmgr.cli import main
from vmgr.images.pool import Pool
from vmgr.jobspec import GuestGroup

pytestmark = [pytest.mark.guest, pytest.mark.root]

WRITES = """#!/bin/bash
echo "written before" >/var/tmp/mark
echo running
until [ -e "$HOME/go" ]; do sleep 0.1; done
echo "written after" >>/var/tmp/mark && sync && echo "the disk goes on"
"""
READS = """#!/bin/bash
cat /var/tmp/mark
findmnt -no SOURCE /
"""


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """A node whose pool is its own, with the image in it."""
    if os.geteuid() != 0:
        pytest.skip("needs root: adds a user, starts hypervisors")
    image_or_skip("debian-12")
    with tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp") as folder, account() as owner:
        base = Path(folder)
        base.chmod(0o755)
        made = Jobs(base, owner)
        (base / "pool").mkdir()
        (base / "pool" / "debian-12").symlink_to(POOL / "debian-12")
        made.node = make_node(
            base,
            images={"pool": str(base / "pool")},
            hypervisor={"allow_emulation": True, "overcommit_cpus": True},
            policy={"ram": {"min": "192M"}},
            timeouts={"boot": 200},
        )
        yield made


def start(jobs: Jobs, script: str, image: str) -> Job:
    path = jobs.submit(script, groups=(GuestGroup(image, 1, 2, 768),))
    return jobs.job(path)


def test_what_was_saved_boots_and_has_the_files(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", str(jobs.node.install.root / "venv" / "bin" / "python3"))
    pool = Pool(jobs.node.config.images.pool)
    with start(jobs, WRITES, "debian-12") as job:
        job.start(interactive=False)
        job.screen.expect("running\n")
        for kind in ("--layer", "--flat"):
            assert main(["image", "save", "12.host:0", kind[2:], kind]) == 0
            out, err = capsys.readouterr()
            assert out == f"{kind[2:]}@1\n" and "copying the disk" in err and "not frozen" not in err, err
        (Path(jobs.owner.pw_dir) / "go").touch()
        status, said = job.ended()
        assert status == 0 and "the disk goes on" in said, said
    layer, flat = pool.get("layer"), pool.get("flat")
    assert (layer.parent, flat.parent) == (pool.get("debian-12").reference, None)
    assert layer.size - layer.path("kernel").stat().st_size < 200 << 20 < flat.size
    raw = jobs.node.base / "raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(flat.path("disk")), str(raw)], check=True)
    disk = f"{raw}?offset={512 * int.from_bytes(raw.open('rb').read(512)[470:474], 'little')}"  # the second partition
    check = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True, check=False)
    assert check.returncode == 0, f"it was frozen, so nothing of it needs a repair: {check}"
    shown = subprocess.check_output(["debugfs", "-R", "cat /var/tmp/mark", disk], text=True)
    assert shown == "written before\n"
    raw.unlink()
    with start(jobs, READS, "layer") as job:
        job.start(interactive=False)
        status, said = job.ended()
        assert status == 0 and said.endswith("written before\n/dev/vda2\n"), said
