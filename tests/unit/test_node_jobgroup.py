"""What the lists of control groups tell beside processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from vmgr.node.jobgroup import JobGroup
from vmgr.node.launch import Guest


@pytest.mark.parametrize(
    ("name", "text", "run_out"),
    [
        ("memory.events", "low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\n", True),
        ("memory.events", "low 0\nhigh 0\nmax 3\noom 1\noom_kill 0\noom_group_kill 1\n", False),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 12\n", True),
        ("memory.oom_control", "oom_kill_disable 1\nunder_oom 0\n", False),
        ("cgroup.events", "oom_kill 1\n", False),
    ],
)
def test_a_guest_that_the_jobs_bound_on_memory_has_ended(tmp_path: Path, name: str, text: str, run_out: bool) -> None:
    (tmp_path / name).write_text(text)
    group = JobGroup((tmp_path / "elsewhere" / "cgroup.procs", tmp_path / "cgroup.procs"))
    assert group.has_run_out() is run_out and not JobGroup().has_run_out()
    reading, writing = os.pipe()
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen(["/bin/sleep", "300"]) as child:
        try:
            guest = Guest(child, ours, theirs, reading, group)
            os.close(writing)
            child.send_signal(signal.SIGKILL)
            child.wait()
            said = "killed by signal 9" + (", because the job has used up its memory on this node" if run_out else "")
            assert guest.describe_end() == said
        finally:
            child.kill()
            os.close(reading)
