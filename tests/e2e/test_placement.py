"""Where a job's guests sit: what the kernel says of the threads of a real one, and what `vmgr topology` shows of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from .conftest import Site, User, eventually

ENGINES = ("local", "slurm", "torque")
CPUS = sorted(os.sched_getaffinity(0))
WAITS = "touch started; while [ ! -e go ]; do sleep 0.2; done; lscpu -p=cpu 2>/dev/null; nproc\n"
pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="a machine with one CPU has nothing to choose from")


@contextmanager
def running(site: Site, user: User, *options: str, env: dict[str, str] | None = None) -> Iterator[psutil.Process]:
    """QEMU of a job that runs until this ends."""
    job = user.submit(WAITS, *options, env=env)
    eventually(lambda: (user.home / "started").exists(), f"{job} runs")
    qemu = site.qemu()
    assert qemu is not None
    yield qemu
    user.write("go", "")
    assert site.wait(job) == 0


def threads(qemu: psutil.Process) -> dict[str, list[int]]:
    """The CPUs of each of QEMU's threads, by name; the many of one name as one, or none where they differ."""
    found: dict[str, list[int]] = {}
    for task in Path(f"/proc/{qemu.pid}/task").iterdir():
        name, cpus = (task / "comm").read_text().strip(), sorted(os.sched_getaffinity(int(task.name)))
        found[name] = cpus if found.get(name, cpus) == cpus else []
    return found


def topology(user: User, *options: str) -> subprocess.CompletedProcess[str]:
    words = user.site.entering(str(user.site.vmgr), "topology", *options, user=user)
    return subprocess.run(words, capture_output=True, text=True)


def test_vcpus_have_a_cpu_each_and_the_owner_sees_them_there(site: Site, user: User, other: User) -> None:
    with running(site, user, "-vm", "vcpus=1") as qemu:
        (job,) = (folder.name for folder in (site.node_root / "spool" / "jobs").iterdir())
        seen = threads(qemu)
        (vcpu,) = seen["CPU 0/TCG"]
        rest = [cpus for name, cpus in seen.items() if not name.startswith("CPU ")]
        assert rest and all(cpus and vcpu not in cpus for cpus in rest), "the other CPU is free for all else"
        shown = topology(user, "--job", job, "--json")
        assert shown.returncode == 0, shown.stderr
        (guest,) = json.loads(shown.stdout)["guests"]
        assert guest["vcpus"] == {"0": [vcpu]} and guest["emulator"] == rest[0]
        picture = topology(user, "--job", job)
        assert picture.returncode == 0 and re.search(r"v\S+-1", picture.stdout), picture
        drawn = topology(user, "--job", job, "--svg", "-")
        assert ElementTree.fromstring(drawn.stdout).tag.endswith("svg")
        refused = topology(other, "--job", job)
        assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1, refused


def test_a_mapping_of_the_users_own(site: Site, user: User) -> None:
    user.write("map.yaml", f"1:\n  0: {CPUS[1]}\n  1: {CPUS[0]}-{CPUS[1]}\n", 0o644)
    with running(site, user, "-l", "nodes=1:ppn=2", "-vm", "vcpus=2,vcpu_pinning=map.yaml") as qemu:
        seen = threads(qemu)
        assert seen["CPU 0/TCG"] == [CPUS[1]] and seen["CPU 1/TCG"] == CPUS[:2]


def test_a_mapping_to_cpus_that_the_node_has_not(user: User) -> None:
    user.write("map.yaml", "1: {0: 4090}\n", 0o644)
    done = user.job("true", "-vm", "vcpu_pinning=map.yaml")
    assert done.status == 72 and "vCPU 0 cannot be bound to the CPUs 4090" in done.err, done


def test_without_pinning_all_threads_may_run_anywhere(site: Site, user: User) -> None:
    with running(site, user, "-vm", "vcpu_pinning=off") as qemu:
        assert all(cpus == CPUS for cpus in threads(qemu).values())


def test_ram_is_bound_where_the_vcpus_are(site: Site, user: User) -> None:
    if not Path("/sys/devices/system/node/node0").exists():
        pytest.skip("this machine's kernel knows no NUMA nodes")
    with running(site, user) as qemu:
        assert "bind:0" in Path(f"/proc/{qemu.pid}/numa_maps").read_text()


@pytest.mark.only("local", reason="makes by hand the cpuset that TORQUE has for a job")
@pytest.mark.skipif(not Path("/sys/fs/cgroup/cpuset/cpuset.cpus").exists(), reason="no cpusets of version 1 here")
def test_a_guest_stays_within_the_cpuset_of_its_job(site: Site, user: User) -> None:
    """A cpuset as TORQUE makes it, made here by hand: the embedded batch system has none."""
    torque = Path("/sys/fs/cgroup/cpuset/torque")
    mine = not torque.exists()
    held = user.submit("cat /proc/cpuinfo | grep -c ^processor; touch ran\n", "-h")
    folder = torque / held
    folder.mkdir(parents=True)
    try:
        for group in (torque, folder):
            (group / "cpuset.mems").write_text("0")
            (group / "cpuset.cpus").write_text(f"{CPUS[0]}-{CPUS[1]}" if group == torque else str(CPUS[1]))
        assert site.client("qrls", held).returncode == 0
        eventually(lambda: site.qemu() is not None, "the guest is started")
        qemu = site.qemu()
        assert qemu is not None
        eventually(lambda: threads(qemu).get("CPU 0/TCG") == [CPUS[1]], "the guest is pinned within the cpuset")
        assert f":cpuset:/torque/{held}\n" in Path(f"/proc/{qemu.pid}/cgroup").read_text()
        assert all(cpus == [CPUS[1]] for cpus in threads(qemu).values())
        assert site.wait(held) == 0
    finally:
        eventually(lambda: (folder / "cgroup.procs").read_text() == "", "nothing is left in the cpuset")
        folder.rmdir()
        if mine:
            torque.rmdir()


def test_more_vcpus_than_the_node_has(user: User) -> None:
    done = user.job("true", "-l", "nodes=1:ppn=4", "-vm", "vcpus=2,vms_per_node=2")
    assert done.status == 72 and "do not fit" in done.err, done
