"""The terminal's description on its way into a guest that has none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.node import terminfo
from vmgr.node.terminfo import MAX_BYTES, terminfo_lines


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(terminfo, "FOLDERS", (str(tmp_path / "absent"), str(tmp_path)))
    for name in ("x/xterm", "76/vt+1"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"\x1e\x02" + name.encode())
    return tmp_path


def told(lines: str) -> str:
    done = subprocess.run(
        ["sh", "-ec", f'{lines}printf %s "${{TERMINFO-none}}"'], capture_output=True, text=True, env={}
    )
    return done.stdout


@pytest.mark.parametrize(("term", "name"), [("xterm", "x/xterm"), ("vt+1", "76/vt+1")])
def test_a_guest_is_told_what_it_does_not_know(term: str, name: str, folder: Path) -> None:
    lines = terminfo_lines({"TERM": term})
    assert told(lines) == "none", "it knows it"
    (folder / name).unlink()
    assert told(lines) == f"hex:1e02{name.encode().hex()}"


@pytest.mark.parametrize("term", ["", "dumber", "../x/xterm", "x/xterm", "xterm\n", "-x", ".", "..", "x" * 65, "xtérm"])
def test_nothing_is_said_of_other_terminals(term: str, folder: Path) -> None:
    assert terminfo_lines({"TERM": term}) == "" and told("") == "none"


def test_the_users_own_choice_is_left_alone(folder: Path) -> None:
    assert terminfo_lines({"TERM": "xterm", "TERMINFO": "/home/carol/.terminfo"}) == terminfo_lines({}) == ""


def test_what_is_no_description(folder: Path) -> None:
    (folder / "x" / "xterm").write_bytes(b"x" * (MAX_BYTES + 1))
    assert terminfo_lines({"TERM": "xterm"}) == ""
    (folder / "x" / "xterm").write_bytes(b"")
    assert terminfo_lines({"TERM": "xterm"}) == ""


@FUZZ
@given(st.text(max_size=70))
def test_any_name_of_a_terminal(folder: Path, term: str) -> None:
    assert terminfo_lines({"TERM": term}) == "" or term in ("xterm", "vt+1")
