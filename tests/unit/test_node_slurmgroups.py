"""Where Slurm's control groups are, and when a job has all of its own: recorded trees of both versions."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.node import owngroup, record, slurmfacts, slurmgroups
from vmgr.node.jobgroup import find_groups
from vmgr.node.slurmgroups import awaited, deepest, group_paths, has_begun, makes_groups

SLUID = "s7Q2NDHTJ10800"
PATHS = group_paths("n1", 4711, 12, SLUID)


class Recorded:
    """A tree of control groups as Slurm has them on the node n1, and the mounts that lead there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mounts = folder / "mounts"

    def group(self, path: str, processes: str = "") -> Path:
        group = self.folder / path
        for each in reversed([group, *group.parents]):
            if self.folder in each.parents and not each.exists():
                each.mkdir()
                (each / "cgroup.procs").write_text("")
        (group / "cgroup.procs").write_text(processes)
        return group


class Version1(Recorded):
    root = "slurm_n1"
    job = "uid_4711/job_12"
    last = "step_extern"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        kinds = ("memory", "cpuset", "freezer")
        self.tops = {kind: folder / kind for kind in kinds}
        self.mounts.write_text(
            "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n"
            + "".join(f"cgroup {top} cgroup rw,relatime,{kind} 0 0\n" for kind, top in self.tops.items())
        )
        for kind in ("memory", "freezer"):
            self.group(f"{kind}/{self.root}")

    def step(self, processes: str = "") -> Path:
        for kind in ("memory", "cpuset"):
            self.group(f"{kind}/{self.root}/{self.job}/step_extern")
        return self.group(f"freezer/{self.root}/{self.job}/step_extern", processes)


class Version2(Recorded):
    root = "system.slice/n1_slurmstepd.scope"
    job = "job_12"
    last = "step_extern/user/task_4294967293"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.mounts.write_text(f"cgroup2 {folder / 'unified'} cgroup2 rw,nsdelegate 0 0\n")
        self.group(f"unified/{self.root}/system")

    def step(self, processes: str = "") -> Path:
        job = f"unified/{self.root}/{self.job}"
        self.group(f"{job}/step_extern/slurm", "77\n")
        return self.group(f"{job}/{self.last}", processes)


class Newer(Version2):
    root = "system.slice/slurmstepd.scope"
    job = SLUID


@pytest.fixture(params=[Version1, Version2, Newer])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Recorded:
    found: Recorded = request.param(tmp_path)
    return found


def test_a_job_whose_groups_are_made_one_by_one(tree: Recorded) -> None:
    """It has begun with the first process of the step `extern`, on the way to which there is always a folder."""
    groups = awaited(PATHS, tree.mounts)
    assert len({group.path.root for group in groups}) == 1 and not has_begun(groups)
    assert str(deepest(groups)).endswith(tree.root)
    tree.step()
    assert not has_begun(groups), "nothing is in it, and its bounds are perhaps not set"
    assert str(deepest(groups)).endswith(f"{tree.root}/{tree.job}/{tree.last}")
    tree.step("4711\n")
    assert has_begun(groups)
    for group in find_groups(PATHS, tree.mounts):
        assert group.folder.is_dir() and group.path.path == f"{tree.root}/{tree.job}"


