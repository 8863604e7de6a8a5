"""`qsub -I`: the user's terminal is the job's, and nothing of either is left when one of them ends."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any, Optional

import pytest

from vsub.engines.local import client, interactive, qstat, qsub

from .conftest import PATIENCE_S, System, User

assert interactive  # loaded before the user does it, who may not be able to read it

COOKED = termios.ICANON | termios.ECHO | termios.ISIG


class Session:
    """A `qsub` on a pseudo terminal of its own, and what a person in front of it would see."""

    def __init__(self, system: System, user: User, *arguments: str, size: tuple[int, int] = (33, 99)) -> None:
        self.seen = ""
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
        self._before = termios.tcgetattr(slave)
        self.pid = os.fork()
        if self.pid == 0:
            self._become_qsub(system, user, slave, arguments)
        self._slave = slave
        self._status: Optional[int] = None

    def _become_qsub(self, system: System, user: User, slave: int, arguments: tuple[str, ...]) -> None:
        status = 99
        try:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            for number in (0, 1, 2):
                os.dup2(slave, number)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            os.initgroups(user.name, user.gid)
            os.setresgid(user.gid, user.gid, user.gid)
            os.setresuid(user.uid, user.uid, user.uid)
            os.chdir(user.home)
            os.environ.clear()
            os.environ.update({"HOME": str(user.home), "LOGNAME": user.name, "TERM": "vt220", "PATH": "/bin:/usr/bin"})
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = qsub.qsub_main(list(arguments), system.socket)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait until the terminal shows it; what comes before it is done with."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            match = re.search(pattern, self.seen)
            if match is not None:
                self.seen = self.seen[match.end() :]
                return match
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} does not come: {self.seen!r}"
            self.seen += os.read(self.master, 65536).decode()

    def shows(self, text: str, within_s: float) -> bool:
        """Whether the terminal shows it, or does so soon."""
        if text not in self.seen and select.select([self.master], [], [], within_s)[0]:
            self.seen += os.read(self.master, 65536).decode()
        return text in self.seen

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def job(self) -> str:
        """Wait for the job's start; its id."""
        job = self.expect(r"qsub: waiting for job (\S+) to start\r\n")[1]
        self.expect(f"qsub: job {re.escape(job)} ready\r\n\r\n")
        return job

    def raw(self) -> bool:
        """Whether keys are handed over as they are."""
        return termios.tcgetattr(self._slave)[3] & COOKED == 0

    def end(self) -> int:
        """Wait for the end of qsub, which leaves the terminal as it was; its exit status."""
        if self._status is None:
            pidfd = os.pidfd_open(self.pid)
            assert select.select([pidfd], [], [], PATIENCE_S)[0], f"qsub does not end: {self.seen!r}"
            os.close(pidfd)
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert termios.tcgetattr(self._slave) == self._before
        return self._status

    def kill(self) -> None:
        """KILL for qsub, and its end."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._status = -signal.SIGKILL

    def close(self) -> bool:
        """Whether qsub had to be killed."""
        left = self._status is None
        if left:
            self.kill()
        os.close(self.master)
        os.close(self._slave)
        return left


Start = Callable[..., Session]


@pytest.fixture
def start(system: System, user: User) -> Iterator[Start]:
    """Starts sessions, and ends those that are left."""
    user.write(".profile", "PS1='pro''mpt> '; bind 'set enable-bracketed-paste off' 2> /dev/null\n")
    sessions: list[Session] = []

    def begin(*arguments: str, **how: Any) -> Session:
        sessions.append(Session(system, user, *arguments, **how))
        return sessions[-1]

    yield begin
    left = [session for session in sessions if session.close()]
    if left:
        system.stop()  # which ends their jobs


def test_a_shell_of_the_user_on_a_terminal_of_its_own(system: System, user: User, start: Start) -> None:
    for name in ("prologue", "prologue.user", "epilogue.user", "epilogue"):
        system.hook(name, f"echo says {name}; tty")
    session = start("-I", "-N", "x", "-v", "GIVEN=here")
    job = session.job()
    session.expect("says prologue\r\nnot a tty\r\nsays prologue.user\r\n")
    session.expect("prompt> ")
    assert session.raw()
    session.type("stty size; echo $0 $TERM $PBS_ENVIRONMENT $PBS_JOBID $GIVEN $ENVIRONMENT.; pwd; umask; tty\r")
    session.expect(f"33 99\r\n-bash vt220 PBS_INTERACTIVE {re.escape(job)} here \\.\r\n")
    session.expect(f"{user.home}\r\n0077\r\n/dev/pts/")
    session.type("ls -l $(tty); ls " + str(system.mom_priv / "jobs") + " 2>&1; stty -a; exit 5\r")
    session.expect(f"crw--w---- 1 {user.name} tty")
    session.expect("intr = \\^C")
    session.expect(f"\r\nqsub: job {re.escape(job)} completed\r\n")
    assert "says" not in session.seen
    assert session.end() == 0
    assert system.result(job) == {"exit_status": 5, "reason": ""}
    assert system.order() == ["prologue", "prologue.user", "epilogue.user", "epilogue"]
    assert system.calls("prologue")[0]["arg8"] == f"{system.mom_priv}/jobs/{job}.SC"
    assert system.calls("epilogue")[0]["arg10"] == "5"
    assert not list(user.home.glob("x*"))


def test_attributes(system: System, user: User, start: Start) -> None:
    script = user.write("job.sh", "#PBS -N named\nread x\n", 0o755)
    session = start("-I", "-x", str(script))
    job = session.job()
    text = user.call(lambda: qstat.qstat_main(["-f", "-1", job], system.socket)).out
    assert "    interactive = True\n" in text and f"    inter_cmd = {script}\n" in text
    assert "    Rerunable = False\n" in text and "    Job_Name = named\n" in text
    assert "Output_Path" not in text
    assert system.qrerun(job) == 192
    session.type("\r")
    assert session.end() == 0


def test_x_starts_exactly_what_was_given(system: System, user: User, start: Start) -> None:
    user.write("job.sh", "#!/bin/sh\n#PBS -l walltime=60\necho $0; exit 3\n", 0o755)
    user.write(".profile", "tr '\\0' ' ' < /proc/$$/cmdline\n")
    session = start("-I", "-x", "./job.sh", "ignored")
    job = session.job()
    session.expect(r"-bash -c \./job\.sh \./job\.sh\r\n")
    session.expect("completed")
    assert session.end() == 0
    assert system.result(job)["exit_status"] == 3


def test_the_script_of_an_interactive_job_is_read_for_its_directives_only(user: User, start: Start) -> None:
    user.write("job.sh", "#PBS -v DIRECTIVE=counts\necho never\n")
    session = start("-I", "job.sh")
    session.job()
    session.expect("prompt> ")
    session.type("echo it $DIRECTIVE\r")
    session.expect("it counts\r\n")
    session.type("exit\r")
    assert session.end() == 0
    assert "never" not in session.seen


def test_keys_reach_the_foreground_process_of_the_job(system: System, user: User, start: Start) -> None:
    session = start("-I", "-S", "/bin/bash")
    session.job()
    session.expect("prompt> ")
    session.type("sleep 977\r")
    session.expect("977\r\n")
    _until_running(user, "sleep\0977")
    session.type("\x03echo status $?\r")
    session.expect("status 130\r\n")
    session.type("sleep 978\r")
    session.expect("978\r\n")
    _until_running(user, "sleep\0978")
    session.type("\x1a")
    session.expect("Stopped")
    session.type("cat\r")
    _until_running(user, "cat\0")
    session.type("\x04exec true\r")
    assert session.end() == 0
    assert user.processes() == []


def _until_running(user: User, text: str) -> None:
    """A process that has come to life tells nobody; this looks for it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for pid in user.processes():
            try:
                with open(f"/proc/{pid}/cmdline") as file:
                    if text in file.read():
                        return
            except (FileNotFoundError, ProcessLookupError):
                pass
        time.sleep(0.02)
    raise AssertionError(f"{text!r} does not run")


