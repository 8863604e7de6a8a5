"""Which job a member of a job array was: noted by agents, found again by its owner and by root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgr import logs
from vmgr.report import members
from vmgr.report.members import Named, note, noted, parse_named

ME = os.geteuid()


def test_a_member_is_found_again(tmp_path: Path) -> None:
    note(tmp_path, "16_3", "19.ref", ME)
    note(tmp_path, "16_4", "16.ref", ME)
    note(tmp_path, "17_3", "20.ref", ME)
    assert noted(tmp_path, Named("16", "3"), "ref", ME) == noted(tmp_path, Named("16", "3"), "ref", None) == "19.ref"
    assert noted(tmp_path, Named("16", "4"), "ref", ME) == "16.ref"
    for other in (("16", "33", "ref", ME), ("1", "3", "ref", ME), ("16", "3", "re", ME), ("16", "3", "ref", ME + 1)):
        assert noted(tmp_path, Named(*other[:2]), *other[2:]) is None
    note(tmp_path, "16_3", "99.ref", ME)  # the numbers have begun anew
    assert noted(tmp_path, Named("16", "3"), "ref", ME) == "99.ref"


@pytest.mark.parametrize(
    "name", [None, 3, "", "16", "16_", "../16_3", "16_3/..", "16_3\n", "16_" + "3" * 11, ["16", "3"]]
)
def test_what_names_no_member_leaves_nothing(tmp_path: Path, name: object) -> None:
    note(tmp_path, name, "19.ref", ME)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_full_or_gone_is_no_matter_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note(tmp_path / "gone", "16_3", "19.ref", ME)
    monkeypatch.setattr(members, "MAX_BYTES", 20)
    for index in range(9):
        note(tmp_path, f"16_{index}", "19.ref", ME)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < 20 + len("8 19.ref\n") and path.stat().st_mode & 0o007 == 0


def test_what_is_no_such_file_names_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("3 19.ref\n")
    (tmp_path / f"16.ref{logs.MEMBERS}{ME}").symlink_to(tmp_path / "file")
    assert noted(tmp_path, Named("16", "3"), "ref", ME) is None
    (tmp_path / f"17.ref{logs.MEMBERS}{ME}").write_text("3 -x\n3 ../19.ref\n")
    assert noted(tmp_path, Named("17", "3"), "ref", ME) is None


def test_it_goes_with_the_logs_of_its_time(tmp_path: Path) -> None:
    for at, name in enumerate(
        ["a", "1.ref.log", f"1.ref{logs.MEMBERS}0", "2.ref.log", f"2.ref{logs.MEMBERS}0", "3.ref.log"]
    ):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (at, at))
    logs.drop_oldest(tmp_path, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.ref.log", f"2.ref{logs.MEMBERS}0", "3.ref.log", "a"]
    logs.drop_oldest(tmp_path, keep=3)
    assert len(list(tmp_path.iterdir())) == 4


@given(st.text(max_size=40))
def test_whatever_a_wrapper_says(text: str) -> None:
    named = parse_named(text)
    assert named is None or (named.array.isdigit() and named.place.isdigit())


def test_names() -> None:
    for text in ("16_3", "16[3]", "16-3"):
        assert parse_named(text) == Named("16", "3") and parse_named(f"{text}.ref") == Named("16", "3", "ref")
