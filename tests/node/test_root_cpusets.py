"""The cpuset that TORQUE makes for a job, made for real where the kernel's cpusets (cgroup v1) are mounted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmgr.topology.allowed import allowed_for, job_cpuset, read_allowed
from vmgr.topology.read import read_topology

CPUSETS = Path("/sys/fs/cgroup/cpuset")
JOB = "424242.vt-test.example"


@pytest.fixture
def cpuset() -> Iterator[Path]:
    """An empty cpuset torque/<job id>; what was made of it is removed."""
    if not (CPUSETS / "cpuset.cpus").exists() or not os.access(CPUSETS, os.W_OK):
        pytest.skip(f"no cpusets at {CPUSETS}")
    made = [folder for folder in (CPUSETS / "torque", CPUSETS / "torque" / JOB) if not folder.exists()]
    for folder in made:
        folder.mkdir()
        for file in ("cpuset.mems", "cpuset.cpus"):  # a new cpuset has none
            (folder / file).write_text((folder.parent / file).read_text())
    try:
        yield made[-1]
    finally:
        for folder in reversed(made):
            folder.rmdir()
        assert not (CPUSETS / "torque" / JOB).exists()


def test_a_jobs_own_cpuset(cpuset: Path) -> None:
    machine = read_topology()
    last = machine.cpus[-1].number
    (cpuset / "cpuset.cpus").write_text(f"{last}\n")
    found = allowed_for(machine, groups=[f"torque/{JOB}"], assigned=frozenset({machine.cpus[0].number}))
    assert found.cpus == {last}
    if len(machine.cpus) > 1:
        assert found.source == f"the cpuset /torque/{JOB}"
    assert job_cpuset(machine, ["torque/424243.vt-test.example"]) is None


def test_a_process_in_a_cpuset(cpuset: Path) -> None:
    """What a process of the job may use, asked by one that has joined the job's cpuset."""
    machine = read_topology()
    last = machine.cpus[-1].number
    (cpuset / "cpuset.cpus").write_text(f"{last}\n")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            (cpuset / "tasks").write_text(f"{os.getpid()}\n")
            found = read_allowed(machine)
            os.write(writing, f"{sorted(found.cpus)} {found.source}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    source = f"the cpuset /torque/{JOB}" if len(machine.cpus) > 1 else "the node"
    assert said == f"[{last}] {source}"
