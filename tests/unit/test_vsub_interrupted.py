"""Signals that come while vsub has just begun something: nothing of the submission is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import psutil
import pytest
from interrupting import Told, first_told, then_told
from vsubsite import Site

import vsub.interactive
import vsub.jobdir
from vsub.engines.local import protocol
from vsub.engines.local.qsub import qsub_main
from vsub.jobdir import JobDirectory
from vsub.process import ending_by_exception

HOLD = "86399"
"""Seconds that a program sleeps which is to be ended."""


@pytest.fixture
def left(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """What is left of a submission, processes and files; the maker of keys is one that never ends by itself."""
    keygen = site.base / "keygen"
    keygen.write_text(f"#!/bin/sh\nexec sleep {HOLD}\n")
    keygen.chmod(0o755)
    monkeypatch.setattr(vsub.jobdir, "KEYGEN", str(keygen))

    def running() -> list[psutil.Process]:
        return [each for each in psutil.Process().children() if each.cmdline()[-1:] == [HOLD]]

    yield lambda: [*map(str, running()), *site.left_in_home()]
    for each in running():
        each.kill()
        os.waitpid(each.pid, 0)


def _submit(site: Site) -> None:
    """As far as the job's key."""
    here = JobDirectory(str(site.home), os.getuid())
    with ending_by_exception(), pytest.raises(KeyboardInterrupt), here as directory:
        directory.public_key()


@pytest.mark.parametrize("name", ["mkdir", "rmdir"])
def test_told_to_end_while_folders_are_made_or_removed(
    name: str, site: Site, left: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsub.jobdir, "wait_status", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(os, name, then_told(getattr(os, name)))
    _submit(site)
    assert left() == []


def test_told_to_end_while_the_maker_of_keys_starts(
    site: Site, left: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would write the private key into the home when all else is gone."""
    monkeypatch.setattr(vsub.jobdir, "spawn", then_told(vsub.jobdir.spawn))
    _submit(site)
    assert left() == []


def test_told_to_end_while_the_key_is_waited_for(
    site: Site, left: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsub.jobdir, "wait_status", first_told(vsub.jobdir.wait_status))
    _submit(site)
    assert left() == []


def test_told_to_end_twice(site: Site, left: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time while the files are removed."""
    monkeypatch.setattr(vsub.jobdir, "wait_status", first_told(vsub.jobdir.wait_status))
    monkeypatch.setattr(vsub.jobdir, "remove_tree", first_told(vsub.jobdir.remove_tree))
    _submit(site)
    assert left() == []


def test_the_maker_of_keys_can_be_ended_by_signals(site: Site, left: Callable[[], list[str]], tmp_path: Path) -> None:
    """That none is let through while it starts is not handed down to it."""
    told = tmp_path / "told"
    (site.base / "keygen").write_text(f"#!/bin/sh\ngrep SigBlk /proc/self/status >{told}\nexit 1\n")
    here = JobDirectory(str(site.home), os.getuid())
    with pytest.raises(vsub.jobdir.VTorqueError, match="status 1"), here as directory:
        directory.public_key()
    assert told.read_text().split()[1] == "0" * 16


def test_a_session_that_is_told_to_end_while_qsub_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """qsub hears of it, which deletes the job."""
    monkeypatch.setattr(vsub.interactive, "spawn", then_told(vsub.interactive.spawn))
    assert vsub.interactive._run(["/bin/sleep", "3"], None) == 128 + signal.SIGTERM


@pytest.mark.usefixtures("told")
def test_qsub_of_the_embedded_batch_system_tells_of_a_job_that_was_taken(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else vsub would take away the files of a job that starts."""
    site.script()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(protocol, "request", then_told(lambda *_: {"job": "12.host"}))
    with pytest.raises(Told):
        qsub_main(["job.sh"], "/nowhere")
    assert capfd.readouterr() == ("12.host\n", "")