def test_later_resizes_are_not_forwarded(start: Start) -> None:
    session = start("-I", size=(11, 22))
    session.job()
    session.expect("prompt> ")
    fcntl.ioctl(session.master, termios.TIOCSWINSZ, struct.pack("4H", 44, 55, 0, 0))
    session.type("stty size\r")
    session.expect("11 22\r\n")
    session.type("exit\r")
    assert session.end() == 0


def test_a_flood_of_output_and_input(user: User, start: Start) -> None:
    session = start("-I", "-S", "/bin/bash")
    session.job()
    session.expect("prompt> ")
    session.type("stty -echo; seq 100000 | tail -n 60000; echo d''one\r")
    session.expect("\r\n100000\r\ndone\r\n")
    session.type("wc -c\r")
    _until_running(user, "wc\0-c")
    for _ in range(40):
        session.type("x" * 99 + "\r")
    session.type("\x04")
    session.expect("4000\r\n")
    session.type("exit\r")
    assert session.end() == 0


def test_tilde_dot_ends_the_job(system: System, user: User, start: Start) -> None:
    session = start("-I")
    job = session.job()
    session.expect("prompt> ")
    session.type("sleep 976\r")
    session.expect("976\r\n")
    session.type("~.")
    assert session.end() == 0
    assert system.result(job)["reason"] == "its qsub has gone"
    assert user.processes() == []