def test_the_wait_ends_with_the_first_process(tree: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """By events alone: nothing is looked at again meanwhile."""
    monkeypatch.setattr(slurmgroups, "LOOK_AGAIN_SECONDS", 3600.0)
    groups = awaited(PATHS, tree.mounts)

    async def work() -> None:
        waiting = asyncio.ensure_future(slurmgroups._begun(groups))
        for processes in ("", "4711\n"):
            await asyncio.wait([waiting], timeout=0.05)
            assert not waiting.done()
            tree.step(processes)
        await asyncio.wait_for(waiting, 20)

    asyncio.run(work())


@pytest.mark.parametrize(("kind", "locks"), [(Version1, {"memory", "cpuset", "freezer"}), (Version2, {Version2.root})])
def test_guests_groups_are_written_down_before_they_are_made(
    tmp_path: Path, kind: type[Recorded], locks: set[str]
) -> None:
    """With what Slurm locks meanwhile: of version 1 a whole hierarchy, of version 2 its own part."""
    tree = kind(tmp_path)
    tree.step("4711\n")
    place = record.Place(tmp_path, tmp_path / "socket")
    lists = owngroup.make_group(PATHS, place, tree.mounts).lists
    assert lists and all(str(path.parent).endswith(f"{tree.root}/{tree.job}/vtorque") for path in lists)
    steps = [*record.steps(place)]
    assert [step["path"] for step in steps] == [str(path.parent) for path in lists]
    assert {step["root"].endswith(f"/{tree.root}") for step in steps} == {True}
    top = tmp_path / "unified" if kind is Version2 else tmp_path
    assert {Path(step["lock"]).relative_to(top).as_posix() for step in steps} == locks
    for step in steps:
        assert Path(step["path"]).is_dir()
        owngroup.undo_group(step, 1.0)
        assert not Path(step["path"]).exists() and Path(step["path"]).parent.exists()


def test_another_jobs_groups_are_not_waited_for(tree: Recorded) -> None:
    tree.step("4711\n")
    for paths in (group_paths("n1", 4711, 13, None), group_paths("n1", 4712, 13, SLUID[:-1] + "1")):
        assert not has_begun(awaited(paths, tree.mounts)) and not find_groups(paths, tree.mounts)


def test_a_slurm_without_groups_is_not_waited_for(tmp_path: Path) -> None:
    tree = Version1(tmp_path)
    (tmp_path / "freezer" / "slurm_n1" / "cgroup.procs").unlink()
    (tmp_path / "freezer" / "slurm_n1").rmdir()
    assert awaited(PATHS, tree.mounts) == []
    other = tmp_path / "other"
    other.mkdir()
    assert awaited(group_paths("n2", 4711, 12, SLUID), Version1(other).mounts) == []


@pytest.mark.parametrize(
    ("text", "makes"),
    [
        ("ProctrackType=proctrack/cgroup\nPrologFlags=Contain,DeferBatch\n", True),
        ("proctracktype=PROCTRACK/cgroup\nprologflags=alloc, \n", False),
        ("ProctrackType=proctrack/cgroup\nPrologFlags=x11\n", True),
        ("ProctrackType=proctrack/cgroup\nPrologFlags=Alloc,DeferBatch\n", False),
        ("ProctrackType=proctrack/cgroup\n", False),
        ("ProctrackType=proctrack/linuxproc\nPrologFlags=Contain\n", False),
        ("PrologFlags=Contain\n", False),
        ("what is this\n", False),
        (None, False),
    ],
)
def test_what_slurm_conf_says(tmp_path: Path, text: str, makes: bool) -> None:
    conf = tmp_path / "slurm.conf"
    if text is not None:
        conf.write_text(text)
    assert makes_groups({"SLURM_CONF": str(conf)}) is makes


def test_groups_that_do_not_come_are_waited_for_no_longer_than_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tree = Version1(tmp_path)
    monkeypatch.setattr(slurmgroups, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(slurmgroups, "awaited", lambda paths: awaited(paths, tree.mounts))
    conf = tmp_path / "slurm.conf"
    conf.write_text("ProctrackType=proctrack/cgroup\nPrologFlags=Contain\n")
    place = record.Place(tmp_path, tmp_path / "socket")
    found = asyncio.run(slurmgroups.guests_group(PATHS, place, {"SLURM_CONF": str(conf)}))
    assert found.lists == () and not (tmp_path / "record").exists()
    assert "Slurm has made no control groups within" in caplog.text


@FUZZ
@given(
    st.fixed_dictionaries({
        "SLURM_JOB_UID": st.one_of(st.text(max_size=12), st.just("4711"), st.just("../..")),
        "SLURM_JOB_SLUID": st.one_of(st.text(max_size=20), st.just(SLUID), st.just("../../etc")),
    }),
    st.text(max_size=30),
    st.integers(1, 10**9),
)  # fmt: skip
def test_no_name_leads_out_of_slurms_groups(tmp_path: Path, environ: dict[str, str], node: str, number: int) -> None:
    mounts = tmp_path / "mounts"
    if not mounts.exists():
        Version1(tmp_path).step("1\n")
    for path in slurmfacts._groups(environ, node, number):
        for group in [*awaited([path], mounts), *find_groups([path], mounts)]:
            assert group.folder.resolve().is_relative_to((group.hierarchy.mount / path.root).resolve())
            assert ".." not in group.path.path.split("/")
