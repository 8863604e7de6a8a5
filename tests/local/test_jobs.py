"""What a job gets and what comes back: environment, limits, output files, exit statuses, qstat."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from vsub.engines.local import client, qstat, qsub

from .conftest import System, User


def test_script_runs_as_a_login_shell_of_the_user(system: System, user: User) -> None:
    user.write(".profile", "echo profile\n")
    script = 'echo "$0" "$@"; id -u; id -g; pwd; umask; echo "$PBS_JOBID $PBS_ENVIRONMENT"; cat; ulimit -c\n'
    job, status = system.run(user, "-N", "x", "-F", "one two", script="#!/bin/bash\n" + script)
    path = f"{system.mom_priv}/jobs/{job}.SC"
    lines = (user.home / "x.o1").read_text().splitlines()
    assert (status, lines[:2]) == (0, ["profile", f"{path} one two"])
    assert lines[2:7] == [str(user.uid), str(user.gid), str(user.home), "0077", f"{job} PBS_BATCH"]


def test_environment(system: System, user: User) -> None:
    where = user.home / "sub"
    where.mkdir()
    os.chown(where, user.uid, user.gid)
    environment = {"ALL": "1", "PBS_JOBID": "forged", "LANG": "C.UTF-8", "GIVEN": "from here"}
    script = "env -0 > $PBS_O_WORKDIR/env\n"
    options = ("-V", "-v", "A=b c,GIVEN,Q='x,y'", "-l", "nodes=1:ppn=2,walltime=90", "-q", "long", "-N", "x")
    job = system.submit(user, *options, script=script, env=environment, cwd=where)
    assert system.result(job)["exit_status"] == 0
    seen = dict(item.split("=", 1) for item in (where / "env").read_text().split("\0") if item)
    expected = {
        "ALL": "1",
        "A": "b c",
        "Q": "x,y",
        "GIVEN": "from here",
        "HOME": str(user.home),
        "LOGNAME": user.name,
        "USER": user.name,
        "SHELL": "/bin/bash",
        "MAIL": f"/var/mail/{user.name}",
        "PBS_JOBID": job,
        "PBS_JOBNAME": "x",
        "PBS_ENVIRONMENT": "PBS_BATCH",
        "PBS_QUEUE": "long",
        "PBS_O_WORKDIR": str(where),
        "PBS_O_HOST": system.host,
        "PBS_O_HOME": str(user.home),
        "PBS_O_LANG": "C.UTF-8",
        "PBS_NODENUM": "0",
        "PBS_VNODENUM": "0",
        "PBS_TASKNUM": "1",
        "PBS_NUM_NODES": "1",
        "PBS_NUM_PPN": "2",
        "PBS_NP": "2",
        "PBS_WALLTIME": "90",
        "PBS_MOMPORT": "15003",
        "PBS_NODEFILE": f"{system.spool}/aux/{job}",
    }
    assert {name: seen.get(name) for name in expected} == expected


def test_directives_and_command_line(system: System, user: User) -> None:
    lines = ["#!/bin/sh", "#PBS -N named -W umask=027", "#PBS -l walltime=1:00 # a comment", "#PBS -j oe"]
    script = user.write("job.sh", "\n".join([*lines, "umask; echo err >&2", "#PBS -N toolate"]) + "\n")
    job = system.submit(user, "-W", "umask=022", str(script))
    assert system.result(job)["exit_status"] == 0
    assert (user.home / "named.o1").read_text() == "0022\nerr\n"
    assert (user.home / "named.o1").stat().st_mode & 0o777 == 0o644
    assert not (user.home / "named.e1").exists()


def test_working_directories(system: System, user: User) -> None:
    assert system.run(user, "-N", "d", "-d", "/usr/bin", script="pwd\n")[1] == 0
    assert (user.home / "d.o1").read_text() == "/usr/bin\n"
    (user.home / "w").mkdir()
    os.chown(user.home / "w", user.uid, user.gid)
    system.run(user, "-N", "w", "-w", "w", script="pwd; echo $PBS_O_WORKDIR\n")
    assert (user.home / "w" / "w.o2").read_text() == f"{user.home}\n{user.home}/w\n"
    _, status = system.run(user, "-N", "n", "-d", "/nowhere", script="pwd\n")
    assert status != 0
    assert "chdir to /nowhere failed" in (user.home / "n.e3").read_text()


def test_shell(system: System, user: User) -> None:
    system.run(user, "-N", "x", "-S", "/bin/dash", script="readlink /proc/$PPID/exe; echo $SHELL\n")
    assert (user.home / "x.o1").read_text() == "/usr/bin/dash\n/bin/dash\n"


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 3\n", 3), ("kill -9 $$\n", 137), ("kill -9 $PPID\n", 256 + signal.SIGKILL), ("exec false\n", 1)],
)
def test_exit_status(system: System, user: User, script: str, status: int) -> None:
    assert system.run(user, script="#!/bin/bash\n" + script)[1] == status


def test_limits(system: System, user: User) -> None:
    script = "ulimit -f; ulimit -v; ulimit -t; nice\nhead -c 5000 /dev/zero > big\necho $?\n"
    system.run(
        user, "-N", "x", "-l", "file=4kb,pvmem=1gb,pcput=77,nice=3", "-S", "/bin/bash", script="#!/bin/bash\n" + script
    )
    lines = (user.home / "x.o1").read_text().split()
    assert lines[:4] == ["4", str(1 << 20), "77", "3"]
    assert lines[4] != "0" and (user.home / "big").stat().st_size == 4096


def test_left_over_processes_of_the_session_are_ended(system: System, user: User) -> None:
    assert system.run(user, script="sleep 985 & sleep 986 & exit 4\n")[1] == 4
    assert user.processes() == []


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ((), {"x.o1": "out\n", "x.e1": "err\n"}),
        (("-j", "oe"), {"x.o1": "out\nerr\n"}),
        (("-j", "eo"), {"x.e1": "out\nerr\n"}),
        (("-o", "there", "-e", "d"), {"there": "out\n", "d/x.e1": "err\n"}),
        (("-o", "d/"), {"d/x.o1": "out\n", "x.e1": "err\n"}),
        (("-o", "localhost:there"), {"there": "out\n", "x.e1": "err\n"}),
        (("-o", "$PBS_JOBID.out", "-e", "/dev/null"), {"1.@HOST@.out": "out\n"}),
        (("-k", "oe", "-o", "d/ignored"), {"x.o1": "out\n", "x.e1": "err\n"}),
    ],
)
def test_output_files(system: System, user: User, options: tuple[str, ...], files: dict[str, str]) -> None:
    (user.home / "d").mkdir()
    os.chown(user.home / "d", user.uid, user.gid)
    system.run(user, "-N", "x", *options, script="echo out; echo err >&2\n")
    found = {str(path.relative_to(user.home)): path for path in user.home.rglob("*") if path.is_file()}
    assert {name: path.read_text() for name, path in found.items()} == {
        name.replace("@HOST@", system.host): text for name, text in files.items()
    }
    for path in found.values():
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (user.uid, 0o600)


def test_existing_destination_keeps_its_mode(system: System, user: User) -> None:
    path = user.write("out", "old and longer\n", 0o640)
    system.run(user, "-N", "x", "-o", "out", script="echo new\n")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new\n", 0o640)


@pytest.mark.parametrize("what", ["missing", "root", "fifo", "hanging"])
def test_what_cannot_be_delivered_is_kept(
    system: System, user: User, what: str, request: pytest.FixtureRequest
) -> None:
    target = {"missing": "/nowhere/x", "root": "/etc/x.out", "fifo": str(user.home / "f")}.get(what, "")
    if what == "fifo":
        os.mkfifo(target)
    elif what == "hanging":
        target = str(request.getfixturevalue("hanging") / "x")
    job = system.submit(user, "-N", "x", "-o", target, script="echo precious\n")
    result = system.result(job)
    kept = system.spool / "undelivered" / f"{job}.OU"
    assert result["exit_status"] == 0
    assert "undelivered" in str(result["reason"]) and "undelivered" in system.log()
    assert (kept.read_text(), kept.stat().st_uid) == ("precious\n", user.uid)
    assert not Path("/etc/x.out").exists()


def test_one_after_another_in_order(system: System, user: User, other: User) -> None:
    first, second = system.gate("first"), system.gate("second")
    blocked = system.submit(user, script=f"echo in > {first.path}; read x < {second.path}\n")
    assert first.wait() == "in\n"
    waiting = [system.submit(who, script=f"echo $PBS_JOBID >> {system.record}/order\n") for who in (other, user)]
    state = client.job_state(system.socket, waiting[0])
    assert state is not None and state.letter == "Q"
    assert client.job_state(system.socket, blocked).letter == "R"  # type: ignore[union-attr]
    second.open()
    for job in waiting:
        system.result(job)
    assert system.order() == waiting


def test_qstat(system: System, user: User, other: User) -> None:
    job, _ = system.run(user, "-N", "x", "-l", "nodes=1:ppn=2,walltime=60", "-o", "deep/down", script="exit 5\n")

    def status_of(who: User, *arguments: str) -> tuple[int, str, str]:
        return tuple(who.call(lambda: qstat.qstat_main(list(arguments), system.socket)))  # type: ignore[return-value]

    status, text, _ = status_of(user, "-f", "-1", job)
    shown = dict(line.strip().split(" = ", 1) for line in text.splitlines()[1:] if line)
    assert (status, text.splitlines()[0]) == (0, f"Job Id: {job}")
    assert shown["job_state"] == "C"
    assert shown["exit_status"] == "5"
    assert shown["exec_host"] == f"{system.host}/0-1"
    assert shown["Output_Path"] == f"{system.host}:{user.home}/deep/down"
    assert shown["Error_Path"] == f"{system.host}:{user.home}/x.e1"
    assert shown["Resource_List.walltime"] == "00:01:00"
    assert job in status_of(user)[1] and status_of(user, "1")[1] == status_of(user)[1]
    wrapped = status_of(user, "-f", job)[1]
    assert max(map(len, wrapped.splitlines())) <= 79
    assert wrapped.replace("\n\t", "") == text
    assert status_of(user, "77") == (153, "", "qstat: Unknown Job Id Error 77\n")
    assert status_of(other) == (0, "", "")
    status, out, err = status_of(other, "-f", job)
    assert (status, out) == (159, "") and "Unauthorized" in err
    assert other.call(lambda: client.qdel_main([job], system.socket)).status == 159


def test_completed_jobs_are_forgotten(system: System, user: User) -> None:
    system.configure(keep_completed_s=0)
    system.stop()
    system.start()
    job, _ = system.run(user)
    system.run(user)
    assert client.job_state(system.socket, job) is None
    assert not (system.spool / "server_priv" / "jobs" / f"{job}.json").exists()


def test_root_is_refused_as_torque_does(system: System, user: User) -> None:
    from vsub.engines.local import protocol

    message = {**message_of(user), "script_size": 0}
    with pytest.raises(protocol.Refused) as refusal:
        protocol.request(system.socket, message)
    assert str(refusal.value) == "Bad UID for job execution MSG=root user root not allowed"
    assert qsub.qsub_main([], system.socket) == 1


def message_of(user: User) -> dict[str, object]:
    from vsub.engines.local import options

    return qsub.build(options.Options(), "x", {"HOME": str(user.home)}, str(user.home), "h")


@pytest.mark.parametrize(
    ("arguments", "text", "status"),
    [
        (("-E",), "qsub: option -E is not supported by the embedded batch system\n", 2),
        (("-W", "depend=before:1"), "qsub: illegal -W dependency value: 'before:1' before is not supported", 2),
        (("-l", "walltime=soon"), "qsub: illegal -l value: 'soon' is not a time", 2),
        (("-l", "nodes=2"), "qsub: submit error (Job exceeds queue resource limits MSG=cannot locate feasible", 190),
        (("/nowhere",), "qsub: script file '/nowhere' cannot be loaded - No such file or directory", 1),
        (("-o", "elsewhere:/x"), "qsub: illegal -o value", 2),
    ],
)
def test_refusals(system: System, user: User, arguments: tuple[str, ...], text: str, status: int) -> None:
    done = system.qsub(user, *arguments)
    assert (done.status, done.out) == (status, "")
    assert done.err.startswith(text) and done.err.count("\n") == 1


def test_no_server(user: User) -> None:
    done = user.call(lambda: qsub.qsub_main([], "/nowhere/sock"), stdin=b"true\n")
    assert (done.status, done.err.count("\n")) == (111, 1)
