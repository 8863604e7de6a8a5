"""Processes are known by boot, pid and start, ended for certain, and die with their parents; shown with real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nodesite import REPOSITORY, sleeper, wait_gone

from vmgr.node import process

THREADS_LIVE_ON = """\
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print("up", flush=True)
ctypes.CDLL(None).syscall(60, 0)  # exit, of the first thread alone
"""


def test_a_process_is_identified_and_ended() -> None:
    child = sleeper()
    found = process.identify(child.pid)
    assert found is not None and found.boot == process.boot_id()
    assert process.end(found, timeout_s=5)
    assert child.wait() == -signal.SIGKILL
    assert process.identify(child.pid) is None
    assert process.end(found, timeout_s=0)


@pytest.mark.parametrize("changed", [{"start": 1}, {"boot": "another boot"}])
def test_a_later_owner_of_the_pid_is_spared(changed: dict[str, object]) -> None:
    child = sleeper()
    found = process.identify(child.pid)
    assert found is not None
    try:
        assert process.end(found._replace(**changed), timeout_s=0)  # type: ignore[arg-type]
        assert child.poll() is None and process.identify(child.pid) == found
    finally:
        child.kill()
        child.wait()


def test_a_zombie_counts_as_gone() -> None:
    child = sleeper()
    found = process.identify(child.pid)
    assert found is not None
    child.kill()
    assert wait_gone(child.pid)
    assert process.identify(child.pid) is None and process.end(found, timeout_s=0)
    child.wait()


def test_a_process_without_its_first_thread_is_ended_all_the_same() -> None:
    child = subprocess.Popen([sys.executable, "-IS", "-c", THREADS_LIVE_ON], stdout=subprocess.PIPE)
    found = process.identify(child.pid)
    assert found is not None and child.stdout is not None and child.stdout.readline()
    deadline = time.monotonic() + 5
    while process.identify(child.pid) is not None and time.monotonic() < deadline:
        os.sched_yield()
    assert child.poll() is None, "it lives on in its second thread"
    assert process.end(found, timeout_s=5)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()


def test_one_that_does_not_obey_is_reported() -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    child = subprocess.Popen([sys.executable, "-IS", "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline()
    found = process.identify(child.pid)
    assert found is not None
    assert not process.end(found, timeout_s=0.05, sig=signal.SIGTERM)
    assert process.end(found, timeout_s=5)
    child.wait()
    child.stdout.close()


def test_a_kernel_that_will_not_say_is_an_error_and_not_taken_for_gone() -> None:
    with pytest.raises(OSError):
        process.end(process.Process(process.boot_id(), -5, 1), timeout_s=0)


def test_a_name_with_brackets_and_blanks_does_not_confuse(tmp_path: Path) -> None:
    program = tmp_path / "a) R (b"
    program.symlink_to("/bin/sleep")
    child = subprocess.Popen([str(program), "60"])
    found = process.identify(child.pid)
    assert found is not None and abs(process.seconds_since(found.start)) < 5
    assert process.end(found, timeout_s=5)
    child.wait()


def test_a_child_dies_with_its_parent() -> None:
    code = f"""\
import os, subprocess, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from vmgr.node.process import dies_with
child = subprocess.Popen(["/bin/sleep", "60"], start_new_session=True, preexec_fn=dies_with(os.getpid()))
print(child.pid, flush=True)
child.wait()
"""
    parent = subprocess.Popen([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    status = Path(f"/proc/{child}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_gone(child)


def test_a_child_whose_parent_is_gone_already_gives_up() -> None:
    child = subprocess.Popen(["/bin/sleep", "60"], preexec_fn=process.dies_with(1 << 22))  # nobody's pid
    assert child.wait(timeout=5) == -signal.SIGKILL
