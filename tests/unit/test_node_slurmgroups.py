"""Where Slurm's control groups are, and when a job has all of its own: recorded trees of both versions."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.node import owngroup, record, slurmfacts, slurmgroups
from vmgr.node.jobgroup import Hierarchy, find_groups, hierarchies
from vmgr.node.slurmgroups import Root, bounds, group_paths, signs, slurms_root

SLUID = "s7Q2NDHTJ10800"
PATHS = group_paths("n1", 4711, 12, SLUID)


class Recorded:
    """Control groups as Slurm makes them for a job on the node n1, one after the other, and the mounts that lead there.

    `made` are those of a job in the order of their making, and then its bounds: a path, and the text that comes there.
    """

    root: str
    job: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mounts = folder / "mounts"
        self.made: list[tuple[str, str]] = []

    def group(self, path: str) -> None:
        group = self.folder / path
        for each in reversed([group, *group.parents]):
            if self.folder in each.parents and not each.exists():
                each.mkdir()
                for name in ("cgroup.procs", "cpuset.cpus", "cpuset.mems"):
                    (each / name).write_text("")

    def make(self, path: str, text: str) -> None:
        self.group(path.rpartition("/")[0] if text else path)
        if text:
            (self.folder / path).write_text(text)

    def finish(self) -> None:
        for path, text in self.made:
            self.make(path, text)


class Version1(Recorded):
    root = "slurm_n1"
    job = "uid_4711/job_12"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        kinds = ("memory", "cpuset", "freezer")
        self.mounts.write_text(
            "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n"
            + "".join(f"cgroup {folder / kind} cgroup rw,relatime,{kind} 0 0\n" for kind in kinds)
        )
        for kind in ("memory", "freezer"):
            self.group(f"{kind}/{self.root}")
        self.group("cpuset")
        inner = f"{self.root}/{self.job}"
        self.made = [
            (f"freezer/{inner}/step_extern", ""), (f"cpuset/{inner}/step_extern", ""),
            (f"cpuset/{inner}/cpuset.cpus", "1\n"), (f"cpuset/{inner}/cpuset.mems", "0\n"),
            (f"memory/{inner}/step_extern", ""),
        ]  # fmt: skip


class Version2(Recorded):
    root = "system.slice/n1_slurmstepd.scope"
    job = "job_12"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.mounts.write_text(f"cgroup2 {folder / 'unified'} cgroup2 rw,nsdelegate 0 0\n")
        self.group(f"unified/{self.root}/system")
        inner = f"unified/{self.root}/{self.job}"
        self.made = [(f"{inner}/step_extern/slurm", ""), (f"{inner}/cpuset.cpus", "1\n")]


class Newer(Version2):
    root = "system.slice/slurmstepd.scope"
    job = SLUID


BOUND = frozenset({"cpuset", "memory"})


@pytest.fixture(params=[Version1, Version2, Newer])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Recorded:
    found: Recorded = request.param(tmp_path)
    return found


def root_of(tree: Recorded) -> Root:
    found = slurms_root(PATHS, tree.mounts)
    assert found is not None and found.name == tree.root
    return found


def test_a_job_whose_groups_are_made_one_by_one(tree: Recorded) -> None:
    """All are there with the last; on the way to each there is a folder."""
    waited = signs(PATHS, root_of(tree), BOUND, tree.mounts)
    for path, text in tree.made:
        assert not all(sign.is_there() for sign in waited), path
        for sign in waited:
            assert sign.nearest().is_dir() and sign.nearest() in [each for last in sign.folders for each in
                                                                  (last, *last.parents)]  # fmt: skip
        tree.make(path, text)
    assert all(sign.is_there() for sign in waited)
    for group in find_groups(PATHS, tree.mounts):
        assert group.folder.is_dir() and group.path.path == f"{tree.root}/{tree.job}"


def test_the_wait_ends_with_the_last(tree: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """By events alone: nothing is looked at again meanwhile."""
    monkeypatch.setattr(slurmgroups, "LOOK_AGAIN_SECONDS", 3600.0)

    async def work() -> None:
        waiting = asyncio.ensure_future(slurmgroups._all_there(signs(PATHS, root_of(tree), BOUND, tree.mounts)))
        for path, text in tree.made:
            await asyncio.wait([waiting], timeout=0.05)
            assert not waiting.done(), path
            tree.make(path, text)
        await asyncio.wait_for(waiting, 20)

    asyncio.run(work())


def test_what_does_not_bound_is_not_waited_for(tree: Recorded) -> None:
    path, text = tree.made[0]
    tree.make(path, text)
    assert all(sign.is_there() for sign in signs(PATHS, root_of(tree), frozenset(), tree.mounts))


@pytest.mark.parametrize(("kind", "locks"), [(Version1, {"memory", "cpuset", "freezer"}), (Version2, {Version2.root})])
def test_guests_groups_are_written_down_before_they_are_made(
    tmp_path: Path, kind: type[Recorded], locks: set[str]
) -> None:
    """With what Slurm locks meanwhile: of version 1 a whole hierarchy, of version 2 its own part."""
    tree = kind(tmp_path)
    tree.finish()
    place = record.Place(tmp_path, tmp_path / "socket")
    lists = owngroup.make_group(PATHS, place, tree.mounts).lists
    assert lists and all(str(path.parent).endswith(f"{tree.root}/{tree.job}/vtorque") for path in lists)
    steps = [*record.steps(place)]
    assert [step["path"] for step in steps] == [str(path.parent) for path in lists]
    assert {step["root"].endswith(f"/{tree.root}") for step in steps} == {True}
    top = tmp_path / "unified" if kind is Version2 else tmp_path
    assert {Path(step["lock"]).relative_to(top).as_posix() for step in steps} == locks
    for step in steps:
        for file in Path(step["path"]).iterdir():  # which a real group would have by itself
            assert file.read_text() == (Path(step["path"]).parent / file.name).read_text()
            file.unlink()
        owngroup.undo_group(step, 1.0)
        assert not Path(step["path"]).exists() and Path(step["path"]).parent.exists()


def test_another_jobs_groups_are_not_waited_for(tree: Recorded) -> None:
    tree.finish()
    for paths in (group_paths("n1", 4711, 13, None), group_paths("n1", 4712, 13, SLUID[:-1] + "1")):
        assert not any(sign.is_there() for sign in signs(paths, root_of(tree), BOUND, tree.mounts))
        assert not find_groups(paths, tree.mounts)


def test_a_slurm_without_groups_is_not_waited_for(tmp_path: Path) -> None:
    tree = Version1(tmp_path)
    assert slurms_root(group_paths("n2", 4711, 12, SLUID), tree.mounts) is None
    tree.mounts.write_text("tmpfs /sys/fs/cgroup tmpfs rw 0 0\n")
    assert slurms_root(PATHS, tree.mounts) is None


CONTAINED = "ProctrackType=proctrack/cgroup\nPrologFlags=Contain,DeferBatch\n"
TASKS = f"{CONTAINED}TaskPlugin=task/cgroup,task/affinity\n"


@pytest.mark.parametrize(
    ("text", "constrained", "bound"),
    [
        (TASKS, "ConstrainCores=yes\nconstrainramspace = TRUE\nConstrainDevices=no\n", {"cpuset", "memory"}),
        (TASKS, "ConstrainSwapSpace=1\nConstrainDevices=Yes\n", {"memory", "devices"}),
        (TASKS, None, set()),
        (TASKS, "what is this\n", None),
        (CONTAINED, "ConstrainCores=yes\n", set()),
        ("proctracktype=PROCTRACK/cgroup\nprologflags=alloc, \n", None, None),
        ("ProctrackType=proctrack/cgroup\nPrologFlags=x11\n", None, set()),
        ("ProctrackType=proctrack/cgroup\nPrologFlags=Alloc,DeferBatch\n", None, None),
        ("ProctrackType=proctrack/cgroup\n", None, None),
        ("ProctrackType=proctrack/linuxproc\nPrologFlags=Contain\n", None, None),
        ("PrologFlags=Contain\n", None, None),
        ("what is this\n", None, None),
        (None, "ConstrainCores=yes\n", None),
    ],
)
def test_what_the_configuration_says(
    tmp_path: Path, text: Optional[str], constrained: Optional[str], bound: Optional[set[str]]
) -> None:
    conf = tmp_path / "slurm.conf"
    for path, written in ((conf, text), (tmp_path / "cgroup.conf", constrained)):
        if written is not None:
            path.write_text(written)
    assert bounds({"SLURM_CONF": str(conf)}) == bound


def test_groups_that_do_not_come_are_waited_for_no_longer_than_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = Root(Hierarchy("cgroup", tmp_path / "freezer", frozenset({"freezer"})), "slurm_vtnowhere")
    (tmp_path / "freezer").mkdir()
    monkeypatch.setattr(slurmgroups, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(slurmgroups, "slurms_root", lambda paths: root)
    conf = tmp_path / "slurm.conf"
    conf.write_text(CONTAINED)
    place = record.Place(tmp_path, tmp_path / "socket")
    paths = group_paths("vtnowhere", 4711, 12, None)
    found = asyncio.run(slurmgroups.guests_group(paths, place, {"SLURM_CONF": str(conf)}))
    assert found.lists == () and not (tmp_path / "record").exists()
    assert "Slurm has not made its control groups within" in caplog.text


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
        Version1(tmp_path).finish()
    for path in slurmfacts._groups(environ, node, number):
        assert slurms_root([path], mounts) in (None, Root(hierarchies(mounts)[-1], "slurm_n1"))
        for group in find_groups([path], mounts):
            assert group.folder.resolve().is_relative_to((group.hierarchy.mount / path.root).resolve())
            assert ".." not in group.path.path.split("/")
