"""The micro image in a real guest: the events, the account, the shares, the job runner, the end.

One boot serves every check that leaves the guest as it was.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guestmachine import Machine, decode
from guestsetup import MakeSetup, make_setup
from keptchecks import WRITER, session_outlives_its_connection
from screen import set_size

pytestmark = pytest.mark.guest

PROLOGUE = """#!/bin/sh
id -u
echo "rank $VTORQUE_RANK of $DISTRO for $VT_USER"
echo problem >&2
device=$(findfs LABEL=cidata)
mkdir -p /tmp/seed
mount -o ro "$device" /tmp/seed && echo mounted
mount -o remount,rw /tmp/seed || echo "no remount"
touch /tmp/seed/x || echo "no write"
echo x | dd of="$device" bs=1 count=1 || echo "no raw write"
umount /tmp/seed
"""
JOB = """set -e
export PBS_JOBID=7.server PBS_NODEFILE=/run/vtorque/nodefile WORDS='two  words'
umask 027
ulimit -S -n 512 || true
cd {home}
VT_JOB_SHELL={shell} VT_JOB_SCRIPT={home}/job.sh
set +e
"""


@pytest.fixture(scope="module")
def guest() -> Iterator[Machine]:
    directory = Path("/tmp") / f"vtorque-guest-micro-{os.getpid()}"
    directory.mkdir()
    try:
        setup = make_setup(
            directory,
            "micro",
            prologue=PROLOGUE,
            epilogue="#!/bin/sh\necho bye\nexit 4\n",
            environment={"DISTRO": "SLG", "VTORQUE_RANK": "0", "QUOTED": "a 'b' \"c\" $d"},
            vcpus=2,
        )
        with Machine(setup) as machine:
            machine.wait_for("ready")
            yield machine
    finally:
        shutil.rmtree(directory)


def home(guest: Machine) -> Path:
    return guest.setup.mounts[0].source


def put_job(guest: Machine, script: str, shell: str = "/bin/bash", settings: str = "") -> str:
    """Write a job into the shared home; returns the runner's argument, a path in the guest."""
    where = guest.setup.user.home
    path = home(guest) / "job.sh"
    path.write_text(script)
    path.chmod(0o755)
    (home(guest) / "run-1.sh").write_text(JOB.format(home=where, shell=shell) + settings)
    return f"{where}/run-1.sh"


def run_job(
    guest: Machine, script: str, shell: str = "/bin/bash", settings: str = ""
) -> subprocess.CompletedProcess[str]:
    job = guest.start_job(put_job(guest, script, shell, settings))
    try:
        assert job.stdin is not None and job.stdout is not None and job.stderr is not None
        out, err = job.stdout.read(), job.stderr.read()
        return subprocess.CompletedProcess([], job.wait(timeout=60), out, err)
    finally:
        job.kill()
        job.communicate()


def test_events_come_in_order(guest: Machine) -> None:
    assert [event["event"] for _, event in guest.events][:3] == ["booted", "prologue", "ready"]
    assert guest.events[2][1]["ssh"] == 22


def test_prologue_ran_as_root_with_the_site_variables_and_could_not_change_the_seed(guest: Machine) -> None:
    prologue = guest.events[1][1]
    lines = decode(prologue["output"]).splitlines()
    assert prologue["status"] == 0
    assert lines[0] == "0"
    assert "rank 0 of SLG for ada" in lines
    assert "problem" in lines
    assert "mounted" in lines
    assert {"no remount", "no write", "no raw write"} <= set(lines)


def test_login_is_the_user_with_all_groups(guest: Machine) -> None:
    user = guest.setup.user
    done = guest.ssh("id -un; id -u; id -g; id -Gn; pwd; echo $HOME; hostname; wc -l </run/vtorque/nodefile")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [user.name, str(user.uid), str(user.gid)]
    assert set(lines[3].split()) == {"lovelace", "engines", "users"}
    assert lines[4:] == [user.home, user.home, "guest-1", "2"]


def test_nobody_else_logs_in(guest: Machine) -> None:
    command = [part.replace("ada@", "root@") for part in guest.ssh_command("true")]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 255


