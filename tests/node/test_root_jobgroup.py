"""A process goes into the control groups that a batch system has made for its job: real groups, of version 1 here."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmgr.errors import VTorqueError
from vmgr.node import process
from vmgr.node.hookcall import GroupPath
from vmgr.node.jobgroup import JobGroup, find_group

pytestmark = pytest.mark.root
HIERARCHIES = [Path("/sys/fs/cgroup", name) for name in ("cpuset", "memory")]
NOBODY = 65534
PYTHON = "/usr/bin/python3"
"""One that every user can run: that of the tests may lie in a home of root's."""


@pytest.fixture
def job_id() -> Iterator[str]:
    if os.geteuid() != 0:
        pytest.skip("needs root: makes control groups")
    if not all((hierarchy / "cgroup.procs").exists() for hierarchy in HIERARCHIES):
        pytest.skip("this machine has no control groups of version 1 for CPUs and memory")
    job_id = f"{secrets.randbelow(10**9)}.host"
    parents = [hierarchy / "torque" for hierarchy in HIERARCHIES]
    made = [parent for parent in parents if not parent.exists()]
    groups = [parent / job_id for parent in parents]
    for group in groups:
        group.mkdir(parents=True)
    for group in (parents[0], groups[0]):
        for name in ("cpuset.cpus", "cpuset.mems"):
            (group / name).write_text("0")
    try:
        yield job_id
    finally:
        assert all((group / "cgroup.procs").read_text() == "" for group in groups)
        for folder in (*groups, *made):
            folder.rmdir()


def groups_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return {fields[1]: fields[2] for fields in (line.split(":", 2) for line in lines)}


def test_a_child_is_in_its_groups_before_its_program_starts(job_id: str) -> None:
    group = find_group([GroupPath("torque", job_id)])
    assert len(group.lists) == 2
    script = "import sys; print(open('/proc/self/cgroup').read()); import os; print(sorted(os.sched_getaffinity(0)))"
    with group.opened() as joins:
        said = subprocess.run(
            [PYTHON, "-c", script],
            user=NOBODY,
            group=NOBODY,
            preexec_fn=process.dies_with(os.getpid(), joins),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
    assert f"cpuset:/torque/{job_id}\n" in said and f"memory:/torque/{job_id}\n" in said
    assert said.splitlines()[-1] == "[0]"
    assert groups_of(os.getpid())["cpuset"] != f"/torque/{job_id}"


def test_a_process_is_added_with_its_threads(job_id: str) -> None:
    script = (
        "import threading, sys; t = threading.Thread(target=sys.stdin.read); t.start(); print(flush=True); t.join()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin and child.stdout
        child.stdout.readline()
        find_group([GroupPath("torque", job_id)]).add(child.pid)
        for tid in process.threads(child.pid):
            assert groups_of(tid)["cpuset"] == f"/torque/{job_id}"
            assert os.sched_getaffinity(tid) == {0}
        child.stdin.close()
    find_group([GroupPath("torque", job_id)]).add(child.pid)  # gone: nothing to do


def test_a_job_without_groups_stays_where_it_is(job_id: str) -> None:
    group = find_group([GroupPath("torque", f"1{job_id}")])
    assert group == JobGroup()
    group.add(os.getpid())
    with group.opened() as joins:
        assert joins == []


def test_what_the_kernel_refuses_is_said(job_id: str) -> None:
    folder = HIERARCHIES[0] / "torque" / job_id / "empty"
    folder.mkdir()  # a cpuset without CPUs takes no process
    try:
        with pytest.raises(VTorqueError, match=f"go into the job's control group {folder}/cgroup.procs: "):
            JobGroup((folder / "cgroup.procs",)).add(os.getpid())
    finally:
        folder.rmdir()


def test_an_id_that_is_a_path_has_no_groups(job_id: str) -> None:
    for other in (f"../torque/{job_id}", f"x/../{job_id}", "..", "."):
        assert find_group([GroupPath("torque", other)]) == JobGroup()
