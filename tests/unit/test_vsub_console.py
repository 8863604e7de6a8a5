"""The console script."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pytest_console_scripts import ScriptRunner
from vsubsite import REPOSITORY, Site

from vmgr import __version__


@pytest.fixture
def program(tmp_path: Path) -> str:
    """A launcher such as the installation has."""
    path = tmp_path / "vsub"
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from vsub.cli import main\nsys.exit(main())\n"
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.script_launch_mode("both")
def test_version_and_help(script_runner: ScriptRunner, program: str) -> None:
    done = script_runner.run([program, "--version"])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vsub {__version__}\n", "")
    done = script_runner.run([program, "--help"])
    assert done.returncode == 0 and done.stdout.startswith("usage: vsub ") and done.stderr == ""


@pytest.mark.script_launch_mode("inprocess")
def test_submission(script_runner: ScriptRunner, program: str, site: Site) -> None:
    site.script()
    done = script_runner.run([program, "-vm", "vcpus=2", "job.sh"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "12.host\n", "")
    assert site.spec.asked == ("vcpus",)
    done = script_runner.run([program, "-vm", "vcpus=99", "job.sh"])
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("vsub: VT-POLICY: vcpus=99")
