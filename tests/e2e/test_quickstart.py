"""The one command of the README, from a fresh clone, as a newcomer runs it.

It installs into /opt/vtorque and stays installed, as it would for the newcomer; the batch system that it starts, always
the embedded one, is stopped again.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import REPOSITORY

DAEMON = Path("/opt/vtorque/libexec/vtorque-local")
LAST_LINE = r"quickstart: ok, job [0-9]+\.\S+ ran in guest v\S+-1, [0-9.]+ s from submission to end"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("clone") / "vtorque"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(REPOSITORY), str(folder)], check=True)
    yield folder
    if DAEMON.exists():
        subprocess.run([str(DAEMON), "stop"], timeout=120)
        assert subprocess.run([str(DAEMON), "status"], capture_output=True).returncode != 0


@pytest.mark.timeout(1200)
def test_quickstart_runs_a_job_in_each_image(clone: Path) -> None:
    done = subprocess.run(["./quickstart.sh"], cwd=clone, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(LAST_LINE, lines[-1])
    assert re.match(r"quickstart: downloads about [0-9]+ MB .* and needs about [0-9]+ MB of disk", done.stdout)
    assert "image micro, 1 vCPU" in done.stdout and "image debian-12, 1 vCPU" in done.stdout
    assert done.stdout.count("Hello from vtdemo (uid ") == 2
    assert done.stdout.count("vsub: timeline: ready") == 2
    assert "\r" not in done.stdout and "\033" not in done.stdout


@pytest.mark.timeout(600)
def test_second_run_is_at_its_first_guest_in_seconds(clone: Path) -> None:
    start = time.monotonic()
    child = subprocess.Popen(["./quickstart.sh"], cwd=clone, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if "vsub --wait hello.sh" in line:
            break
    took = time.monotonic() - start
    rest = child.stdout.read()
    assert child.wait(timeout=500) == 0
    assert re.fullmatch(LAST_LINE, rest.splitlines()[-1])
    assert took < 10


def test_without_root_it_says_in_one_line_what_to_run() -> None:
    done = subprocess.run(
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "/bin/sh", "-s"],
        input=(REPOSITORY / "quickstart.sh").read_text(),
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "sudo ./quickstart.sh" in done.stderr
