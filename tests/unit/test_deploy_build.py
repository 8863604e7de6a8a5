"""Building the programs of an installation: the steps that other programs do, and nothing of them afterwards."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import psutil
import pytest
from interrupting import Told, then_told
from nodesite import REPOSITORY, wait_gone

from vmgr import __version__
from vmgr.deploy import build
from vmgr.errors import VTorqueError

HOLD = "86397"
PYTHON = """\
#!/bin/sh
test "$*" = "-I -m venv $4" || exec {python} "$@"
mkdir -p "$4/bin"
printf '#!/bin/sh\\nprintf %%s "$TMPDIR" >{told}\\nexit 3\\n' >"$4/bin/python3"
chmod 755 "$4/bin/python3"
"""
"""One whose environments have a pip that tells where it puts what it needs for a while, and fails."""


@pytest.fixture
def sleepers() -> Iterator[Callable[[], list[psutil.Process]]]:
    def found() -> list[psutil.Process]:
        return [each for each in psutil.process_iter(["cmdline"]) if HOLD in " ".join(each.info["cmdline"] or ())]

    yield found
    for each in found():
        each.kill()


def all_gone(left: list[psutil.Process]) -> bool:
    return all(wait_gone(each.pid) for each in left)


@pytest.mark.usefixtures("told")
def test_what_an_interrupted_step_has_started_is_gone(sleepers: Callable[[], list[psutil.Process]]) -> None:
    """It would go on in folders that are being removed."""
    with pytest.raises(Told):
        build._run(["sh", "-c", f"sleep {HOLD} & kill -TERM $PPID; wait"], "/nowhere")
    assert all_gone(sleepers())


@pytest.mark.usefixtures("told")
def test_a_step_that_is_interrupted_while_it_starts_is_gone(
    sleepers: Callable[[], list[psutil.Process]], monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = subprocess.Popen._execute_child  # type: ignore[attr-defined]
    monkeypatch.setattr(subprocess.Popen, "_execute_child", then_told(execute))
    with pytest.raises(Told):
        build._run(["sleep", HOLD], "/nowhere")
    assert all_gone(sleepers())


def test_a_step_can_be_ended_by_signals() -> None:
    """That none is let through while it starts is not handed down to it."""
    build._run(["sh", "-c", "! grep SigBlk /proc/self/status | grep -q '[1-9a-f]$'"], "/nowhere")
    with pytest.raises(VTorqueError, match=f"ended with {-signal.SIGTERM}"):
        build._run(["sh", "-c", "kill -TERM $$"], "/nowhere")


def test_what_pip_needs_for_a_while_lies_where_it_is_removed(tmp_path: Path) -> None:
    python, told, work = tmp_path / "python", tmp_path / "told", tmp_path / "work"
    python.write_text(PYTHON.format(python=sys.executable, told=told))
    python.chmod(0o755)
    work.mkdir()
    source = build.source_at(str(REPOSITORY), __version__, str(python))
    with pytest.raises(VTorqueError, match="ended with 3"):
        build.build(source, str(tmp_path), str(tmp_path / "tree"), str(python), None, str(work))
    assert Path(told.read_text()).is_dir() and work in Path(told.read_text()).parents
