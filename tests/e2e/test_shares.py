"""Whole jobs on shares of kind virtiofs: their file servers live with the guest, as the user, and end with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import CONFIG, Site, User, eventually, on_engine, served

ENGINES = ("local", "slurm", "torque")
OWN = CONFIG.replace('target: "{{home}}"}}', 'target: "{{home}}", kind: virtiofs}}').replace(
    "target: /opt-hpc, readonly: true}}", "target: /opt-hpc, readonly: true, kind: virtiofs}}"
)
STAYS = "touch started; while [ ! -e go ]; do sleep 0.2; done\n"


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with on_engine(request.param, OWN) as here:
        yield here


def test_a_job_on_virtiofs(site: Site, user: User) -> None:
    script = """
findmnt -n -o FSTYPE "$HOME" 2>/dev/null || awk -v home="$HOME" '$2 == home { print $3 }' /proc/mounts
cat /opt-hpc/software
echo mine >made; chmod 640 made; stat -c '%U %a' made
touch /opt-hpc/x 2>/dev/null && echo wrote
"""
    done = user.job(script)
    assert (done.err, done.out) == ("", f"virtiofs\nof the cluster\n{user.name} 640\n"), done
    info = (user.home / "made").stat()
    assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (user.uid, user.gid, 0o640)
    assert not list((site.root / "opt").glob("x")) and not served(user)


def test_its_servers_are_the_users_and_off_the_vcpus(site: Site, user: User) -> None:
    job = user.submit(STAYS)
    eventually(lambda: (user.home / "started").exists(), "the job runs")
    found, qemu = site.of_agents("virtiofsd"), site.qemu()
    assert len(found) == 2 and qemu is not None
    vcpu = next(
        os.sched_getaffinity(int(task.name))
        for task in Path(f"/proc/{qemu.pid}/task").iterdir()
        if (task / "comm").read_text().startswith("CPU 0")
    )
    for server in found:
        assert set(server.uids()) == {user.uid} and set(server.gids()) == {user.gid}
        cpus = set(server.cpu_affinity())
        assert cpus and (not cpus & vcpu or len(os.sched_getaffinity(0)) == 1)
    user.write("go", "")
    assert site.wait(job) == 0
    eventually(lambda: not served(user), "they have ended", 10)


def test_a_guest_whose_file_server_dies_does_not_stand_still(site: Site, user: User) -> None:
    job = user.submit(STAYS)
    eventually(lambda: (user.home / "started").exists(), "the job runs")
    site.of_agents("virtiofsd")[0].kill()
    assert site.wait(job) == 76
    errors = user.output(f"job.sh.e{job.partition('.')[0]}")
    assert "VT-GUEST" in errors and "file server of the share" in errors and "killed by signal 9" in errors, errors
    eventually(lambda: not served(user), "they have ended", 10)


def test_servers_end_with_a_deleted_job(site: Site, user: User) -> None:
    job = user.submit(STAYS)
    eventually(lambda: len(site.of_agents("virtiofsd")) == 2, "the servers run")
    assert site.client("qdel", job).returncode == 0
    site.wait(job)
    eventually(lambda: not served(user), "they have ended", 10)
