"""Guests of a Slurm that binds its jobs by control groups of version 1: real groups, real guests."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import psutil
import pytest

from .conftest import User, eventually
from .slurmcluster import Slurm, found_programs, slurm_site

GROUPS = Path("/sys/fs/cgroup")
KINDS = ("memory", "cpuset", "cpuacct", "freezer")
ONE = "-l", "nodes=1:ppn=1", "-vm", "vcpus=1,ram=200M"
TWO = "-l", "nodes=2:ppn=1", "-vm", "vcpus=1,ram=200M"
HOST_MEMORY_MIB = 256
WAITS = "trap 'echo told >told; exit 0' TERM; touch runs; while :; do sleep 0.2; done\n"
CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainCores=yes
ConstrainRAMSpace=yes
"""


def why_not() -> Optional[str]:
    if found_programs() is not None:
        return f"needs Slurm: {found_programs()} is missing"
    lacking = [kind for kind in KINDS if not os.access(GROUPS / kind / "cgroup.procs", os.W_OK)]
    return f"needs control groups of version 1 that root can write: no {', '.join(lacking)}" if lacking else None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


class Bound(Slurm):
    """Slurm with control groups, on two nodes that have the CPUs of the machine."""

    tracking = """\
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup
JobAcctGatherType=jobacct_gather/cgroup
SelectTypeParameters=CR_CPU_Memory"""
    cpus = len(os.sched_getaffinity(0))
    cgroup_conf = CGROUP_CONF
    more = ("PrologFlags=Contain,DeferBatch", "KillWait=60")

    def __init__(self, prefix: Path, root: Path, nodes: tuple[str, ...]) -> None:
        super().__init__(prefix, root, nodes[:2])

    def close(self) -> None:
        super().close()
        for kind in KINDS:  # which slurmd leaves
            for node in self.nodes:
                if (GROUPS / kind / f"slurm_{node}").exists():
                    (GROUPS / kind / f"slurm_{node}").rmdir()

    def groups(self, what: str = "*") -> list[Path]:
        """What is there of the groups of jobs."""
        return [path for kind in KINDS for node in self.nodes for path in (GROUPS / kind).glob(f"slurm_{node}/{what}/")]

    def guests(self) -> list[psutil.Process]:
        return self.of_agents("qemu-system-x86")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Bound]:
    with slurm_site(kind=Bound) as site:
        assert isinstance(site, Bound)
        yield site


@pytest.fixture(scope="module")
def site(cluster: Bound) -> Slurm:
    """The installation whose users the tests are."""
    return cluster


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: Bound) -> Iterator[None]:
    """No group of a job, Slurm's or ours, and no node drained."""
    yield
    eventually(lambda: set(cluster.states().values()) == {"IDLE"}, lambda: str(cluster.states()), limit_s=30)
    eventually(lambda: not cluster.groups("uid_*"), lambda: str(cluster.groups("uid_*/*")), limit_s=15)


def group_of(process: psutil.Process, kind: str) -> str:
    match = re.search(rf"^\d+:{kind}:(.*)$", Path(f"/proc/{process.pid}/cgroup").read_text(), re.MULTILINE)
    assert match is not None
    return match[1]


def started(cluster: Bound, user: User, *options: str) -> str:
    job = user.submit(WAITS, *options)
    eventually((user.home / "runs").exists, lambda: f"the script runs: {user.errors('job.sh', job)}")
    return job


@pytest.mark.parametrize("asked", [ONE, pytest.param(TWO, marks=pytest.mark.slow)])
def test_guests_are_bound_as_their_job_is_and_outlive_its_first_signal(
    cluster: Bound, user: User, asked: tuple[str, ...]
) -> None:
    job = started(cluster, user, *asked)
    guests = cluster.guests()
    nodes = cluster.nodes if asked == TWO else cluster.nodes[:1]
    places = [f"/slurm_{node}/uid_{user.uid}/job_{job}/vtorque" for node in nodes]
    for kind in ("memory", "cpuset", "freezer"):  # cpuacct is made for tasks only, of which newer sisters have none
        assert sorted(group_of(guest, kind) for guest in guests) == places
    for guest in guests:
        place = group_of(guest, "memory").rpartition("/")[0]
        limit = int((GROUPS / "memory" / place[1:] / "memory.limit_in_bytes").read_text())
        assert limit == (HOST_MEMORY_MIB + 200) << 20
        cpus = (GROUPS / "cpuset" / place[1:] / "cpuset.cpus").read_text().strip()
        threads = [os.sched_getaffinity(thread.id) for thread in guest.threads()]
        assert all(bound == {int(cpus)} for bound in threads), (cpus, threads)
    cluster.client("qdel", job)
    eventually((user.home / "told").exists, "the script is told, in a guest that lives", limit_s=60)
    cluster.wait(job)
    assert "root-epilogue 0 vn1-1\n" in (user.home / "hooks").read_text(), "the VM epilogue has had its time"


@pytest.mark.slow
def test_a_job_that_ends_by_itself(cluster: Bound, user: User) -> None:
    done = user.job("grep -c . /proc/self/cgroup >/dev/null; hostname\n", *TWO)
    assert (done.status, done.out, done.err) == (0, "vn1-1\n", ""), done


@pytest.mark.slow
def test_a_guest_whose_agent_is_killed(cluster: Bound, user: User) -> None:
    job = started(cluster, user, *ONE)
    (agent,) = cluster.processes("libexec/vtorque-agent")
    (guest,) = cluster.guests()
    os.kill(agent.pid, signal.SIGKILL)
    guest.wait(30)
    assert cluster.wait(job) != 0


@pytest.mark.slow
def test_a_job_that_is_queued_again(cluster: Bound, user: User) -> None:
    job = started(cluster, user, *TWO)
    (user.home / "runs").unlink()
    cluster.client("qrerun", job)
    eventually((user.home / "told").exists, "the script is told", limit_s=60)
    eventually((user.home / "runs").exists, "the script runs again")
    assert len(cluster.guests()) == 2
    assert {group_of(guest, "memory").rpartition("/")[2] for guest in cluster.guests()} == {"vtorque"}
    cluster.client("qdel", job)
    cluster.wait(job)
