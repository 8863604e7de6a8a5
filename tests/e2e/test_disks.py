"""Guests' disks in whole jobs: each kind of root disk, the cache of images, the persistent disk, the workspace.

Most guests are of an image that boots as `micro` does, with a disk beside it: ready in seconds, and what is on the disk
is known to the byte.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import CONFIG, POOL, Site, User, on_engine

ENGINES = ("local", "slurm", "torque")
MIB = 1 << 20
DISK_MIB = 48
OWN = (
    CONFIG.replace("pool: {pool}, overlays:", "pool: {root}/pool, cache: {{folder: {root}/cache, max: 4G}}, overlays:")
    .replace(
        "policy:\n",
        "policy:\n  fs_type: {{allowed: [overlay, sharedfs, ramdisk]}}\n  disk: {{enabled: true, max: 1G}}\n",
    )
    .replace("{{default: micro}}", "{{default: small}}")
    + 'workspace: {{folder: "{root}/ws/{{user}}/{{job}}", wipe: true}}\n'
)


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """An installation with a pool, a cache and a workspace of its own."""
    with on_engine(request.param, OWN) as here:
        pool = here.root / "pool"
        pool.mkdir()
        for name in ("micro", "debian-12"):
            newest = max((POOL / name).glob("[0-9]*"), key=lambda folder: int(folder.name))
            shutil.copytree(newest, pool / name / newest.name, copy_function=os.link)
        (here.root / "ws").mkdir()
        (here.root / "ws").chmod(0o1777)
        raw, disk = here.root / "raw", here.root / "disk.qcow2"
        raw.write_bytes(b"vtorque!" * (MIB // 8) * DISK_MIB)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(disk)], check=True)
        add = [str(here.vmgr), "image", "add", str(disk), "--name", "small", "--like", "micro"]
        subprocess.run(add, check=True, stderr=subprocess.DEVNULL)
        yield here


def reads_its_disk(user: User, *options: str) -> str:
    """Run a job whose site prologue, as root in the guest, looks at the disk; gives what it printed."""
    done = user.job("cat hooks\n", *options)
    assert (done.status, done.err) == (0, ""), done
    return done.out


@pytest.fixture(autouse=True)
def _prologue(site: Site) -> Iterator[None]:
    """The site's VM prologue says what is on a small root disk, and writes to it."""
    hook = site.root / "vm" / "prologue"
    before = hook.read_text()
    hook.write_text("""#!/bin/sh
. /run/vtorque/guest.env
for disk in /sys/block/vd*; do
    if [ "$(cat $disk/serial)" = vtorque-root ] && [ "$(cat $disk/size)" -lt 200000 ]; then
        device=/dev/${disk##*/}
        echo "root disk: $(head -c 16 $device) $(cat $device | md5sum | cut -c1-32)" >>"$VT_HOME/hooks"
        dd if=/dev/zero of=$device bs=1M count=1 conv=notrunc 2>/dev/null
        sync
        echo "then: $(head -c 16 $device | tr '\\0' 0)" >>"$VT_HOME/hooks"
    fi
done
""")
    yield
    hook.write_text(before)


@pytest.mark.parametrize("kind", ["overlay", "sharedfs", "ramdisk"])
def test_each_kind_shows_the_image_and_keeps_what_is_written_from_it(kind: str, site: Site, user: User) -> None:
    digest = subprocess.run(["md5sum", site.root / "raw"], capture_output=True, text=True, check=True).stdout[:32]
    for _ in range(2):  # nothing of the first guest reaches the second
        (user.home / "hooks").unlink(missing_ok=True)
        said = reads_its_disk(user, "-vm", f"fs_type={kind}")
        assert said == f"root disk: vtorque!vtorque! {digest}\nthen: {'0' * 16}\n"
    assert not list((site.root / "ws").rglob("*.srv*")), "the workspace is wiped"


def test_guests_of_a_node_share_one_copy(site: Site, user: User) -> None:
    said = reads_its_disk(user, "-l", "nodes=1:ppn=2", "-vm", "fs_type=sharedfs,vms_per_node=2")
    assert said.count("root disk: vtorque!vtorque!") == 1, "the other guest has the prologue of sisters"


def test_an_image_that_has_no_disk_has_nothing_to_stage(user: User) -> None:
    assert user.job("echo ran\n", "-vm", "img=micro,fs_type=ramdisk").out == "ran\n"


def test_a_job_that_is_deleted_while_its_image_is_copied(site: Site, user: User) -> None:
    job = user.submit("true\n", "-vm", "fs_type=sharedfs")
    site.wait_for(job, "spec")
    assert site.client("qdel", job).returncode == 0
    site.wait(job)  # the fixture proves that nothing is left


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sharedfs", "ramdisk"])
def test_debian_from_a_copy(kind: str, user: User) -> None:
    done = user.job("uname -s; df --output=source / | tail -1\n", "-vm", f"img=debian-12,ram=1G,fs_type={kind}")
    assert done.status == 0 and done.out.startswith("Linux\n/dev/vd"), done


def test_leftovers_of_the_cache_do_not_grow_beyond_its_bound(site: Site) -> None:
    size = sum(path.stat().st_blocks * 512 for path in (site.node_root / "cache").rglob("*") if path.is_file())
    assert 0 < size <= 4 << 30
    assert all(Path(path).stat().st_uid == 0 for path in (site.node_root / "cache").rglob("*"))