def test_guest_sees_its_size(guest: Machine) -> None:
    done = guest.ssh("grep -c ^processor /proc/cpuinfo; free -m | awk '/^Mem/ {print $2}'")
    cpus, ram_mib = map(int, done.stdout.split())
    assert cpus == 2
    assert 400 <= ram_mib <= 512


def test_shares(guest: Machine) -> None:
    done = guest.ssh("echo kept >~/made && cat /opt-hpc/version && ! touch /opt-hpc/x")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1.0\n"
    made = home(guest) / "made"
    assert made.read_text() == "kept\n"
    assert made.stat().st_uid == guest.setup.user.uid


@pytest.mark.parametrize("status", [0, 3, 137])
def test_exit_status(guest: Machine, status: int) -> None:
    assert run_job(guest, f"exit {status}\n").returncode == status


def test_status_of_a_job_killed_by_a_signal(guest: Machine) -> None:
    done = run_job(guest, "kill -KILL $$\n")
    assert (done.returncode, done.stdout, done.stderr) == (137, "", "")


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/sh", "/no/such/shell"])
def test_job_environment(guest: Machine, shell: str) -> None:
    script = (
        'echo "$PBS_JOBID|$WORDS|$QUOTED|$DISTRO|${VT_JOB_SHELL-none}"\n'
        "pwd; umask; ulimit -n\necho aside >&2\nps -o pid,args | grep -c '[v]torque/run --job'\n"
    )
    done = run_job(guest, script, shell)
    assert done.returncode == 1  # of grep: the runner's second part has become the job
    assert done.stdout.splitlines()[0] == "7.server|two  words|a 'b' \"c\" $d|SLG|none"
    assert done.stdout.splitlines()[1:] == [guest.setup.user.home, "0027", "512", "0"]
    assert done.stderr == "aside\n"


def test_limits_can_be_raised_in_the_guest(guest: Machine) -> None:
    limits = "ulimit -n 65536; ulimit -l unlimited; ulimit -c unlimited; ulimit -s unlimited\n"
    done = run_job(guest, "ulimit -n; ulimit -l; ulimit -c; ulimit -s\n", settings=limits)
    assert done.stdout.split() == ["65536", "unlimited", "unlimited", "unlimited"], done.stderr


def test_script_chooses_its_interpreter_and_has_no_input(guest: Machine) -> None:
    done = run_job(guest, '#!/bin/awk -f\nBEGIN { print "awk"; while (getline > 0) print }\n')
    assert (done.stdout, done.stderr) == ("awk\n", "")


def test_signals_reach_the_job(guest: Machine) -> None:
    script = "trap 'echo usr1' USR1\ntrap 'echo int' INT\ntrap 'echo term; exit 9' TERM\necho up\n"
    job = guest.start_job(put_job(guest, script + "while :; do sleep 0.1; done\n"))
    try:
        assert job.stdin is not None and job.stdout is not None
        for name, answer in (("", "up\n"), ("USR1", "usr1\n"), ("SIGINT", "int\n"), ("TERM", "term\n")):
            if name:
                job.stdin.write(f"{name}\n")
                job.stdin.flush()
            assert job.stdout.readline() == answer
        assert job.wait(timeout=30) == 9
    finally:
        job.kill()
        job.communicate()


def test_lost_connection_ends_the_job(guest: Machine) -> None:
    job = guest.start_job(put_job(guest, "trap '' HUP TERM\nsetsid -w true\necho up\nsleep 1234 & sleep 1235\n"))
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == "up\n"
        job.send_signal(signal.SIGKILL)
        job.wait()
        deadline = time.monotonic() + 40
        while guest.ssh("ps | grep '[s]leep 123'").stdout:
            assert time.monotonic() < deadline, "the job outlives its connection"
            time.sleep(1)
    finally:
        job.kill()
        job.communicate()


def test_what_the_job_leaves_behind_ends_with_it(guest: Machine) -> None:
    started = time.monotonic()
    done = run_job(guest, "sleep 1234 &\nexit 0\n")
    assert done.returncode == 0
    assert time.monotonic() - started < 60
    assert guest.ssh("ps | grep '[s]leep 1234'").stdout == ""


