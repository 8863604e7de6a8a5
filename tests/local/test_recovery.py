"""Starting, stopping, dying: what the daemon leaves and what it finds."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vsub.engines.local import client, records

from .conftest import DAEMON, System, User, alive


def test_start_returns_when_the_socket_listens_and_stop_when_all_is_gone(system: System, user: User) -> None:
    assert system.run(user)[1] == 0
    pid = system.pid
    assert system.daemon("status").returncode == 0
    assert system.daemon("stop").returncode == 0
    assert not alive(pid) and not Path(system.socket).exists()
    assert system.daemon("status").returncode == 3
    system.stop()
    started = system.daemon("start")
    assert (started.returncode, started.stdout, started.stderr) == (0, "", "")
    assert system.run(user)[1] == 0


def test_daemon_keeps_nothing_of_its_starter(system: System) -> None:
    assert os.getsid(system.pid) == system.pid
    descriptors = {str(path.readlink()) for path in Path(f"/proc/{system.pid}/fd").iterdir()}
    assert not [target for target in descriptors if target.startswith("pipe:")]


def test_foreground(system: System, user: User) -> None:
    system.stop()
    command = [sys.executable, "-I", "-c", DAEMON, "start", "--foreground", "--spool", str(system.spool)]
    with subprocess.Popen([*command, "--socket", system.socket], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"vtorque-local: listening on {system.socket}\n"
        assert system.run(user)[1] == 0
        process.terminate()
        assert process.wait(20) == 0


def test_one_daemon_per_spool_and_per_socket(system: System) -> None:
    second = system.daemon("start")
    assert second.returncode == 1 and "another daemon serves" in second.stderr
    third = system.daemon("start", "--spool", os.fspath(system.root / "spool2"))
    assert third.returncode == 1 and "another daemon listens" in third.stderr


def test_spool_that_others_can_change_is_refused(system: System) -> None:
    system.stop()
    system.mom_priv.chmod(0o777)
    refused = system.daemon("start")
    assert refused.returncode == 1 and str(system.mom_priv) in refused.stderr
    system.mom_priv.chmod(0o751)
    system.settings.chmod(0o666)
    refused = system.daemon("start")
    assert refused.returncode == 1 and "only root can write" in refused.stderr


def test_numbers_and_the_queue_survive(system: System, user: User) -> None:
    gate, hold = system.gate("gate"), system.gate("hold")
    first = system.submit(user, script=f"echo in > {gate.path}; read x < {hold.path}\n")
    second = system.submit(user, "-N", "x", "-v", "A=1 2", script="echo $A\n")
    gate.wait()
    system.stop()
    system.start()
    assert system.result(second)["exit_status"] == 0
    assert (user.home / "x.o2").read_text() == "1 2\n"
    assert system.result(first) == {"exit_status": 271, "reason": "batch server stopped"}
    assert system.run(user) == (f"3.{system.host}", 0)


def test_stop_in_the_prologue_keeps_the_job(system: System, user: User) -> None:
    gate = system.gate("gate")
    hook = system.hook("prologue", f"echo in > {gate.path}; sleep 987")
    system.hook("epilogue")
    job = system.submit(user)
    gate.wait()
    system.stop()
    assert system.order() == ["prologue", "epilogue"]
    hook.unlink()
    system.start()
    assert system.result(job)["exit_status"] == 0


def test_stop_ends_a_prologue_of_a_deleted_job(system: System, user: User) -> None:
    gate = system.gate("gate")
    system.hook("prologue", f"echo in > {gate.path}; exec sleep 1.97")
    job = system.submit(user)
    gate.wait()
    system.qdel(job)
    assert system.result(job)["exit_status"] == 271
    [pid] = _running("sleep\0001.97")
    system.stop()
    assert not alive(int(pid))


def _running(text: str) -> list[str]:
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if text in path.read_bytes().decode()]


def test_killed_while_a_script_runs(system: System, user: User) -> None:
    gate = system.gate("gate")
    system.hook("epilogue")
    job = system.submit(user, "-N", "x", script=f"echo begun; sleep 986 & echo in > {gate.path}; wait\n")
    gate.wait()
    system.kill()
    assert user.processes()
    system.start()
    assert system.result(job)["exit_status"] == -4
    assert user.processes() == []
    assert system.order() == ["epilogue"]
    assert (user.home / "x.o1").read_text() == "begun\n"
    assert "the batch server was restarted" in (user.home / "x.e1").read_text()


def test_killed_in_a_prologue(system: System, user: User) -> None:
    gate = system.gate("gate")
    hook = system.hook("prologue", f"echo in > {gate.path}; sleep 984")
    system.hook("epilogue")
    job = system.submit(user, script="exit 8\n")
    gate.wait()
    system.kill()
    hook.unlink()
    system.start()
    assert system.result(job)["exit_status"] == 8
    assert system.order() == ["prologue", "epilogue", "epilogue"]
    assert _running("sleep\000984") == []


def test_killed_in_an_epilogue(system: System, user: User) -> None:
    gate = system.gate("gate")
    hook = system.hook("epilogue", f"echo in > {gate.path}; sleep 983")
    job = system.submit(user, "-N", "x", script="echo done; exit 5\n")
    gate.wait()
    system.kill()
    hook.write_text(hook.read_text().replace("sleep 983", ":"))
    system.start()
    assert gate.wait() == "in\n"
    assert system.result(job)["exit_status"] == 5
    assert (user.home / "x.o1").read_text() == "done\n"
    assert _running("sleep\000983") == []


def test_recovery_leaves_a_process_alone_that_only_has_the_number(system: System, user: User) -> None:
    """A recorded pid that now belongs to something else is not signalled."""
    gate = system.gate("gate")
    job = system.submit(user, script=f"echo in > {gate.path}; sleep 982\n")
    gate.wait()
    system.kill()
    while user.processes():  # a shell that is about to end may have started something
        for pid in user.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    bystander = os.posix_spawn("/bin/sleep", ["sleep", "981"], {}, setsid=True)
    record = system.spool / "server_priv" / "jobs" / f"{job}.json"
    text = record.read_text()
    state = text.split('"marks": [[')[1].split("]]")[0]
    record.write_text(text.replace(state, state.replace(state.split(",")[0], str(bystander), 1)))
    system.start()
    assert system.result(job)["exit_status"] == -4
    assert os.waitpid(bystander, os.WNOHANG) == (0, 0)
    os.kill(bystander, signal.SIGKILL)
    os.waitpid(bystander, 0)


def test_unreadable_records_are_put_aside(system: System, user: User) -> None:
    system.stop()
    jobs = system.spool / "server_priv" / "jobs"
    (jobs / "7.x.json").write_text("{")
    system.start()
    assert (jobs / "7.x.unreadable").exists() and "put aside" in system.log()
    assert client.job_state(system.socket, "7") is None
    assert system.run(user)[1] == 0
    (jobs / "7.x.unreadable").unlink()


def test_waiting_client_sees_the_end_of_the_daemon(system: System, user: User) -> None:
    gate, hold = system.gate("gate"), system.gate("hold")
    system.submit(user, script=f"read x < {hold.path}\n")
    job = system.submit(user, script=f"echo in > {gate.path}\n")
    with client.completion(system.socket, job) as connection:
        connection.settimeout(20)
        system.stop()
        assert connection.recv(100) == b""
    system.start()
    assert gate.wait() == "in\n"
    assert system.result(job)["exit_status"] == 0


@pytest.mark.parametrize("when", ["prologue", "script"])
@pytest.mark.parametrize("lasting", [False, True])
def test_epilogues_run_after_a_fault(
    system: System, user: User, monkeypatch: pytest.MonkeyPatch, when: str, lasting: bool
) -> None:
    """A full disk must not leave a guest behind: the epilogue is what ends it."""
    system.stop()
    full = system.record / "full"
    write_whole = records.write_whole

    def write(path: Path, data: bytes, **how: bool) -> None:
        if full.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
        write_whole(path, data, **how)

    monkeypatch.setattr(records, "write_whole", write)
    system.start()  # a fork of this process
    system.hook("prologue", f"touch {full}; chmod 666 {full}" if when == "prologue" else "")
    system.hook("epilogue", "" if lasting else f"rm {full}")
    job = system.submit(user, script=f"touch {full}\n")
    result = system.result(job)
    assert "fault of the batch server" in str(result["reason"]) and "No space left" in str(result["reason"])
    assert result["exit_status"] in (-3, 0)
    assert system.order() == ["prologue", "epilogue"]
    full.unlink(missing_ok=True)
    assert system.run(user)[1] in (0, -3)
    full.unlink(missing_ok=True)


def test_epilogues_run_after_a_fault_before_the_script(
    system: System, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    system.stop()

    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("vsub.engines.local.workspace.write_task_file", broken)
    system.start()
    system.hook("prologue")
    system.hook("epilogue")
    assert system.result(system.submit(user)) == {"exit_status": -3, "reason": "fault of the batch server: boom"}
    assert system.order() == ["prologue", "epilogue"]
