"""qdel and qrerun at every stage of a job, and walltime."""

from __future__ import annotations

import pytest

from vsub.engines.local import client

from .conftest import System, User

DELETED = 271


def test_delete_a_queued_job(system: System, user: User) -> None:
    gate = system.gate("gate")
    running = system.submit(user, script=f"read x < {gate.path}\n")
    queued = system.submit(user, "-N", "never", script="echo never\n")
    assert system.qdel(queued) == 0
    assert system.result(queued) == {"exit_status": DELETED, "reason": "deleted"}
    gate.open()
    assert system.result(running)["exit_status"] == 0
    assert not list(user.home.glob("never*"))
    assert system.qdel(queued) == 15018 % 256
    assert system.qdel("99") == 153


def test_delete_a_running_job(system: System, user: User) -> None:
    gate = system.gate("gate")
    system.hook("epilogue.precancel", 'ps -o args= -u "$2" | grep -c "sleep 98[7]"')
    system.hook("epilogue")
    script = f"trap 'echo term; exit 9' TERM; echo in > {gate.path}; sleep 987 & wait\n"
    job = system.submit(user, "-N", "x", script="#!/bin/bash\n" + script)
    gate.wait()
    assert system.qdel(job) == 0
    assert system.result(job) == {"exit_status": DELETED, "reason": "deleted"}
    assert system.order() == ["epilogue.precancel", "epilogue"]
    assert system.calls("epilogue.precancel")[0]["uid"] == str(user.uid)
    assert system.calls("epilogue")[0]["arg10"] == str(DELETED)
    assert (user.home / "x.o1").read_text() == "1\nterm\n"


def test_a_job_that_ignores_term_is_killed(system: System, user: User) -> None:
    gate = system.gate("gate")
    script = f"trap '' TERM; echo in > {gate.path}; while :; do sleep 986; done\n"
    job = system.submit(user, "-S", "/bin/sh", script="#!/bin/bash\n" + script)
    gate.wait()
    assert system.qdel("-W", "0", job) == 0
    assert system.result(job)["exit_status"] in (DELETED, 265)
    assert user.processes() == []


def test_delete_during_the_prologue(system: System, user: User) -> None:
    """The epilogue runs beside the prologue; when that ends, the user prologue still runs, the script does not."""
    gate, hold, late = system.gate("gate"), system.gate("hold"), system.gate("late")
    system.hook("prologue", f"echo in > {gate.path}; read x < {hold.path}")
    system.hook("prologue.user", f"echo late > {late.path}")
    system.hook("epilogue")
    job = system.submit(user, "-N", "x", "-l", "walltime=5", script="echo script\n")
    gate.wait()
    assert system.qdel(job) == 0
    assert system.result(job) == {"exit_status": DELETED, "reason": "deleted"}
    assert system.order() == ["prologue", "epilogue"]
    assert (user.home / "x.o1").read_text() == ""
    hold.open()
    assert late.wait() == "late\n"
    assert system.order() == ["prologue", "epilogue", "prologue.user"]
    (system.mom_priv / "prologue").unlink()
    assert system.run(user)[1] == 0


def test_walltime(system: System, user: User) -> None:
    system.hook("epilogue")
    script = "echo begun; sleep 985\n"
    job, status = system.run(user, "-N", "x", "-l", "walltime=1", script="#!/bin/bash\n" + script)
    assert status == DELETED
    assert (user.home / "x.o1").read_text() == "begun\n"
    assert "=>> PBS: job killed: walltime 2 exceeded limit 1\n" in (user.home / "x.e1").read_text()
    state = client.job_state(system.socket, job)
    assert state is not None and state.comment == "walltime 2 exceeded limit 1"
    assert user.processes() == []


def test_prologue_time_is_not_walltime(system: System, user: User) -> None:
    system.hook("prologue", "sleep 1.5")
    assert system.run(user, "-l", "walltime=0", script="true\n")[1] == 0


def test_rerun_a_running_job(system: System, user: User) -> None:
    gate, hold = system.gate("gate"), system.gate("hold")
    for name in ("prologue", "epilogue"):
        system.hook(name)
    job = system.submit(user, "-N", "x", script=f"echo again; echo in > {gate.path}; read x < {hold.path}\n")
    gate.wait()
    assert system.qrerun(job) == 0
    gate.wait()
    hold.open()
    assert system.result(job)["exit_status"] == 0
    assert system.order() == ["prologue", "epilogue"] * 2
    assert (user.home / "x.o1").read_text() == "again\nagain\n"
    assert system.qrerun(job) == 170


def test_rerun_during_the_prologue(system: System, user: User) -> None:
    gate, hold = system.gate("gate"), system.gate("hold")
    system.hook("prologue", f"echo in > {gate.path}; read x < {hold.path}")
    system.hook("epilogue", f"echo epilogue > {gate.path}")
    job = system.submit(user, script="exit 6\n")
    assert gate.wait() == "in\n"
    assert system.qrerun(job) == 0
    assert gate.wait() == "epilogue\n"
    hold.open()
    assert gate.wait() == "in\n"
    hold.open()
    assert system.result(job)["exit_status"] == 6
    assert system.order() == ["prologue", "epilogue"] * 2


@pytest.mark.parametrize("stage", ["prologue", "script", "epilogue"])
def test_delete_twice_and_too_late(system: System, user: User, stage: str) -> None:
    gate, hold = system.gate("gate"), system.gate("hold")
    pause = f"echo in > {gate.path}; read x < {hold.path}"
    if stage != "script":
        system.hook(stage, pause)
    job = system.submit(user, script=f"{pause if stage == 'script' else 'true'}\n")
    gate.wait()
    first = system.qdel(job)
    second = system.qdel(job)
    assert (first, second) == ((170, 170) if stage == "epilogue" else (0, 170))
    hold.open()
    assert system.result(job)["exit_status"] == (0 if stage == "epilogue" else DELETED)