@pytest.mark.parametrize("when", ["prologue", "script"])
def test_killed_qsub_ends_the_job(system: System, user: User, start: Start, when: str) -> None:
    gate = system.gate("gate")
    system.hook("epilogue")
    if when == "prologue":
        system.hook("prologue", f"echo in > {gate.path}; sleep 0.5; echo still")
    session = start("-I")
    job = session.job()
    if when == "script":
        session.expect("prompt> ")
        session.type(f"sleep 975 & echo in > {gate.path}; sleep 974\r")
    gate.wait()
    session.kill()
    assert system.result(job)["reason"] == "its qsub has gone"
    assert "epilogue" in system.order()
    assert user.processes() == []
    assert system.run(user)[1] == 0


def test_hang_up_restores_the_terminal(system: System, user: User, start: Start) -> None:
    session = start("-I")
    job = session.job()
    session.expect("prompt> ")
    os.kill(session.pid, signal.SIGTERM)  # ignored while the job runs
    os.kill(session.pid, signal.SIGINT)
    session.type("echo still here\r")
    session.expect("\nstill here\r\n")
    os.kill(session.pid, signal.SIGHUP)
    assert session.end() == 0
    assert system.result(job)["reason"] == "its qsub has gone"


@pytest.fixture
def blocked(system: System, user: User) -> Iterator[Callable[[], None]]:
    """While a batch job runs nothing else starts; the result lets it end."""
    gate, hold = system.gate("blocked"), system.gate("hold")
    job = system.submit(user, script=f"echo in > {gate.path}; read x < {hold.path}\n")
    gate.wait()

    def release() -> None:
        hold.open()
        system.result(job)

    yield release
    if client.job_state(system.socket, job).letter != "C":  # type: ignore[union-attr]
        release()


def test_waiting_and_the_question(system: System, user: User, start: Start, blocked: Callable[[], None]) -> None:
    session = start("-I")
    job = session.expect(r"qsub: waiting for job (\S+) to start\r\n")[1]
    session.type("\x03")
    session.expect(re.escape("Do you wish to terminate the job and exit (y|[n])? "))
    session.type("what\r")
    session.expect("yes or no please\r\n")
    session.type("n\r")
    os.kill(session.pid, signal.SIGTSTP)
    session.expect("you cannot suspend qsub")
    assert client.job_state(system.socket, job).letter == "Q"  # type: ignore[union-attr]
    while not session.shows("Do you wish", 0.2):
        os.kill(session.pid, signal.SIGTERM)  # one that comes while the last answer is read is ignored
    session.expect("Do you wish")
    session.type("y\r")
    session.expect(f"Job {re.escape(job)} is being deleted\r\n")
    assert session.end() == 0
    assert system.result(job) == {"exit_status": 271, "reason": "deleted"}
    blocked()


def test_deleted_while_waiting(system: System, start: Start, blocked: Callable[[], None]) -> None:
    session = start("-I")
    job = session.expect(r"waiting for job (\S+) to")[1]
    assert system.qdel(job) == 0
    session.expect(f"qsub: Job {re.escape(job)} was canceled while waiting to start\r\n")
    assert session.end() == 1


def test_killed_while_waiting(system: System, start: Start, blocked: Callable[[], None]) -> None:
    session = start("-I")
    job = session.expect(r"waiting for job (\S+) to")[1]
    session.kill()
    assert system.result(job) == {"exit_status": 271, "reason": "its qsub has gone"}


def test_held_job_waits(system: System, user: User, start: Start) -> None:
    session = start("-I", "-h")
    job = session.expect(r"waiting for job (\S+) to start\r\n")[1]
    assert client.job_state(system.socket, job).letter == "H"  # type: ignore[union-attr]
    assert user.call(lambda: client.qrls_main([job], system.socket)).status == 0
    session.expect("prompt> ")
    session.type("exit\r")
    assert session.end() == 0


