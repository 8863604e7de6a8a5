"""Jobs through agent and wrapper into a real guest: interactive ones on a real terminal, arguments, arrays."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import psutil
import pytest
from guestsetup import holders
from nodejob import Job, Jobs

from vmgr.errors import Code
from vmgr.metrics import store

pytestmark = [pytest.mark.guest, pytest.mark.root]
PROMPT = r"\$ (\x1b\[K)?$"


def test_an_interactive_session(jobs: Jobs) -> None:
    path = jobs.submit(
        interactive=True, keep=True, vm_prologue="#!/bin/sh\necho pro $PBS_JOBID\n", vm_epilogue="#!/bin/sh\necho epi\n"
    )
    with jobs.job(path) as job:
        job.start()
        job.screen.expect(r"vtorque: waiting for the guest: ")
        job.screen.expect(r"pinned and running \(")
        job.screen.expect(r"\r\x1b\[Kpro 12\.host\r\n")
        job.screen.expect(PROMPT)
        job.screen.type("tty; stty size; echo $TERM-$COLORTERM-$0; pwd\n")
        job.screen.expect(r"/dev/pts/0\r\n40 100\r\nxterm-256color-truecolor-\S*bash\r\n" + jobs.owner.pw_dir)
        for text, said in (("30 120\n", "30 120"), ("31 121\n", "31 121")):
            job.resize(text)
            job.screen.type("for i in 1 2 3 4 5 6 7 8 9; do sleep 0.1; done; stty size\n")
            job.screen.expect(rf"[\r\n]{said}\r\n")
        job.screen.expect(PROMPT)
        job.screen.type("\x0c")  # cleared by what the node's description of the terminal says
        job.screen.expect(r"\x1b\[H\x1b\[2J")
        started = time.monotonic()
        job.screen.type("sleep 600\n")
        job.screen.expect("sleep 600")
        time.sleep(0.5)
        job.screen.type("\x03")
        job.screen.expect(r"\^C[\s\S]*" + PROMPT)
        job.screen.type("sleep 601\n")
        job.screen.expect("sleep 601")
        time.sleep(0.5)
        job.screen.type("\x1a")
        job.screen.expect(r"Stopped[\s\S]*" + PROMPT)
        job.screen.type("kill %1; sleep 1234 & exit 7\n")
        job.screen.expect(r"logout|exit")
        status, said = job.ended()
        assert status == 7 and said.endswith("epi\r\n"), said
        assert time.monotonic() - started < 60
    assert json.loads((job.directory / "result.json").read_text()) == {"v": 1, "status": 7, "code": None}


SCRIPT = """#!/bin/bash
printf '[%s]' "$@"
echo
stty size
[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo terminal
trap 'echo int' INT
sleep 600
trap '' HUP TERM
echo "read: $(head -n 1)"
sleep ${HOLD-0}
exit 9
"""


def test_a_script_on_a_terminal(jobs: Jobs) -> None:
    before = store.read(jobs.node.config.paths)
    with jobs.job(jobs.submit(SCRIPT, interactive=True, arguments=""" a 'b  c' "$PBS_JOBID" \\\\ *.none """)) as job:
        job.start()
        job.screen.expect(r"\[a\]\[b  c\]\[12\.host\]\[\\\]\[\*\.none\]\r\n40 100\r\nterminal\r\n")
        time.sleep(1)
        job.screen.type("\x1a\x03")  # nothing could let it go on after it was stopped
        job.screen.expect(r"int\r\n")
        job.screen.type("line\n")
        job.screen.expect("read: line")
        assert job.ended()[0] == 9
    assert not job.directory.exists()
    counted = store.read(jobs.node.config.paths)
    assert counted.ended == before.ended + 1 and counted.failed == before.failed
    assert counted.guests["micro"] == before.guests.get("micro", 0) + 1
    assert 0.5 < counted.boot["micro"][-1] - before.boot.get("micro", (0.0,))[-1] < jobs.node.config.timeouts.boot


def ready(job: Job) -> list[Any]:
    """Start an interactive job that holds, up to its last read; gives the state that its terminal had before."""
    job.start(HOLD="700")
    before = job.screen.state()
    job.screen.expect("terminal")
    time.sleep(0.5)
    job.screen.type("\x03")
    job.screen.expect("int")
    job.screen.type("line\n")
    job.screen.expect("read: line")
    assert job.screen.state() != before, "ssh has the terminal"
    return before


def test_the_job_is_deleted(jobs: Jobs) -> None:
    with jobs.job(jobs.submit(SCRIPT, interactive=True, keep=True, vm_epilogue="#!/bin/sh\necho epi\n")) as job:
        before = ready(job)
        assert job.agent in holders("micro")
        started = time.monotonic()
        os.kill(job.wrapper, signal.SIGTERM)
        job.screen.expect("vtorque: the session was ended by SIGTERM\r\n")
        assert job.screen.state() == before
        status, said = job.ended()
        assert (status, said) == (128 + 15, "epi\r\n") and time.monotonic() - started < 30
    assert job.agent not in holders("micro")
    assert json.loads((job.directory / "result.json").read_text()) == {"v": 1, "status": 143, "code": None}


def test_the_guest_dies(jobs: Jobs) -> None:
    with jobs.job(jobs.submit(SCRIPT, interactive=True, keep=True)) as job:
        before = ready(job)
        (qemu,) = psutil.Process(job.agent).children()
        qemu.kill()
        job.screen.expect("ended while the job was running")
        assert job.screen.state() == before
        assert job.ended()[0] == Code.GUEST.status
    result = json.loads((job.directory / "result.json").read_text())
    assert result == {"v": 1, "status": Code.GUEST.status, "code": "VT-GUEST"}
    assert store.read(jobs.node.config.paths).failed["VT-GUEST"] == 1


def test_the_connection_breaks(jobs: Jobs) -> None:
    with jobs.job(jobs.submit(SCRIPT, interactive=True)) as job:
        before = ready(job)
        (ssh,) = job.children("ssh")
        os.kill(ssh, signal.SIGKILL)  # so that it cannot put the terminal in order
        job.screen.expect("VT-CONNECT: the connection to the guest")
        assert job.screen.state() == before
        assert job.ended()[0] == Code.CONNECT.status


def test_the_terminal_is_hung_up(jobs: Jobs) -> None:
    with jobs.job(jobs.submit(SCRIPT, interactive=True, keep=True)) as job:
        ready(job)
        job.screen.close()
        job.screen.fd = os.open("/dev/null", os.O_RDWR)
        assert job.ended()[0] == 128 + 1
    assert json.loads((job.directory / "result.json").read_text())["status"] == 129


def test_interrupted_while_the_guest_boots(jobs: Jobs) -> None:
    with jobs.job(jobs.submit(interactive=True)) as job:
        job.start()
        job.screen.expect("pinned and running")
        job.screen.type("\x03")
        status, said = job.ended()
        assert status == 128 + 2 and said.endswith("\r\x1b[K")
    assert not job.directory.exists()


def test_without_a_terminal(jobs: Jobs) -> None:
    with jobs.job(jobs.submit(interactive=True)) as job:
        job.start(interactive=False)
        status, said = job.ended()
        assert status == Code.SPEC.status and "VT-SPEC: an interactive job needs a terminal" in said


def test_arguments_of_a_batch_job(jobs: Jobs) -> None:
    script = "#!/bin/sh\nprintf '[%s]' \"$@\"\necho\ncat\nexit 4\n"
    arguments = "a 'b  c' \"$PBS_JOBID\" \\\\ 'd;e' PATH"
    with jobs.job(jobs.submit(script, arguments=arguments, vm_prologue="#!/bin/sh\necho pro $#\n")) as job:
        job.start(interactive=False)
        assert job.ended() == (4, "pro 0\n[a][b  c][12.host][\\][d;e][PATH]\n")


def test_members_of_an_array_at_once(jobs: Jobs) -> None:
    script = "#!/bin/sh\necho member $PBS_ARRAYID of $PBS_JOBID\nexit $PBS_ARRAYID\n"
    path = jobs.submit(script, array="1-3")
    with jobs.job(path, "5[1].host") as one, jobs.job(path, "5[2].host") as two:
        for index, job in ((1, one), (2, two)):
            job.start(interactive=False, PBS_ARRAYID=str(index))
        assert one.ended() == (1, "member 1 of 5[1].host\n")
        assert two.ended() == (2, "member 2 of 5[2].host\n")
    names = sorted(file.name for file in one.directory.iterdir())
    node = os.uname().nodename.partition(".")[0]
    assert {f"status.1.{node}.json", f"status.2.{node}.json", "done.1", "done.2", "spec.json"} <= set(names)
    with jobs.job(path, "5[3].host") as three:
        three.start(interactive=False, PBS_ARRAYID="3")
        assert three.ended()[0] == 3
    assert not three.directory.parent.exists()
