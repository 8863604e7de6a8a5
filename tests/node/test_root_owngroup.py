"""Guests' own groups below those that Slurm makes for a job: real groups, of version 1 here, made as Slurm does."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmgr.node import process, record, slurmgroups
from vmgr.node.hookcall import GroupPath
from vmgr.node.jobgroup import JobGroup
from vmgr.node.owngroup import make_group
from vmgr.node.slurmgroups import signs, slurms_root
from vmgr.node.undo import undo

pytestmark = pytest.mark.root
TOPS = [Path("/sys/fs/cgroup", name) for name in ("cpuset", "memory", "freezer")]
NOBODY = 65534


class Job:
    """A job's groups on a node of a name that no other test has."""

    def __init__(self, folder: Path) -> None:
        self.root = f"slurm_vt{secrets.token_hex(4)}"
        self.paths = (GroupPath(self.root, "uid_4711/job_12"), GroupPath("slurm", "uid_4711/job_12"))
        self.place = record.Place(folder / "attempt", folder / "socket")
        self.place.folder.mkdir()

    def make(self, inner: str) -> None:
        for top in TOPS:
            (top / self.root / inner).mkdir(parents=True, exist_ok=True)
        for folder in self.folders("."):
            for name in ("cpuset.mems", "cpuset.cpus"):
                if folder.is_relative_to(TOPS[0]):
                    (folder / name).write_text((folder.parent / name).read_text())

    def folders(self, inner: str) -> list[Path]:
        """Of each hierarchy, with what is below them."""
        return [Path(each) for top in TOPS for each, _, _ in os.walk(top / self.root / inner)]

    def left(self) -> set[str]:
        return {str(folder.relative_to(top / self.root)) for top in TOPS for folder in self.folders(".") if
                folder.is_relative_to(top)}  # fmt: skip

    def remove(self) -> None:
        for folder in reversed(self.folders(".")):
            folder.rmdir()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    if os.geteuid() != 0:
        pytest.skip("needs root: makes control groups")
    if not all(os.access(top / "cgroup.procs", os.W_OK) for top in TOPS):
        pytest.skip("this machine has no control groups of version 1 for CPUs, memory and freezing")
    found = Job(tmp_path)
    found.make("uid_4711/job_12/step_extern")
    try:
        yield found
    finally:
        found.remove()


def sleeper(group: JobGroup) -> subprocess.Popen[bytes]:
    with group.opened() as joins:
        return subprocess.Popen(
            ["/bin/sleep", "300"], user=NOBODY, group=NOBODY, extra_groups=[],
            preexec_fn=process.dies_with(os.getpid(), joins),
        )  # fmt: skip


def ends(job: Job) -> None:
    """The last step of the job ends: Slurm removes what is empty."""
    for top in TOPS:
        (top / job.root / "uid_4711/job_12/step_extern").rmdir()


def test_a_guest_is_in_all_of_them_and_nothing_stays(job: Job) -> None:
    group = make_group(job.paths, job.place)
    assert [path.parent.name for path in group.lists] == ["vtorque"] * 3
    with sleeper(group) as child:
        try:
            group.add(child.pid)
            text = Path(f"/proc/{child.pid}/cgroup").read_text()
            for top in TOPS:
                assert f":{top.name}:/{job.root}/uid_4711/job_12/vtorque\n" in text
            ends(job)  # before ours, as on a sister: what is above it has to be left
            assert undo(job.place) == []
        finally:
            child.kill()
    assert job.left() == {"."} and not job.place.folder.exists()


def test_the_jobs_bound_on_memory_holds_and_is_told(job: Job) -> None:
    (TOPS[1] / job.root / "uid_4711/job_12/memory.limit_in_bytes").write_text(str(64 << 20))
    group = make_group(job.paths, job.place)
    with group.opened() as joins:
        done = subprocess.run(
            ["/usr/bin/python3", "-c", "print(len(bytearray(200 << 20)))"], user=NOBODY, group=NOBODY, extra_groups=[],
            preexec_fn=process.dies_with(os.getpid(), joins),
        )  # fmt: skip
    assert done.returncode == -9 and group.has_run_out()
    assert undo(job.place) == []


def test_what_the_job_still_needs_is_left_to_slurm(job: Job) -> None:
    make_group(job.paths, job.place)
    assert undo(job.place) == []
    assert job.left() == {".", "uid_4711", "uid_4711/job_12", "uid_4711/job_12/step_extern"}


def test_an_undoing_that_was_cut_short_is_taken_up(job: Job) -> None:
    lists = make_group(job.paths, job.place).lists
    ends(job)
    for path in lists:
        path.parent.rmdir()
        path.parent.parent.rmdir()
    assert undo(job.place) == [] and job.left() == {"."}


def test_another_job_of_the_user_goes_on(job: Job) -> None:
    make_group(job.paths, job.place)
    job.make("uid_4711/job_13/step_0")
    ends(job)
    assert undo(job.place) == []
    assert job.left() == {".", "uid_4711", "uid_4711/job_13", "uid_4711/job_13/step_0"}


def test_slurms_lock_is_waited_for_within_a_bound(job: Job) -> None:
    """Every user can take it: then the janitor comes again."""
    make_group(job.paths, job.place)
    ends(job)
    fd = os.open(TOPS[1], os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert undo(job.place, patience_s=0.2) == [f"group: {TOPS[1]} is locked by another process"]
    finally:
        os.close(fd)
    assert undo(job.place) == [] and job.left() == {"."}


def test_a_job_that_is_over_has_none(job: Job) -> None:
    ends(job)
    job.remove()
    assert make_group(job.paths, job.place) == JobGroup()
    job.make(".")
    assert undo(job.place) == []


def test_the_jobs_groups_are_noticed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of them: nothing is looked at again meanwhile."""
    monkeypatch.setattr(slurmgroups, "LOOK_AGAIN_SECONDS", 3600.0)
    ends(job)
    job.remove()
    (TOPS[2] / job.root).mkdir()
    root = slurms_root(job.paths)
    assert root is not None and root.name == job.root
    cpuset = TOPS[0] / job.root / "uid_4711/job_12"

    def bind() -> None:
        for folder in (cpuset.parent.parent, cpuset.parent, cpuset):
            for name in ("cpuset.cpus", "cpuset.mems"):
                (folder / name).write_text((folder.parent / name).read_text())

    async def work() -> None:
        waiting = asyncio.ensure_future(slurmgroups._all_there(signs(job.paths, root, frozenset({"cpuset", "memory"}))))
        folders = [top / job.root / "uid_4711/job_12/step_extern" for top in (TOPS[2], TOPS[0], TOPS[1])]
        for step in (*(lambda folder=folder: folder.mkdir(parents=True) for folder in folders), bind):
            await asyncio.wait([waiting], timeout=0.05)
            assert not waiting.done()
            step()
        await asyncio.wait_for(waiting, 20)

    asyncio.run(work())
