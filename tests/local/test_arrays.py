"""Job arrays: members are jobs of their own, the array is what they have in common."""

from __future__ import annotations

import os

import pytest

from vsub.engines.local import client, qstat

from .conftest import System, User
from .test_schedule import DELETED, Blocked, blocked, letter, qhold, qrls, shown

__all__ = ["blocked"]


def ids(array: str, *indices: int) -> list[str]:
    return [array.replace("[]", f"[{index}]") for index in indices]


def test_members(system: System, user: User) -> None:
    system.hook("prologue")
    system.hook("epilogue", f"cp {system.mom_priv}/jobs/*.JB {system.record}/task; ls {system.mom_priv}/jobs")
    script = 'echo $0; echo "$PBS_JOBID $PBS_ARRAYID $PBS_JOBNAME"; exit $PBS_ARRAYID\n'
    array = system.submit(user, "-t", "0,3,7-8%2", "-N", "x", "-j", "oe", script=script)
    assert array == f"1[].{system.host}"
    assert system.result(array) == {"exit_status": 8, "reason": ""}
    members = ids(array, 0, 3, 7, 8)
    assert [client.job_state(system.socket, job).exit_status for job in members] == [0, 3, 7, 8]  # type: ignore[union-attr]
    assert sorted(path.name for path in user.home.glob("x.*")) == ["x.o1-0", "x.o1-3", "x.o1-7", "x.o1-8"]
    path = f"{system.mom_priv}/jobs/1-3.{system.host}.SC"
    lines = (user.home / "x.o1-3").read_text().splitlines()
    assert lines == [path, f"{members[1]} 3 x-3", f"1-3.{system.host}.JB", f"1-3.{system.host}.SC"]
    call = system.calls("prologue")[1]
    assert [call[f"arg{number}"] for number in (1, 4, 8)] == [members[1], "x-3", path]
    assert f"<jobid>{members[3]}</jobid>" in (system.record / "task").read_text()


def test_what_qstat_shows(system: System, user: User, blocked: Blocked) -> None:
    array = system.submit(user, "-t", "1-3%2", "-N", "x", "-o", "out")
    state = client.job_state(system.socket, array)
    assert state == client.JobState("Q", None, "", "")

    def status_of(*arguments: str) -> str:
        done = user.call(lambda: qstat.qstat_main(list(arguments), system.socket))
        assert (done.status, done.err) == (0, "")
        return done.out

    plain, members = status_of(), status_of("-t")
    assert array in plain and "[1]" not in plain and "x " in plain
    assert all(job in members for job in ids(array, 1, 2, 3)) and array not in members and "x-2" in members
    assert status_of("-t", array).count("\n") == 5
    whole = shown(system, array)
    assert (whole["job_array_request"], whole["job_state"], whole["Job_Name"]) == ("1-3%2", "Q", "x")
    [second] = ids(array, 2)
    one = shown(system, second.split(".")[0])
    assert (one["job_array_id"], one["Job_Name"]) == ("2", "x-2")
    assert one["Output_Path"].endswith("/out-2") and "PBS_ARRAYID=2" in one["Variable_List"]
    assert f"Job Id: {second}" in status_of("-f", second)
    assert f"Job Id: {array}" in status_of("-f", "2[]")
    blocked.end()
    assert system.result(array)["exit_status"] == 0
    assert client.job_state(system.socket, array) == client.JobState("C", 0, "", "")
    assert (user.home / "out-2").exists()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("-o", "d"), {"d/x.o1-4", "x.e1-4"}),
        (("-o", "d/", "-e", "e"), {"d/x.o1-4", "e-4"}),
        (("-k", "oe"), {"x-4.o1", "x-4.e1"}),
        (("-o", "$PBS_JOBNAME.$PBS_ARRAYID", "-e", "/dev/null"), {"x-4.4-4"}),
    ],
)
def test_names_of_output(system: System, user: User, options: tuple[str, ...], names: set[str]) -> None:
    (user.home / "d").mkdir()
    os.chown(user.home / "d", user.uid, user.gid)
    assert system.result(system.submit(user, "-N", "x", "-t", "4", *options)) == {"exit_status": 0, "reason": ""}
    assert {str(path.relative_to(user.home)) for path in user.home.rglob("*") if path.is_file()} == names


@pytest.mark.parametrize("request_", ["x", "3-1", "1-", "-1", "100000", "0-99999,0-99999", "1%0", "1%x", "1--2", "%2"])
def test_bad_requests(system: System, user: User, request_: str) -> None:
    done = system.qsub(user, "-t", request_, script="true\n")
    assert (done.status, done.out) == (15083 % 256, "")
    assert done.err.startswith("qsub: submit error (Bad Job Array Request MSG=")


def test_quota_counts_members(system: System, user: User, blocked: Blocked) -> None:
    done = system.qsub(user, "-t", "1-1000", script="true\n")
    assert (done.status, done.out) == (15048 % 256, "")
    array = system.submit(user, "-t", "1-999")
    assert system.qsub(user, script="true\n").status == 15048 % 256
    assert system.qdel(array) == 0
    assert system.result(array)["exit_status"] == DELETED
    blocked.end()
    assert system.run(user)[1] == 0


