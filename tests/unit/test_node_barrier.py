"""The user prologue where no guest is near: its own status, and that of a prologue of the user's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Optional

import pytest
from nodesite import REPOSITORY

ARGUMENTS = ["12.host", "carol", "chem", "a 'job'", "nodes=1", "batch", "", "/x/12.host.SC"]
CODE = f"""\
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from vmgr.node.barrier import main
sys.exit(main(sys.argv[1:]))
"""


def barrier(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-c", CODE, *arguments],
        capture_output=True, text=True, timeout=60, check=False, **options,  # type: ignore[call-overload]
    )  # fmt: skip


def then(path: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return barrier("--then", str(path), "--", *ARGUMENTS, **options)


def script(path: Path, text: str, mode: int = 0o700) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("arguments", [ARGUMENTS, [], ["--then"], ["--then", "x"], [""], ["--then", "", "--", "1.x"]])
def test_without_one_the_status_is_0_whatever_happens(arguments: list[str]) -> None:
    done = barrier(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("status", [0, 1, 2, 99])
def test_the_users_own_decides_with_all_that_it_would_have_had(status: int, tmp_path: Path) -> None:
    text = f'#!/bin/sh\nprintf "%s|" "$0" "$@"\npwd\necho "$PBS_NODENUM $0" >&2\ncat\numask\nexit {status}\n'
    path = script(tmp_path / "my prologue", text)
    done = then(path, input="in\n", env={"PBS_NODENUM": "0"}, cwd=str(tmp_path), umask=0o027)
    assert done.returncode == status
    words = "".join(f"{word}|" for word in (str(path), *ARGUMENTS))
    assert done.stdout == f"{words}{tmp_path}\nin\n0027\n" and done.stderr == f"0 {path}\n"


@pytest.mark.parametrize("given", [{}, {"LANG": "C"}, {"LC_CTYPE": "C", "A": "1"}, {"LANG": "C.UTF-8"}])
def test_its_environment_is_what_it_would_have_had(given: dict[str, str], tmp_path: Path) -> None:
    path = script(tmp_path / "p", "#!/usr/bin/env -S /bin/cat /proc/self/environ\n")
    done = then(path, env=given)
    assert sorted(done.stdout.split("\0")[:-1]) == sorted(f"{name}={value}" for name, value in given.items())


def test_it_becomes_the_users_own(tmp_path: Path) -> None:
    path = script(tmp_path / "p", "#!/bin/sh\nkill -TERM $$\n")
    assert then(path).returncode == -15


def test_one_that_is_missing_is_skipped(tmp_path: Path) -> None:
    done = then(tmp_path / "absent")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (0o720, "others may write it"), (0o702, "others may write it"), (0o600, "may not read and execute"),
        (0o300, "may not read and execute"), (0o066, "may not read and execute"),
    ],
)  # fmt: skip
def test_one_that_torque_would_not_run_fails_as_there(mode: int, said: str, tmp_path: Path) -> None:
    done = then(script(tmp_path / "p", "#!/bin/sh\necho run\n", mode))
    assert (done.returncode, done.stdout) == (255, "") and said in done.stderr and done.stderr.count("\n") == 1


def test_what_is_no_script(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o700)
    for path in (tmp_path, tmp_path / "fifo"):
        done = then(path)
        assert done.returncode == 255 and "no regular file" in done.stderr
    done = then(script(tmp_path / "p", "#!/no/such/interpreter\n"))
    assert done.returncode == 255 and "No such file" in done.stderr
    done = then(script(tmp_path / "q", "no first line\n"))
    assert done.returncode == 255 and "format" in done.stderr
    done = then(tmp_path / "p" / "below")
    assert done.returncode == 255 and "Not a directory" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a file of somebody else's")
def test_one_of_somebody_elses(tmp_path: Path) -> None:
    path = script(tmp_path / "p", "#!/bin/sh\necho run\n", 0o755)
    os.chown(path, 4711, 4711)
    done = then(path)
    assert (done.returncode, done.stdout) == (255, "") and "does not belong" in done.stderr


WATCHED = f"""\
import sys, types
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from vmgr.node import barrier
config = types.SimpleNamespace(paths=types.SimpleNamespace(run=Path("/nonexistent")))
sys.exit(barrier._watched(config, sys.argv[1], sys.argv[2:]))
"""


def both(path: Path, **options: object) -> list[subprocess.CompletedProcess[str]]:
    """What comes of a user's own prologue as it is, and as a child that is watched."""
    calls = [[CODE, "--then", str(path), "--", *ARGUMENTS], [WATCHED, str(path), *ARGUMENTS]]
    return [
        subprocess.run(
            [sys.executable, "-I", "-c", *call], capture_output=True, text=True, timeout=60, check=False,
            **options,  # type: ignore[call-overload]
        )
        for call in calls
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    ["exit 0", "exit 1", "exit 7", "kill -TERM $$", "kill -KILL $$", "kill -INT $$", "kill -PIPE $$", "kill -XFSZ $$"],
)
def test_one_that_is_watched_ends_as_it_would(line: str, tmp_path: Path) -> None:
    text = f'#!/bin/sh\necho "$@"; cat /proc/self/environ; grep Sig[PBIC] /proc/self/status >&2; umask; {line}\n'
    alone, watched = both(script(tmp_path / "p", text), env={"PBS_NODENUM": "0", "LANG": "C"}, cwd=str(tmp_path))
    assert alone.returncode == watched.returncode and "PBS_NODENUM" in watched.stdout
    assert (watched.stdout, watched.stderr) == (alone.stdout, alone.stderr)


@pytest.mark.parametrize("mode", [0o600, 0o720, None])
def test_one_that_torque_would_not_run_is_not_watched_either(mode: Optional[int], tmp_path: Path) -> None:
    path = tmp_path / "p"
    if mode is not None:
        script(path, "#!/bin/sh\necho run\n", mode)
    alone, watched = both(path)
    assert (watched.returncode, watched.stdout, watched.stderr) == (alone.returncode, "", alone.stderr)


def test_the_orphans_of_one_that_is_watched_are_ours(tmp_path: Path) -> None:
    orphan = "sleep 0.2; ps -o ppid= -p $$"
    text = f"#!/bin/sh\nps -o ppid= -p $$\n(setsid sh -c '{orphan}' &)\nsleep 1\n"
    alone, watched = (done.stdout.split() for done in both(script(tmp_path / "p", text)))
    assert watched[0] == watched[1], "the parent of what was left behind is the parent of the prologue"
    assert alone[0] != alone[1]
