"""Which job starts when: holds, dependencies, priorities, dates; and what `-r` and `-T` say of a job."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from vsub.engines.local import client, qstat

from .conftest import ROOT, System, User

DELETED = 271


def letter(system: System, job: str) -> str:
    state = client.job_state(system.socket, job)
    assert state is not None
    return state.letter


def shown(system: System, job: str) -> dict[str, str]:
    """The attributes of a job or array."""
    from vsub.engines.local import protocol

    [(_, attributes)] = protocol.request(system.socket, {"op": "stat", "job": job})["jobs"]
    return {name: value for name, value in attributes}  # noqa: C416


def qrls(system: System, *arguments: str) -> int:
    return client.qrls_main(list(arguments), system.socket)


def qhold(system: System, *arguments: str) -> int:
    return client.qhold_main(list(arguments), system.socket)


class Blocked:
    """A job that runs until it is told to end."""

    def __init__(self, system: System, user: User, *arguments: str, status: int = 0) -> None:
        self._system = system
        number = len(list(system.record.glob("hold*")))
        self._begun, self._hold = system.gate(f"begun{number}"), system.gate(f"hold{number}")
        script = f"echo in > {self._begun.path}; read x < {self._hold.path}; exit {status}\n"
        self.job = system.submit(user, *arguments, script=script)

    def begun(self) -> None:
        assert self._begun.wait() == "in\n"

    def end(self) -> None:
        self._hold.open()
        self._system.result(self.job)


@pytest.fixture
def blocked(system: System, user: User) -> Iterator[Blocked]:
    """A job that runs: all others wait until it ends."""
    job = Blocked(system, user)
    job.begun()
    yield job
    if letter(system, job.job) != "C":
        job.end()


# --- holds


def test_hold_and_release(system: System, user: User, other: User) -> None:
    job = system.submit(user, "-h", script="exit 4\n")
    assert (letter(system, job), shown(system, job)["Hold_Types"]) == ("H", "u")
    assert system.run(user)[1] == 0
    assert other.call(lambda: qrls(system, job)).status == 159
    assert user.call(lambda: qrls(system, job)).status == 0
    assert system.result(job)["exit_status"] == 4
    assert qrls(system, job) == 0
    assert qrls(system, "99") == 153


def test_hold_a_queued_job(system: System, user: User, blocked: Blocked) -> None:
    job = system.submit(user)
    assert (letter(system, job), shown(system, job)["Hold_Types"]) == ("Q", "n")
    assert user.call(lambda: qrls(system, job)).status == 15174 % 256
    assert user.call(lambda: qhold(system, "-h", "u", job)).status == 0
    assert letter(system, job) == "H"
    assert " H batch" in user.call(lambda: qstat.qstat_main([job], system.socket)).out
    blocked.end()
    assert system.run(user)[1] == 0
    assert letter(system, job) == "H"
    assert qhold(system, "-h", "s", job) == 2
    assert system.qdel(job) == 0
    assert system.result(job) == {"exit_status": DELETED, "reason": "deleted"}
    assert qhold(system, job) == 170


# --- dependencies


@pytest.mark.parametrize(
    ("kind", "status", "runs"),
    [
        ("afterok", 0, True),
        ("afterok", 3, False),
        ("afternotok", 0, False),
        ("afternotok", 3, True),
        ("afterany", 0, True),
        ("afterany", 3, True),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_after_the_end(system: System, user: User, kind: str, status: int, runs: bool, finished: bool) -> None:
    first = Blocked(system, user, status=status)
    first.begun()
    if finished:
        first.end()
    job = system.submit(user, "-W", f"depend={kind}:{first.job}", script="exit 6\n")
    if not finished:
        assert (letter(system, job), shown(system, job)["Hold_Types"]) == ("H", "s")
        assert shown(system, job)["depend"] == f"{kind}:{first.job}"
        first.end()
    result = system.result(job)
    if runs:
        assert result["exit_status"] == 6
        assert "depend" not in shown(system, job)
    else:
        reason = f"Job deleted as result of dependency on job {first.job}"
        assert result == {"exit_status": DELETED, "reason": reason}


def test_after_the_start(system: System, user: User, blocked: Blocked) -> None:
    other = Blocked(system, user)
    job = system.submit(user, "-W", f"depend=after:{other.job}:{blocked.job}")
    assert shown(system, job)["depend"] == f"after:{other.job}"
    blocked.end()
    other.begun()
    assert letter(system, job) == "Q"
    other.end()
    assert system.result(job)["exit_status"] == 0


def test_after_a_start_that_never_comes(system: System, user: User, blocked: Blocked) -> None:
    other = system.submit(user, "-h")
    job = system.submit(user, "-W", f"depend=after:{other}")
    assert system.qdel(other) == 0
    assert system.result(job)["exit_status"] == DELETED


def test_the_end_of_what_never_ran_lets_others_start(system: System, user: User) -> None:
    held = system.submit(user, "-h")
    job = system.submit(user, "-W", f"depend=afterany:{held}", script="exit 2\n")
    assert system.qdel(held) == 0
    assert system.result(job)["exit_status"] == 2


def test_several_dependencies(system: System, user: User, blocked: Blocked) -> None:
    """All must be met; the name may be without the server, and a directive counts."""
    number = blocked.job.split(".")[0]
    second = system.submit(user, "-h", script="exit 1\n")
    script = f"#PBS -W depend=afterok:{number}:{number},afternotok:{second}\nexit 7\n"
    job = system.submit(user, script=script)
    assert shown(system, job)["depend"] == f"afterok:{blocked.job},afternotok:{second}"
    blocked.end()
    assert (letter(system, job), shown(system, job)["depend"]) == ("H", f"afternotok:{second}")
    assert qrls(system, job) == 15174 % 256
    assert qrls(system, second) == 0
    assert system.result(job)["exit_status"] == 7


def test_held_and_dependent(system: System, user: User, blocked: Blocked) -> None:
    job = system.submit(user, "-h", "-W", f"depend=afterany:{blocked.job}")
    assert shown(system, job)["Hold_Types"] == "su"
    blocked.end()
    assert shown(system, job)["Hold_Types"] == "u"
    assert qrls(system, job) == 0
    assert system.result(job)["exit_status"] == 0


def test_a_chain_falls(system: System, user: User, blocked: Blocked) -> None:
    jobs = [blocked.job]
    for _ in range(5):
        jobs.append(system.submit(user, "-W", f"depend=afterok:{jobs[-1]}"))
    last = system.submit(user, "-W", f"depend=afterany:{jobs[-1]}", script="exit 8\n")
    assert system.qdel(jobs[1]) == 0
    assert [system.result(job)["exit_status"] for job in jobs[1:]] == [DELETED] * 5
    blocked.end()
    assert system.result(last)["exit_status"] == 8


@pytest.mark.parametrize("job", ["77", "77.elsewhere", "1[3]", "1[]"])
def test_unknown_job(system: System, user: User, blocked: Blocked, job: str) -> None:
    done = system.qsub(user, "-W", f"depend=afterok:{job}", script="true\n")
    assert (done.status, done.out) == (15056 % 256, "")
    assert done.err.startswith("qsub: submit error (Invalid Job Dependency MSG=")


# --- order and time


def test_priority_and_order(system: System, user: User, blocked: Blocked) -> None:
    script = f"echo $PBS_JOBNAME >> {system.record}/order\n"
    wanted = {"low": "-5", "first": "0", "second": "0", "high": "+9", "highest": "1023"}
    jobs = [system.submit(user, "-N", name, "-p", value, script=script) for name, value in wanted.items()]
    assert shown(system, jobs[0])["Priority"] == "-5"
    blocked.end()
    for job in jobs:
        system.result(job)
    assert system.order() == ["highest", "high", "first", "second", "low"]


def test_date(system: System, user: User) -> None:
    when = time.time() + 2
    job = system.submit(user, "-a", time.strftime("%Y%m%d%H%M.%S", time.localtime(when)), script="exit 3\n")
    assert letter(system, job) == "W"
    assert shown(system, job)["Execution_Time"] == time.ctime(int(when))
    assert system.run(user)[1] == 0
    assert letter(system, job) == "W"
    assert system.result(job)["exit_status"] == 3
    assert time.time() >= int(when)
    past = system.submit(user, "-a", "202001010000", script="exit 4\n")
    assert system.result(past)["exit_status"] == 4


def test_waiting_and_held(system: System, user: User) -> None:
    job = system.submit(user, "-h", "-a", "203001010000")
    assert letter(system, job) == "H"
    assert qrls(system, job) == 0
    assert letter(system, job) == "W"
    assert system.qdel(job) == 0


# --- -r, -m, -c


def test_not_rerunnable(system: System, user: User, blocked: Blocked) -> None:
    job = Blocked(system, user, "-r", "n", "-m", "n", "-c", "none")
    blocked.end()
    job.begun()
    assert (shown(system, job.job)["Rerunable"], shown(system, blocked.job)["Rerunable"]) == ("False", "True")
    assert user.call(lambda: client.qrerun_main([job.job], system.socket)).status == 15007 % 256
    done = ROOT.call(lambda: client.qrerun_main([job.job], system.socket))
    assert done.status == 15040 % 256
    assert done.err == f"qrerun: job is not rerunnable MSG=job {job.job} not rerunnable {job.job}\n"
    job.end()


# --- -T


def test_hooks_of_a_type(system: System, user: User) -> None:
    """A file with the name of the type counts for each hook that has one, as TORQUE does it."""
    for name in ("prologue", "prologue.user", "prologue.special", "epilogue", "epilogue.user", "epilogue.user.special"):
        system.hook(name)
    own = user.write("own", "#!/bin/sh\necho own\n", 0o700)
    user.write("own.special", "#!/bin/sh\necho $0\n", 0o700)
    assert system.run(user, "-T", "special", "-N", "x", "-l", f"prologue={own}")[1] == 0
    assert system.order() == ["prologue.special", "prologue.user", "epilogue.user.special", "epilogue"]
    assert (user.home / "x.o1").read_text() == f"{own}.special\n"
    assert system.run(user, "-T", "other")[1] == 0
    assert system.order()[4:] == ["prologue", "prologue.user", "epilogue.user", "epilogue"]
    assert shown(system, "1")["jobtype"] == "special"


def test_a_type_may_name_another_hook(system: System, user: User) -> None:
    for name in ("epilogue", "epilogue.precancel"):
        system.hook(name)
    system.run(user, "-T", "precancel")
    assert system.order() == ["epilogue.precancel"]
    assert system.calls("epilogue.precancel")[0]["uid"] == "0"


# --- after a crash


@pytest.mark.parametrize("kill", [False, True])
def test_all_this_survives(system: System, user: User, blocked: Blocked, kill: bool) -> None:
    held = system.submit(user, "-h", "-p", "7")
    waiting = system.submit(user, "-a", "203001010000")
    after = system.submit(user, "-W", f"depend=afterany:{blocked.job}", script="exit 5\n")
    never = system.submit(user, "-W", f"depend=afterok:{blocked.job}")
    chained = system.submit(user, "-W", f"depend=afterok:{held}", script="exit 2\n")
    (system.kill if kill else system.stop)()
    system.start()
    assert system.result(after)["exit_status"] == 5
    assert system.result(never)["exit_status"] == DELETED
    assert [letter(system, job) for job in (held, waiting, chained)] == ["H", "W", "H"]
    assert qrls(system, held) == 0
    assert system.result(chained)["exit_status"] == 2
    assert system.qdel(waiting) == 0


def test_a_dependency_on_a_job_that_is_lost(system: System, user: User) -> None:
    lost = system.submit(user, "-h")
    job = system.submit(user, "-W", f"depend=afterany:{lost}")
    system.stop()
    (system.spool / "server_priv" / "jobs" / f"{lost}.json").unlink()
    system.start()
    assert system.result(job)["exit_status"] == DELETED


def test_queue_entry_that_cannot_be_stored(system: System, user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """A submission that was refused never runs."""
    from vsub.engines.local import records

    system.stop()
    write, full = records.write_whole, system.record / "full"

    def broken(path: object, data: bytes, **how: bool) -> None:
        if full.exists() and str(path).endswith(".json"):
            raise OSError(28, os.strerror(28))
        write(path, data, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(records, "write_whole", broken)
    system.start()
    full.touch()
    done = system.qsub(user, script=f"echo never >> {system.record}/order\n")
    assert done.status == 15012 % 256
    full.unlink()
    job = system.run(user)[0]
    assert job == f"2.{system.host}"
    assert system.order() == []
    assert client.job_state(system.socket, "1") is None