def test_deleted_while_running(system: System, user: User, start: Start) -> None:
    system.hook("epilogue")
    session = start("-I")
    job = session.job()
    session.expect("prompt> ")
    assert system.qdel(job) == 0
    session.expect("completed")
    assert session.end() == 0
    assert system.result(job)["reason"] == "deleted"
    assert system.calls("epilogue")[0]["arg10"] in ("265", "271")


def test_walltime_is_said(start: Start) -> None:
    session = start("-I", "-l", "walltime=1")
    session.job()
    session.expect(r"=>> PBS: job killed: walltime 2 exceeded limit 1\r\n")
    session.expect("completed")
    assert session.end() == 0


@pytest.mark.parametrize("status", [1, 2])
def test_failing_prologue_aborts(system: System, start: Start, status: int) -> None:
    system.hook("prologue", f"echo refused; exit {status}")
    session = start("-I")
    job = session.job()
    session.expect("refused\r\n")
    session.expect("completed")
    assert session.end() == 0
    assert system.result(job)["exit_status"] == -2
    assert system.order() == ["prologue"]


def test_deleted_in_the_prologue(system: System, start: Start) -> None:
    gate, hold = system.gate("gate"), system.gate("hold")
    system.hook("prologue", f"echo in > {gate.path}; read x < {hold.path}; echo late")
    session = start("-I")
    job = session.job()
    gate.wait()
    assert system.qdel(job) == 0
    session.expect("completed")
    assert session.end() == 0
    assert system.result(job)["exit_status"] == 271
    hold.open()


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_end_of_the_daemon(system: System, user: User, start: Start, how: str) -> None:
    system.hook("epilogue")
    running, waiting = start("-I"), None
    job = running.job()
    running.expect("prompt> ")
    running.type("sleep 973\r")
    running.expect("973\r\n")
    waiting = start("-I")
    queued = waiting.expect(r"waiting for job (\S+) to")[1]
    if how == "kill":
        system.kill()
        running.expect("qsub: the batch server has gone, and with it job")
        waiting.expect("qsub: the batch server has gone")
        assert (running.end(), waiting.end()) == (111, 111)
    else:
        system.stop()
        running.expect("completed")
        waiting.expect("was canceled while waiting")
        assert (running.end(), waiting.end()) == (0, 1)
    system.start()
    assert system.result(queued)["exit_status"] == 271
    assert system.result(job)["exit_status"] in (-4, 265, 271)
    assert user.processes() == []
    assert system.order() == ["epilogue"]
    assert system.run(user)[1] == 0


# --- without a terminal


def without_terminal(system: System, user: User, *arguments: str) -> tuple[int, str, str]:
    done = system.qsub(user, *arguments, script="")
    return done.status, done.out, done.err


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("-I",), 1, "qsub:\tstandard input and output must be a terminal for \n\tinteractive job submission\n"),
        (("-x", "job.sh"), 2, "qsub: '-x' invalid on non-interactive job\n"),
        (("-x", "-I", "job.sh"), 2, "qsub: '-x' invalid on non-interactive job\n"),
        (("-I", "-x"), 2, "qsub: '-x' used without a script specified\n"),
        (("-I", "-t", "1-3"), 2, "qsub: interactive job can not be job array.\n"),
        (("-I", "nothing.sh"), 1, "qsub: script file 'nothing.sh' cannot be loaded - No such file or directory\n"),
        (("-I", "."), 1, "qsub: script not a file\n"),
    ],
)
def test_refusals(system: System, user: User, arguments: tuple[str, ...], status: int, text: str) -> None:
    user.write("job.sh", "true\n")
    assert without_terminal(system, user, *arguments) == (status, "", text)


def test_x_needs_no_terminal_but_something_to_read(system: System, user: User) -> None:
    """An end of the input ends the job, as with TORQUE; a pipe that stays open does not."""
    user.write("job.sh", "#!/bin/bash\nstty size; read x; echo got $x\n", 0o755)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        done = user.call(lambda: (os.dup2(read, 0), qsub.qsub_main(["-I", "-x", "./job.sh"], system.socket))[1])
        good = (done.status, done.err) == (0, "") and "20 80\r\n" in done.out and "got that\r\n" in done.out
        sys.stderr.write("" if good else repr(done))
        os._exit(0 if good else 1)
    os.close(read)
    os.write(write, b"that\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(write)
    status, out, _ = without_terminal(system, user, "-I", "-x", "./job.sh")
    assert status == 0 and "completed" not in out
    assert system.result("2")["reason"] == "its qsub has gone"
