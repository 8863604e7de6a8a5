"""`vmgr dump` of a real job's guest."""

from __future__ import annotations

import secrets
import stat
import sys
from pathlib import Path

import pytest
from nodejob import Jobs

from vmgr.cli import main

pytestmark = [pytest.mark.guest, pytest.mark.root]


def test_what_a_job_has_in_memory_is_in_the_dump_and_the_job_goes_on(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", str(jobs.node.install.root / "venv" / "bin" / "python3"))
    half, other = secrets.token_hex(16), secrets.token_hex(16)
    script = f"""#!/bin/bash
needle={half}
needle=${{needle}}${{needle}}{other}
echo running
until [ -e "$HOME/go" ]; do sleep 0.1; done
echo "went on with ${{#needle}}"
"""
    file = jobs.node.base / "guest.dump"
    with jobs.job(jobs.submit(script)) as job:
        job.start(interactive=False)
        job.screen.expect("running\n")
        assert main(["dump", "12.host", str(file), "--format", "elf"]) == 0
        out, err = capsys.readouterr()
        assert out == f"{file}: {file.stat().st_size} bytes\n" and "writing down the memory of" in err
        assert main(["dump", "12.host:3", str(file)]) == 2
        assert "VT-VALUE: job 12.host has no guest of rank 3" in capsys.readouterr().err
        assert main(["image", "save", "12.host", "--to", f"{file}.disk"]) == 2
        assert "micro has no disk" in capsys.readouterr().err
        (Path(jobs.owner.pw_dir) / "go").touch()
        status, said = job.ended()
        assert status == 0 and said.endswith("went on with 96\n"), said
    assert (file.stat().st_uid, stat.S_IMODE(file.stat().st_mode)) == (0, 0o600)
    content = file.read_bytes()
    assert content[:4] == b"\x7fELF" and f"{half}{half}{other}".encode() in content
