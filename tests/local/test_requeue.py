"""Jobs that are held while they run, requeued, and start again: on the same or another node, after a restart too."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vmgr.errors import VTorqueError
from vsub.engines.embedded import Embedded

from .conftest import REPOSITORY, System, User
from .test_schedule import shown

DENIED = 15007 % 256
WRONG_STATE = 15018 % 256
NOT_HELD = 15174 % 256
FOLDERS = ("mom_priv/jobs", "aux", "spool")
"""Where a start makes its files on a node."""


class Counted:
    """A job that says at each start where it runs, waits to be let go on, and ends."""

    def __init__(self, system: System, user: User, *arguments: str) -> None:
        self.system = system
        self.begun, self.go = system.gate("begun"), system.gate("go")
        for name in ("prologue", "epilogue"):
            system.hook(name)
        script = f"echo start on $(uname -n); echo in > {self.begun.path}; read x < {self.go.path}; echo end\n"
        self.id = system.submit(user, "-N", "x", "-j", "oe", *arguments, script=script)
        self.begun.wait()

    def suspend(self) -> None:
        """Held while it runs, then requeued; returns when its last epilogue is over."""
        assert self.system.qhold(self.id) == 0
        assert self.system.qrerun(self.id) == 0

    def finish(self) -> object:
        self.begun.wait()
        self.go.open()
        return self.system.result(self.id)["exit_status"]


def behind(system: System, user: User, *arguments: str) -> None:
    """A job that runs to its end: what was before it has left its nodes."""
    assert system.run(user, "-N", "other", *arguments)[1] == 0


def test_a_held_job_goes_on_and_is_held_once_it_is_requeued(system: System, user: User) -> None:
    job = Counted(system, user)
    assert system.qhold(job.id) == 0
    held = shown(system, job.id)
    assert (held["job_state"], held["Hold_Types"]) == ("R", "u")
    assert system.qrerun(job.id) == 0
    behind(system, user)
    queued = shown(system, job.id)
    assert (queued["job_state"], queued["Hold_Types"], queued["start_count"]) == ("H", "u", "1")
    assert "exec_host" not in queued
    left = [path for name in FOLDERS for path in (system.spool / name).iterdir()]
    assert left == [], "what the start made on its node goes, the task file that a start is known by included"
    assert system.qrerun(job.id) == WRONG_STATE
    assert system.qrls(job.id) == 0 and job.finish() == 0
    assert system.order() == ["prologue", "epilogue"] * 3
    assert (user.home / "x.o1").read_text() == f"start on {system.host}\n" * 2 + "end\n"
    assert shown(system, job.id)["start_count"] == "2"


def test_a_job_that_is_released_in_time_ends_as_any(system: System, user: User) -> None:
    job = Counted(system, user)
    assert system.qhold(job.id) == 0 and system.qrls(job.id) == 0
    job.go.open()
    assert system.result(job.id)["exit_status"] == 0
    assert (user.home / "x.o1").read_text() == f"start on {system.host}\nend\n"


def test_walltime_begins_anew(system: System, user: User) -> None:
    """As in TORQUE, where it counts from the time at which the mom has started the job."""
    begun, go = system.gate("begun"), system.gate("go")
    script = f"sleep 2.6; echo in > {begun.path}; read x < {go.path}\n"
    job = system.submit(user, "-l", "walltime=4", script=script)
    begun.wait()
    assert system.qrerun(job) == 0
    begun.wait()
    go.open()
    assert system.result(job) == {"exit_status": 0, "reason": ""}
    assert "00:00:02" <= shown(system, job)["resources_used.walltime"] <= "00:00:04"


def test_who_may(system: System, user: User, other: User) -> None:
    job = Counted(system, user)

    def as_user(who: User, name: str) -> int:
        from vsub.engines.local import client

        return who.call(lambda: getattr(client, f"{name}_main")([job.id], system.socket)).status

    assert [as_user(other, name) for name in ("qhold", "qrls")] == [DENIED] * 2
    assert as_user(other, "qrerun") == DENIED
    assert as_user(user, "qrls") == NOT_HELD
    assert as_user(user, "qhold") == 0
    assert as_user(user, "qrerun") == DENIED, "TORQUE wants an operator for it"
    assert system.qrerun(job.id) == 0
    behind(system, user)
    assert as_user(user, "qrls") == 0
    assert job.finish() == 0


def test_a_held_job_outlives_the_daemon(system: System, user: User) -> None:
    job = Counted(system, user)
    job.suspend()
    behind(system, user)
    for end in (system.stop, system.kill):
        end()
        system.start()
        found = shown(system, job.id)
        assert (found["job_state"], found["Hold_Types"]) == ("H", "u")
    assert system.qrls(job.id) == 0 and job.finish() == 0
    assert (user.home / "x.o1").read_text() == f"start on {system.host}\n" * 2 + "end\n"


@pytest.mark.parametrize("stage", ["script", "epilogue"])
def test_a_daemon_killed_while_it_requeues(system: System, user: User, stage: str) -> None:
    """That the job is to be queued again is recorded before its end begins."""
    job = Counted(system, user)
    assert system.qhold(job.id) == 0
    if stage == "epilogue":
        ending = system.gate("ending")
        hook = system.hook("epilogue", f"echo in > {ending.path}; sleep 987")
        assert system.qrerun(job.id) == 0
        ending.wait()
        system.kill()
        hook.unlink()
    else:
        system.kill()
        record = system.spool / "server_priv" / "jobs" / f"{job.id}.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "rerun": True}))
    system.start()
    behind(system, user)
    assert shown(system, job.id)["job_state"] == "H"
    assert system.qrls(job.id) == 0 and job.finish() == 0
    assert (user.home / "x.o1").read_text() == f"start on {system.host}\n" * 2 + "end\n"


def test_deleted_while_held(system: System, user: User) -> None:
    """As in TORQUE the output of earlier starts goes with the job; nothing of it is left (see the fixture)."""
    job = Counted(system, user)
    job.suspend()
    behind(system, user)
    assert system.qdel(job.id) == 0
    assert system.result(job.id)["exit_status"] == 271
    assert not (user.home / "x.o1").exists()


# --- nodes


def test_on_another_node(cluster: System, user: User) -> None:
    """The output goes with the job; a node that is offline gets no job, and nothing is left on it."""
    job = Counted(cluster, user, "-l", "nodes=2")
    assert shown(cluster, job.id)["exec_host"] == "n1/0+n2/0"
    job.suspend()
    behind(cluster, user, "-l", "nodes=n3")
    assert cluster.daemon("offline", "n1").returncode == 0
    assert "offline" in next(line for line in cluster.daemon("status").stdout.splitlines() if line.startswith("n1 "))
    left = [path for spool in cluster.node_spools() for name in FOLDERS for path in (spool / name).iterdir()]
    assert left == []
    assert cluster.qrls(job.id) == 0
    job.begun.wait()
    assert shown(cluster, job.id)["exec_host"] == "n2/0+n3/0"
    job.go.open()
    assert cluster.result(job.id)["exit_status"] == 0
    assert (user.home / "x.o1").read_text() == "start on n1\nstart on n2\nend\n"


def test_jobs_wait_for_nodes_that_are_offline(cluster: System, user: User) -> None:
    cluster.daemon("offline", "n2")
    waits = [cluster.submit(user, "-l", f"nodes={what}", script="uname -n\n") for what in ("n2", "3")]
    behind(cluster, user, "-l", "nodes=2")
    cluster.stop()
    cluster.start()
    behind(cluster, user)
    assert [shown(cluster, job)["job_state"] for job in waits] == ["Q", "Q"]
    assert cluster.daemon("online", "n2").returncode == 0
    assert [cluster.result(job)["exit_status"] for job in waits] == [0, 0]
    refused = cluster.daemon("offline", "n7")
    assert (refused.returncode, refused.stderr) == (1, "vtorque-local: Unknown node  MSG='n7'\n")


def test_only_root_takes_nodes_offline(cluster: System, user: User) -> None:
    from vsub.engines.local import daemon

    arguments = ["offline", "--spool", str(cluster.spool), "--socket", cluster.socket, "n1"]
    done = user.call(lambda: daemon.main(arguments))
    assert (done.status, done.err) == (1, "vtorque-local: Unauthorized Request \n")


def test_root_in_a_node_requeues(cluster: System, user: User) -> None:
    """What an agent does: by the socket of the daemon, from the namespaces of a node."""
    job = Counted(cluster, user, "-l", "nodes=n2")
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from types import SimpleNamespace as Plain\n"
        "from vsub.engines.embedded import Embedded\n"
        f"batch = Embedded(Plain(local=Plain(socket={cluster.socket!r})), Plain(local_qsub='qsub'))\n"
        f"print(batch.hold({job.id!r}, 10), batch.hold({job.id!r}, 10), batch.requeue({job.id!r}, 10))\n"
    )
    assert cluster.enter("n2", sys.executable, "-c", code) == "True False None\n"
    behind(cluster, user)
    assert shown(cluster, job.id)["job_state"] == "H"
    assert cluster.qrls(job.id) == 0 and job.finish() == 0


# --- the engine


def engine(system: System) -> Embedded:
    config: Any = SimpleNamespace(local=SimpleNamespace(socket=system.socket))
    install: Any = SimpleNamespace(local_qsub="qsub")
    return Embedded(config, install)


def refusals(system: System, job: str) -> int:
    """What the engine says, as a user who may not."""
    for change in ("hold", "release", "requeue"):
        try:
            getattr(engine(system), change)(job, 10)
        except VTorqueError as err:
            print(err)
    return 0


def test_what_the_engine_says(system: System, user: User, other: User) -> None:
    job = Counted(system, user)
    batch = engine(system)
    assert job.id == f"1.{batch.server(10)}"
    with pytest.raises(VTorqueError, match="VT-ENGINE: job 99 is not known to the batch system"):
        batch.hold("99", 10)
    with pytest.raises(VTorqueError, match="VT-ENGINE: the batch system refuses: The requested state"):
        batch.release(job.id, 10)
    denied = f"VT-ACCESS: job {job.id} is another user's\n"
    assert other.call(lambda: refusals(system, job.id)).out == denied * 3
    assert user.call(lambda: refusals(system, job.id)).out == (
        "VT-ACCESS: the batch system refuses: Unauthorized Request  MSG=only root, as an operator, may rerun jobs\n"
    )
    assert batch.hold(job.id, 10) is True and batch.hold(job.id, 10) is False
    batch.release(job.id, 10)
    job.go.open()
    assert system.result(job.id)["exit_status"] == 0
    with pytest.raises(VTorqueError, match="VT-ENGINE: the batch system refuses: Request invalid for state of job"):
        batch.requeue(job.id, 10)