def test_delete_a_member_and_the_rest(system: System, user: User, other: User) -> None:
    gate = system.gate("gate")
    system.hook("epilogue")
    array = system.submit(user, "-t", "1-4", script=f"echo in > {gate.path}; exec sleep 986\n")
    gate.wait()
    first, second, *rest = ids(array, 1, 2, 3, 4)
    assert [letter(system, job) for job in (array, first, second)] == ["R", "R", "Q"]
    assert system.qdel(second) == 0
    assert system.result(second) == {"exit_status": DELETED, "reason": "deleted"}
    assert other.call(lambda: client.qdel_main([array], system.socket)).status == 159
    assert system.qrerun(array) == 15004 % 256
    assert system.qdel(array) == 0
    assert system.result(array) == {"exit_status": DELETED, "reason": "deleted"}
    assert [letter(system, job) for job in (array, *rest)] == ["C"] * 3
    assert len(system.calls("epilogue")) == 1
    assert system.qdel(array) == 170


def test_rerun_a_member(system: System, user: User) -> None:
    gate, hold = system.gate("gate"), system.gate("hold")
    array = system.submit(user, "-t", "1-2", script=f"echo in > {gate.path}; read x < {hold.path}\n")
    gate.wait()
    assert system.qrerun(ids(array, 1)[0]) == 0
    gate.wait()
    hold.open()
    gate.wait()
    hold.open()
    assert system.result(array)["exit_status"] == 0
    assert shown(system, ids(array, 1)[0])["start_count"] == "2"


def test_hold_and_release(system: System, user: User) -> None:
    array = system.submit(user, "-h", "-t", "1-3", script=f"echo $PBS_ARRAYID >> {system.record}/order\n")
    first, second, third = ids(array, 1, 2, 3)
    assert [letter(system, job) for job in (array, first, third)] == ["Q", "H", "H"]
    assert qrls(system, second) == 0
    system.result(second)
    system.stop()
    system.start()
    assert [letter(system, job) for job in (first, second, third)] == ["H", "C", "H"]
    assert qhold(system, second) == 170
    assert qrls(system, array) == 0
    assert system.result(array)["exit_status"] == 0
    assert system.order() == ["2", "1", "3"]


def test_dependencies_of_and_on_members(system: System, user: User, blocked: Blocked) -> None:
    script = f"echo $PBS_JOBID >> {system.record}/order; exit $PBS_ARRAYID\n"
    array = system.submit(user, "-t", "0-1", "-W", f"depend=afterok:{blocked.job}", script=script)
    members = ids(array, 0, 1)
    good = system.submit(user, "-W", f"depend=afterok:{members[0]}", script="exit 9\n")
    bad = system.submit(user, "-W", f"depend=afterok:{members[1]}")
    assert [letter(system, job) for job in (*members, good)] == ["H"] * 3
    assert shown(system, array)["depend"] == f"afterok:{blocked.job}"
    blocked.end()
    assert system.result(array)["exit_status"] == 1
    assert system.result(good)["exit_status"] == 9
    assert system.result(bad)["exit_status"] == DELETED
    assert system.order() == members
    never = system.submit(user, "-t", "0-1", "-W", f"depend=afternotok:{blocked.job}")
    assert system.result(never)["exit_status"] == DELETED
    done = system.qsub(user, "-W", f"depend=afterok:{array}", script="true\n")
    assert done.status == 15056 % 256


def test_forgotten_when_all_of_it_is_old(system: System, user: User) -> None:
    system.configure(keep_completed_s=0)
    system.stop()
    system.start()
    array = system.submit(user, "-h", "-t", "1-2")
    first, second = ids(array, 1, 2)
    assert qrls(system, first) == 0
    system.result(first)
    assert letter(system, first) == "C"
    assert qrls(system, second) == 0
    system.result(second)
    system.run(user)
    assert [client.job_state(system.socket, job) for job in (array, first, second)] == [None] * 3
    done = user.call(lambda: qstat.qstat_main([array], system.socket))
    assert (done.status, done.out) == (153, "")
    assert not list((system.spool / "server_priv" / "jobs").glob("1[[]*"))


@pytest.mark.parametrize("kill", [False, True])
def test_survives_the_daemon(system: System, user: User, kill: bool) -> None:
    gate = system.gate("gate")
    script = (
        f"[ $PBS_ARRAYID = 2 ] && [ ! -e {system.record}/done ] && echo in > {gate.path} && exec sleep 985; exit 3\n"
    )
    array = system.submit(user, "-t", "1-4", "-N", "x", script=script)
    gate.wait()
    (system.record / "done").touch()
    (system.kill if kill else system.stop)()
    system.start()
    system.result(array)
    states = [client.job_state(system.socket, job) for job in ids(array, 1, 2, 3, 4)]
    assert [state.exit_status for state in states if state] == [3, -4 if kill else DELETED, 3, 3]
    assert len(list(user.home.glob("x.o1-*"))) == 4
    system.stop()
    system.start()
    assert letter(system, array) == "C"


def test_records_that_cannot_be_read_are_put_aside(system: System, user: User) -> None:
    array = system.submit(user, "-h", "-t", "1-2")
    assert qrls(system, ids(array, 1)[0]) == 0
    system.result(ids(array, 1)[0])
    system.stop()
    jobs = system.spool / "server_priv" / "jobs"
    (jobs / f"{array}.json").write_text("{}")
    system.start()
    assert client.job_state(system.socket, array) is None
    assert sorted(path.suffix for path in jobs.iterdir()) == [".unreadable"] * 2
    assert system.run(user)[1] == 0
    for path in jobs.glob("*.unreadable"):
        path.unlink()
