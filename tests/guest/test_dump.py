"""`vmgr dump` of a real job's guest."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from pathlib import Path

import pytest
from nodejob import Jobs, fork

from vmgr.cli import main

pytestmark = [pytest.mark.guest, pytest.mark.root]


def dump_as_owner(jobs: Jobs) -> int:
    owner = jobs.owner
    os.initgroups(owner.pw_name, owner.pw_gid)
    os.setresgid(owner.pw_gid, owner.pw_gid, owner.pw_gid)
    os.setresuid(owner.pw_uid, owner.pw_uid, owner.pw_uid)
    return main(["dump", "12.host", f"{owner.pw_dir}/mine.dump", "--json"])


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
        pid = fork(lambda: dump_as_owner(jobs))  # after root has, so that all is loaded that the owner may not read
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert main(["dump", "12.host:3", str(file)]) == 2
        assert "VT-VALUE: job 12.host has no guest of rank 3" in capsys.readouterr().err
        assert main(["image", "save", "12.host", "--to", f"{file}.disk"]) == 2
        assert "micro has no disk" in capsys.readouterr().err
        (Path(jobs.owner.pw_dir) / "go").touch()
        status, said = job.ended()
        assert status == 0 and said.endswith("went on with 96\n"), said
    assert (file.stat().st_uid, stat.S_IMODE(file.stat().st_mode)) == (0, 0o600)
    mine = Path(jobs.owner.pw_dir, "mine.dump")
    assert (mine.stat().st_uid, stat.S_IMODE(mine.stat().st_mode)) == (jobs.owner.pw_uid, 0o600)
    assert mine.read_bytes()[:12] == b"makedumpfile"
    content = file.read_bytes()
    assert content[:4] == b"\x7fELF" and f"{half}{half}{other}".encode() in content