# on a terminal


class Session:
    """An interactive job in the guest, started by ssh."""

    def __init__(self, guest: Machine, script: str = "", shell: str = "/bin/bash", settings: str = "") -> None:
        self.guest = guest
        file = put_job(guest, script, shell, settings if script else f"{settings}VT_JOB_SCRIPT=\n")
        self.status = home(guest) / "status"
        self.status.unlink(missing_ok=True)
        self.pid, self.screen = guest.start_on_terminal(file, f"{guest.setup.user.home}/status")

    def ended(self) -> tuple[int, str]:
        """The exit status of ssh, the same in the status file, and what was still said."""
        said = self.screen.rest()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.screen.close()
        assert self.status.read_text() == f"{status}\n"
        self.nothing_is_left()
        return status, said

    def nothing_is_left(self) -> None:
        left = "ps | grep -e '[s]leep 12' -e '[v]torque/run' -e 'pts/[0-9]'; ls -d /tmp/vtorque.*"
        deadline = time.monotonic() + 40
        while said := self.guest.ssh(left).stdout:
            assert time.monotonic() < deadline, said
            time.sleep(0.5)


@pytest.mark.parametrize(
    ("shell", "prompt"), [("/bin/bash", r"bash-5\S*\$ "), ("/bin/sh", r"~ \$ "), ("/no/such/shell", r"~ \$ ")]
)
def test_a_login_shell_on_a_terminal(guest: Machine, shell: str, prompt: str) -> None:
    session = Session(guest, shell=shell)
    screen = session.screen
    screen.expect(prompt)
    screen.type("tty; stty size; umask; ulimit -n; echo $TERM $PBS_JOBID $DISTRO ${VT_JOB_SHELL-none}; pwd\n")
    screen.expect(r"/dev/pts/\d+\r\n40 100\r\n0027\r\n512\r\nxterm 7\.server SLG none\r\n/home/ada\r\n")
    set_size(screen.fd, 33, 111)
    os.kill(session.pid, signal.SIGWINCH)
    screen.type("sleep 1; stty size\n")
    screen.expect(r"\n33 111\r\n")
    screen.type("sleep 1234\n")
    screen.expect(r"sleep 1234\r\n")
    time.sleep(1)
    screen.type("\x03")
    screen.expect(prompt)
    screen.type("sleep 1235\n")
    screen.expect(r"sleep 1235\r\n")
    time.sleep(1)
    screen.type("\x1a")
    screen.expect(r"Stopped[\s\S]*" + prompt)
    screen.type("bg; sleep 1236 & trap '' HUP; setsid -w true; (trap '' HUP TERM; sleep 1237) & exit 7\n")
    if shell == "/bin/bash":
        screen.expect("logout")
    assert session.ended()[0] == 7


ON_TERMINAL = """#!/bin/sh
test -t 0 && test -t 2 && echo $# "$2"
trap 'echo int' INT
sleep 1238
sleep 1239 &
kill -9 $$
"""


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/sh"])
def test_a_script_on_a_terminal(guest: Machine, shell: str) -> None:
    session = Session(guest, ON_TERMINAL, shell, "VT_JOB_ARGUMENTS='1 \"a  b\"'\n")
    session.screen.expect(r"2 a  b\r\n")
    time.sleep(1)
    session.screen.type("\x1a\x03")  # the first would leave it stopped for good
    assert session.ended()[0] == 128 + 9


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_terminal_that_is_hung_up_ends_all(guest: Machine, how: signal.Signals) -> None:
    session = Session(guest, "#!/bin/bash\ntrap '' HUP TERM INT\nsleep 1240 & echo up\nwhile :; do sleep 1241; done\n")
    session.screen.expect("up")
    os.kill(session.pid, how)
    session.screen.rest()
    os.waitpid(session.pid, 0)
    session.screen.close()
    session.nothing_is_left()
    assert not session.status.exists()


def test_an_interactive_job_whose_directory_is_not_there(guest: Machine) -> None:
    session = Session(guest, settings="cd /nowhere || exit 1\n")
    status, said = session.ended()
    assert status in (1, 2) and "nowhere" in said


