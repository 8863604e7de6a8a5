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

from .conftest import CONFIG, POOL, Site, User, eventually, installed

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
def site() -> Iterator[Site]:
    """An installation with a pool, a cache and a workspace of its own."""
    with installed(OWN) as here:
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


def reads_its_disk(user: User, *options: str, status: int = 0) -> str:
    """Run a job whose site prologue, as root in the guest, looks at the disk; gives what it printed."""
    done = user.job("cat hooks\n", *options)
    assert (done.status, done.err) == (status, ""), done
    return done.out


@pytest.fixture(autouse=True)
def _prologue(site: Site) -> Iterator[None]:
    """The site's VM prologue says what is on the root disk, and writes to it."""
    hook = site.root / "vm" / "prologue"
    before = hook.read_text()
    hook.write_text("""#!/bin/sh
. /run/vtorque/guest.env
for disk in /sys/block/vd*; do
    if [ "$(cat $disk/serial)" = vtorque-root ]; then
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


def test_the_workspace_is_seen_in_the_guest_and_wiped_after_the_job(site: Site, user: User) -> None:
    script = """
echo $VTORQUE_WORKSPACE; stat -c '%U %a' /workspace
mkdir -p /workspace/deep/er; echo data >/workspace/deep/er/file; chmod 0 /workspace/deep/er
touch started; while [ ! -e go ]; do sleep 0.2; done
"""
    job = user.submit(script)
    eventually(lambda: (user.home / "started").exists(), "the job runs")
    (folder,) = (site.root / "ws" / user.name).iterdir()
    assert (folder / "deep" / "er" / "file").read_text() == "data\n"
    user.write("go", "")
    assert site.wait(job) == 0
    assert user.output(f"job.sh.o{job.partition('.')[0]}") == f"/workspace\n{user.name} 700\n"
    eventually(lambda: not folder.exists(), "the workspace is wiped", 10)


def test_a_persistent_disk_outlives_its_job(site: Site, user: User) -> None:
    made = user.job(
        "df --output=target,fstype /data | tail -1; stat -c %U /data; echo first >/data/file\n", "-vm", "disk=64M"
    )
    assert (made.status, made.err) == (0, ""), made
    assert made.out.split() == ["/data", "ext4", user.name]
    (disk,) = user.home.glob("*.disk")
    assert disk.stat().st_size == 64 * MIB and disk.stat().st_uid == user.uid
    clean = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True)
    assert clean.returncode == 0, clean.stdout
    again = user.job("cat /data/file; echo second >>/data/file\n", "-vm", f"disk={disk.name}")
    assert (again.status, again.out) == (0, "first\n"), again
    script = "touch started; while [ ! -e go ]; do sleep 0.2; done; cat /data/file\n"
    holder = user.submit(script, "-vm", f"disk={disk}")
    eventually(lambda: (user.home / "started").exists(), "the job runs")
    assert lock_of(disk, user) == "locked\n"
    user.write("go", "")
    assert site.wait(holder) == 0
    assert lock_of(disk, user) == "free\n"


def lock_of(disk: Path, user: User) -> str:
    return user.run("python3", "-c", LOCK_PROBE, str(disk)).stdout


LOCK_PROBE = """
import fcntl, struct, sys
with open(sys.argv[1], "r+b") as disk:
    try:
        fcntl.fcntl(disk, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))  # F_OFD_SETLK
        print("free")
    except OSError:
        print("locked")
"""


def test_what_was_written_before_a_qdel_is_on_the_disk(site: Site, user: User) -> None:
    job = user.submit("echo kept >/data/file; touch started; sleep 300\n", "-vm", "disk=64M")
    eventually(lambda: (user.home / "started").exists(), "the job runs")
    assert site.client("qdel", job).returncode == 0
    site.wait(job)
    (disk,) = user.home.glob("*.disk")
    shown = subprocess.run(["debugfs", "-R", "cat /file", disk], capture_output=True, text=True)
    assert shown.stdout == "kept\n", shown


@pytest.mark.parametrize(
    ("disk", "said"),
    [
        ("2G", "at most 1G"),
        ("absent.disk", "absent.disk"),
        ("/etc/passwd", "/etc/passwd"),
        ("link.disk", "link.disk"),
    ],
)
def test_a_disk_that_cannot_be(disk: str, said: str, user: User) -> None:
    (user.home / "link.disk").symlink_to("/etc/passwd")
    done = user.run(str(user.site.vsub), "--wait", "-vm", f"disk={disk}", str(user.write("job.sh", "true\n")))
    errors = done.stderr + "".join(path.read_text() for path in user.home.glob("job.sh.e*"))
    assert done.returncode != 0 and said in errors and "Traceback" not in errors, (done, errors)


def test_leftovers_of_the_cache_do_not_grow_beyond_its_bound(site: Site) -> None:
    size = sum(path.stat().st_blocks * 512 for path in (site.root / "cache").rglob("*") if path.is_file())
    assert 0 < size <= 4 << 30
    assert all(Path(path).stat().st_uid == 0 for path in (site.root / "cache").rglob("*"))
