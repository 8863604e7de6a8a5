"""Whatever is killed, whenever: the job ends with its reason, and nothing of it stays on the node.

The fixture `user` checks after each test that no process, overlay, socket, record or mount is left.
"""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from .conftest import Done, Site, User, eventually

ENGINES = ("local", "slurm", "torque")
RUNS = "touch running; until [ -e go ]; do sleep 0.2; done\n"


def running(user: User, *options: str) -> str:
    job = user.submit(RUNS, *options)
    eventually((user.home / "running").exists, "the job runs")
    return job


def told_after_ssh(done: Done) -> str:
    """The last line on a job's error stream, after what ssh says by itself when a connection ends under it, and cannot
    be told not to say (OpenSSH's clientloop.c).
    """
    *remarks, reason = done.err.splitlines()
    assert remarks in ([], ["Connection to 127.0.0.1 closed by remote host."])
    return reason


@pytest.mark.parametrize("image", ["micro", pytest.param("debian-12", marks=pytest.mark.slow)])
def test_qemu_killed_in_the_middle_of_a_job(user: User, site: Site, image: str) -> None:
    job = running(user, "-vm", f"img={image}")
    qemu = site.qemu()
    assert qemu is not None
    qemu.kill()
    assert site.wait(job) == 76
    done = user.finished(job, 76, "")
    reason = told_after_ssh(done)
    assert reason.startswith("VT-GUEST: ") and "killed by signal 9" in reason


def test_user_kills_qemu_while_the_guest_boots(user: User, site: Site) -> None:
    job = user.submit("true\n")
    site.wait_for(job, "pinned and running")
    qemu = site.qemu()
    assert qemu is not None
    assert user.run("/bin/sh", "-c", f"kill -KILL {qemu.pid}").returncode == 0
    assert site.wait(job) == 76
    assert user.finished(job, 76, "").err.startswith("VT-GUEST: ")


def test_agent_killed_takes_its_guest_along(user: User, site: Site) -> None:
    job = running(user)
    [agent] = site.processes("vtorque-agent")
    agent.kill()
    assert site.wait(job) == 78
    assert told_after_ssh(user.finished(job, 78, "")).startswith("VT-AGENT: ")


def test_agent_killed_at_any_moment(user: User, site: Site) -> None:
    for delay in (0.05, 0.15, 0.3, 1.0):
        job = user.submit("true\n")
        eventually(lambda: site.processes("vtorque-agent"), "the agent runs")
        time.sleep(delay)
        for agent in site.processes("vtorque-agent"):
            agent.kill()
        assert site.wait(job) == 78, delay
        site.assert_clean()


def test_job_wrapper_killed(user: User, site: Site) -> None:
    job = running(user)
    wrappers = site.processes("vtorque-job")
    assert wrappers
    for wrapper in wrappers:
        wrapper.kill()
    assert site.wait(job) == 256 + signal.SIGKILL or site.wait(job) == 137


def test_deleted_while_running_gets_the_signal_in_the_guest(user: User, site: Site) -> None:
    job = user.submit("trap 'echo told; exit 9' TERM\ntouch running\nfor i in $(seq 600); do sleep 0.1; done\n")
    eventually((user.home / "running").exists, "the job runs")
    deleted = user.run(*site.command("qdel", job))
    assert deleted.returncode == 0, deleted.stderr
    site.wait(job)
    assert user.finished(job, 0, "").out == "told\n"


@pytest.mark.parametrize("stage", ["agent", "staged", "launched", "booted"])
def test_deleted_while_the_guest_comes_up(user: User, site: Site, stage: str) -> None:
    job = user.submit("touch ran\n")
    site.wait_for(job, stage)
    assert site.client("qdel", job).returncode == 0
    site.wait(job)
    site.assert_clean()
    assert not (user.home / "ran").exists()


def test_requeued_under_the_same_id_starts_clean(user: User, site: Site) -> None:
    job = user.submit("echo $VTORQUE_JOBID $(cat /tmp/mark 2>&1) >>attempts\necho dirty >/tmp/mark\n" + RUNS)
    eventually((user.home / "running").exists, "the job runs")
    (user.home / "running").unlink()
    first = site.qemu()
    assert first is not None
    assert site.client("qrerun", job).returncode == 0
    eventually((user.home / "running").exists, "the job runs again")
    assert not first.is_running()
    assert len(site.processes("vtorque-agent")) == 1
    user.write("go", "")
    assert site.wait(job) == 0
    attempts = (user.home / "attempts").read_text().splitlines()
    assert len(attempts) == 2 and all(line.startswith(site.whole(job)) and "dirty" not in line for line in attempts)


@pytest.mark.only("local", reason="takes the place of the epilogue in the embedded batch system's folder")
def test_janitor_undoes_what_a_lost_epilogue_left(user: User, site: Site) -> None:
    """The agent and the epilogue both lost: what stays is found by the next agent, or by `vmgr node reap`."""
    hook = site.root / "local" / "mom_priv" / "epilogue"
    kept = hook.read_text()
    hook.write_text("#!/bin/sh\nexit 0\n")
    try:
        job = running(user)
        for agent in site.processes("vtorque-agent"):
            agent.kill()
        assert site.wait(job) == 78
    finally:
        hook.write_text(kept)
    assert any("spool/jobs" in line for line in site.left_behind())
    dry = psutil.Popen([str(site.vmgr), "node", "reap", "--dry-run"], stdout=-1, text=True)
    assert job in dry.communicate()[0]
    assert any("spool/jobs" in line for line in site.left_behind())
    assert os.spawnv(os.P_WAIT, str(site.vmgr), ["vmgr", "node", "reap"]) == 0
    site.assert_clean()