def test_orders(guest: Machine) -> None:
    guest.send("identify")
    event = guest.wait_for("identify")
    assert event["family"] == "micro"
    assert event["ops"] == ["identify", "hosts", "mount", "quiesce", "freeze", "thaw", "shutdown"]
    guest.send("quiesce")
    assert guest.wait_for("quiesce")["status"] == 0
    assert guest.ssh("grep -c 9p /proc/mounts").stdout == "0\n"
    guest.send("mount")
    assert guest.wait_for("mount")["status"] == 0
    assert guest.ssh("grep -c ' 9p ' /proc/mounts").stdout == "2\n"
    hold = "cd ~ && mkdir -p x/y && cd x/y && exec 7>../../held && cp /bin/busybox ../sleep && exec ../sleep 1234"
    holder = subprocess.Popen(guest.ssh_command(hold), stdin=subprocess.DEVNULL)
    try:
        while not guest.ssh("ps | grep '[s]leep 1234' | grep -v cd").stdout:
            time.sleep(0.2)
        guest.send("quiesce")
        event = guest.wait_for("quiesce")
        said = decode(event["output"]).splitlines()
        assert event["status"] == 1 and len(said) == 3, said
        assert all(re.match(r"/home/ada: pid \d+, user ada, sleep, ", line) for line in said)
        assert {line.split(", ")[-1] for line in said} == {
            "working directory /home/ada/x/y", "program /home/ada/x/sleep", "file /home/ada/held",
        }  # fmt: skip
        assert guest.ssh("test -e /opt-hpc/version").returncode != 0, "what nobody held is let go of"
        assert guest.ssh("killall sleep; while ps | grep -q '[s]leep 1234'; do :; done").returncode == 0
    finally:
        holder.kill()
        holder.wait()
    guest.send("quiesce")
    event = guest.wait_for("quiesce")
    assert event["status"] == 0, decode(event["output"])
    guest.send("mount")
    assert guest.wait_for("mount")["status"] == 0
    guest.send("freeze")
    frozen = guest.wait_for("freeze")
    assert frozen["status"] and "not supported" in decode(frozen["output"]), "a guest in memory has no disk to stop"
    guest.send("thaw")
    assert guest.wait_for("thaw")["status"], "nothing was frozen"
    guest.send("nonsense")
    assert guest.wait_for("error")["op"] == "nonsense"


def test_a_session_outlives_its_connection(guest: Machine) -> None:
    session_outlives_its_connection(guest, put_job(guest, WRITER), home(guest))


def test_runner_without_a_job(guest: Machine) -> None:
    done = guest.ssh("/run/vtorque/run /nowhere")
    assert done.returncode == 70
    assert "cannot read /nowhere" in done.stderr


def test_shutdown_runs_the_epilogue_and_ends_qemu(guest: Machine) -> None:
    """The last check of the shared guest."""
    guest.send("shutdown")
    epilogue = guest.wait_for("epilogue")
    assert (epilogue["status"], decode(epilogue["output"])) == (4, "bye\n")
    assert guest.ended()


def test_failing_prologue_is_never_ready(setup_for: MakeSetup) -> None:
    with Machine(setup_for("micro", prologue="#!/bin/sh\necho because\nexit 5\n", mounts=())) as machine:
        prologue = machine.wait_for("prologue")
        assert (prologue["status"], decode(prologue["output"])) == (5, "because\n")
        machine.send("shutdown")
        assert machine.next_event()["event"] == "epilogue"
        assert machine.ended()


def test_share_that_cannot_be_mounted_is_reported(setup_for: MakeSetup) -> None:
    setup = setup_for("micro")
    setup.absent_shares = True
    with Machine(setup) as machine:
        event = machine.next_event()
        while event["event"] == "booted":
            event = machine.next_event()
        assert event["event"] == "failed"
        assert "cannot mount home (9p) on /home/ada" in decode(event["reason"])
        machine.send("shutdown")
        machine.wait_for("epilogue")
        assert machine.ended()
