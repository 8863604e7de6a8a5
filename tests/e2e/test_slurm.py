"""Guest jobs on a real Slurm: its daemons on simulated nodes, real guests."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from .conftest import User, eventually
from .slurmcluster import Slurm, found_programs, slurm_site
from .terminal import SHELL, terminal

pytestmark = pytest.mark.skipif(found_programs() is not None, reason=f"needs Slurm: {found_programs()} is missing")

TWO = ("vms_per_node=2",)
STAYS = "echo before; touch runs; sleep 300\n"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm_site() as site:
        yield site


@pytest.fixture(scope="module")
def site(cluster: Slurm) -> Slurm:
    """The installation whose users the tests are."""
    return cluster


@pytest.fixture(autouse=True)
def no_node_is_drained(cluster: Slurm) -> Iterator[None]:
    """Whatever a hook meets, it takes no node down."""
    yield
    states = cluster.states()
    assert all(re.match("IDLE|COMPLETING|MIXED|ALLOCATED", state) and "DRAIN" not in state for state in states.values())


def test_a_job_on_one_node(cluster: Slurm, user: User) -> None:
    script = (
        "#PBS -N other\n"
        "hostname; id -un; pwd\n"
        "echo $PBS_JOBID $PBS_JOBNAME $PBS_QUEUE $PBS_O_WORKDIR $PBS_ENVIRONMENT; cat $PBS_NODEFILE\n"
        "echo $SLURM_JOB_ID ${SLURM_NODELIST-none} ${SLURM_JOBID-none}; echo oops >&2; exit 3\n"
    )
    job = cluster.submit(user, script)
    assert cluster.wait(job) == 3
    number = job.partition(".")[0]
    assert cluster.output(user, job).splitlines() == [
        "vn1-1", user.name, str(user.home), f"{job} job.sh batch {user.home} PBS_BATCH", "vn1-1", f"{number} none none",
    ]  # fmt: skip
    assert cluster.output(user, job, "e") == "oops\n"
    assert cluster.reached("n1", job, "gone"), "its agent has ended by itself, not by the Epilog"
    assert not list((user.home / ".vtorque").iterdir())
