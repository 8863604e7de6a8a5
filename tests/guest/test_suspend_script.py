"""A job's script through a suspension: the real wrapper and agent, and a batch system that the test stands for."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest
from nodejob import Jobs
from test_suspend import Batch, batch, order, refused, run, site

from vmgr.node import record

__all__ = ["batch", "site"]
pytestmark = [pytest.mark.guest, pytest.mark.root]

SCRIPT = """#!/bin/bash
n=0
while [ ! -e ~/enough ]; do
    n=$((n + 1))
    echo "line $n"
    sleep 0.05
done
echo "all $n"
exit 6
"""


def test_a_script_goes_on_where_it_was(site: tuple[Jobs, Batch], batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called off once, then suspended and resumed: every line of it comes, once, and its status is the job's."""
    jobs, _ = site
    later = itertools.count(1)
    monkeypatch.setattr(
        record, "new_place", lambda _, job_id: jobs.node.place(job_id, record.hook_start() + next(later))
    )
    path = jobs.submit(SCRIPT, suspend=True, vm_prologue="echo pro\n", vm_epilogue="echo epi\n")
    with jobs.job(path) as job:
        job.start(interactive=False)
        job.screen.expect("line 5\n")
        batch.says.write_text("not now")
        assert "not now" in run(refused(job))
        batch.says.write_text("done")
        assert run(order(job)) == {"suspended": "12.host"}
        os.kill(job.wrapper, signal.SIGTERM)
        status, before = job.ended()
        assert status == 128 + signal.SIGTERM, before
    assert job.directory.is_dir()
    with jobs.job(path) as job:
        job.start(interactive=False)
        first = job.screen.expect(r"line (\d+)\n")
        Path(jobs.owner.pw_dir, "enough").touch()
        status, rest = job.ended()
        assert status == 6, rest
    lines = [*before.splitlines(), f"line {first[1]}", *rest.splitlines()]
    count = int(lines[-2].split()[1])
    assert lines == [*(f"line {n}" for n in range(6, count + 1)), f"all {count}", "epi"]
