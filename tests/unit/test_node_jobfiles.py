"""The job directory at the job's end, and the members of an array that share one."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
from pathlib import Path
from typing import Any, Optional

import pytest
from nodesite import a_spec

from vmgr.jobspec import SpecPath, dump_spec, spec_hash
from vmgr.node import jobfiles
from vmgr.node.hookargs import member_index
from vmgr.node.jobfiles import JobFiles, own_name, status_name


def submitted(home: Path, *, alter: bool = False, **fields: Any) -> SpecPath:
    """A job directory as `vsub` makes it."""
    data = dump_spec(a_spec(**fields))
    path = SpecPath(str(home), "0123456789abcdef", spec_hash(data))
    Path(path.directory).mkdir(parents=True)
    Path(path.directory, "spec.json").write_bytes(data + b" " if alter else data)
    return path


def outer(path: SpecPath) -> Path:
    return Path(path.directory).parent


@pytest.mark.parametrize(
    ("job_id", "name", "status"),
    [
        ("12.host", "run.n1.7-8", "status.n1.json"),
        ("12[3].host", "run.3.n1.7-8", "status.3.n1.json"),
        ("12[0].host", "run.0.n1.7-8", "status.0.n1.json"),
        ("12-4.host", "run.4.n1.7-8", "status.4.n1.json"),
        ("", "run.n1.7-8", "status.n1.json"),
    ],
)
def test_names(job_id: str, name: str, status: str) -> None:
    assert own_name("run", member_index(job_id), "n1", "7-8") == name
    member = member_index(job_id)
    assert status_name(None if member is None else str(member), "n1") == status


def test_a_job_that_nobody_waits_for_takes_its_directory_away(tmp_path: Path) -> None:
    path = submitted(tmp_path)
    JobFiles(path, None).leave(3, None)
    assert not outer(path).exists() and outer(path).parent.is_dir()


@pytest.mark.parametrize(("job_id", "name"), [("12.host", "result.json"), ("12[7].host", "result.7.json")])
def test_the_result_for_who_waits(job_id: str, name: str, tmp_path: Path) -> None:
    path = submitted(tmp_path, keep=True, array="7" if "[" in job_id else None)
    JobFiles(path, member_index(job_id)).leave(76, "VT-GUEST")
    assert json.loads(Path(path.directory, name).read_text()) == {"v": 1, "status": 76, "code": "VT-GUEST"}
    assert sorted(file.name for file in Path(path.directory).iterdir()) == [name, "spec.json"]


def test_an_altered_specification_says_nothing(tmp_path: Path) -> None:
    path = submitted(tmp_path, alter=True, keep=True)
    files = JobFiles(path, None)
    assert files.spec is None
    files.leave(71, "VT-SPEC")
    assert not outer(path).exists()


@pytest.mark.parametrize("array", ["0-4", "3,0,4,1-2", "00-04"])
def test_the_last_member_takes_the_directory_away(array: str, tmp_path: Path) -> None:
    path = submitted(tmp_path, array=array)
    order = list(range(5))
    random.Random(array).shuffle(order)
    for number, index in enumerate(order):
        assert outer(path).is_dir(), f"gone after {number} of 5"
        JobFiles(path, index).leave(0, None)
    assert not outer(path).exists()


def test_a_member_that_ended_twice_counts_once(tmp_path: Path) -> None:
    path = submitted(tmp_path, array="1-2")
    for _ in range(3):
        JobFiles(path, 1).leave(0, None)
    assert outer(path).is_dir()


@pytest.mark.parametrize(
    ("job_id", "array", "alter"),
    [("12[9].host", "1-2", False), ("12[1].host", None, False), ("12[1].host", "1", True), ("12.host", "1", True)],
)
def test_who_does_not_know_all_members_leaves_the_directory(
    job_id: str, array: Optional[str], alter: bool, tmp_path: Path
) -> None:
    path = submitted(tmp_path, array=array, alter=alter)
    JobFiles(path, member_index(job_id)).leave(0, None)
    assert outer(path).is_dir() is (job_id != "12.host")


def test_a_mark_that_cannot_be_made_leaves_it_to_the_sweep(tmp_path: Path) -> None:
    path = submitted(tmp_path, array="1")
    files = JobFiles(path, 1)
    shutil.rmtree(path.directory)
    files.leave(0, None)
    assert outer(path).is_dir()


def _member(path: SpecPath, index: int, start: Any) -> None:
    files = JobFiles(path, index)
    start.wait(30)
    files.leave(0, None)


@pytest.mark.parametrize("attempt", range(5))
def test_members_that_end_at_once(attempt: int, tmp_path: Path) -> None:
    path = submitted(tmp_path, array="0-3")
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    children = [context.Process(target=_member, args=(path, index, start)) for index in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert not outer(path).exists()


def test_a_folder_that_is_written_to_while_it_is_removed_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "x" / "y"
    folder.mkdir(parents=True)
    removed, times = shutil.rmtree, []

    def interrupted(path: Path, *, ignore_errors: bool) -> None:
        removed(path, ignore_errors=ignore_errors)
        times.append(1)
        if len(times) == 1:
            folder.mkdir(parents=True)
            (folder / "status.node.json").write_text("{}")

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    jobfiles.remove(tmp_path / "x")
    assert not (tmp_path / "x").exists() and len(times) == 2


def test_a_folder_that_cannot_be_removed_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(jobfiles, "REMOVE_PAUSE_SECONDS", 0.0)
    jobfiles.remove(tmp_path)
    assert tmp_path.exists()
