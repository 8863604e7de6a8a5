"""How the job wrapper finds its job directory, whichever way a batch system runs it."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.errors import VTorqueError
from vmgr.node import submitted

DIRECTORY = "/home/user/.vtorque/abcdefgh/" + "0" * 64


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "7.server.SC"
    path.write_text(f"#!/bin/sh\nexec '/opt/vt orque/libexec/vtorque-job' '{DIRECTORY}' \"$@\"\n")
    return path


@pytest.mark.parametrize("line", ["{}\n", "exec {}\n", "'{}'\n", "{}"])
def test_path_on_standard_input_as_torque_gives_it(script: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(line.format(script).encode())))
    assert submitted.job_directory([]) == DIRECTORY


@pytest.mark.parametrize("line", ["{} a 'b c' \"$HOME\"", "exec {} it's", "{} exec"])
def test_arguments_behind_the_path(script: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(line.format(script).encode())))
    assert submitted.job_directory(["-l"]) == DIRECTORY


@pytest.mark.parametrize("command", ["{}", "exec {}", "'{}'", " {} "])
def test_command_of_an_interactive_job(script: Path, command: str) -> None:
    assert submitted.job_directory(["-c", command.format(script)]) == DIRECTORY
    assert submitted.job_directory(["-l", "-c", command.format(script)]) == DIRECTORY


@pytest.mark.parametrize("argv", [["-c"], ["-c", ""], ["-c", "exec"], ["-c", "'"], ["-c", "\0"]])
def test_commands_that_name_nothing(argv: list[str]) -> None:
    try:
        assert submitted.job_directory(argv) in ("", "'")
    except VTorqueError:
        pass


@FUZZ
@given(st.text(max_size=60), st.text(max_size=200))
def test_anything_is_a_directory_or_refused(tmp_path: Path, command: str, content: str) -> None:
    path = tmp_path / "job"
    path.write_text(content, errors="surrogatepass")
    for argv in (["-c", command], [command], ["-c", f"{path} {command}"], [str(path)]):
        try:
            assert isinstance(submitted.job_directory(argv), str)
        except VTorqueError:
            pass


def test_path_or_directory_as_an_argument(script: Path, tmp_path: Path) -> None:
    assert submitted.job_directory([str(script)]) == DIRECTORY
    assert submitted.job_directory([str(tmp_path)]) == str(tmp_path)
    assert submitted.job_directory([DIRECTORY]) == DIRECTORY  # gone: said by who needs it


@pytest.mark.parametrize(
    "text", ["", "echo hello\n", "exec one\n", "exec 'unclosed\n", "exec a relative\n", "\0\xff\n"]
)
def test_anything_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "8.server.SC"
    path.write_text(text)
    with pytest.raises(VTorqueError, match="VT-SPEC"):
        submitted.job_directory([str(path)])
