"""Guest jobs on a real Slurm: its daemons on simulated nodes, real guests.

What is true of all batch systems, MPI for instance, the other modules test on Slurm too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from slurmprograms import BIN

from .cluster import hanging
from .conftest import User, eventually
from .mpi import OWN_OPENMPI, own_openmpi, ring
from .slurmcluster import Slurm, found_programs, slurm_site
from .terminal import SHELL, check_size_and_keys, terminal

pytestmark = pytest.mark.skipif(found_programs() is not None, reason=f"needs Slurm: {found_programs()} is missing")

STAYS = "echo before; touch runs; sleep 300\n"
TWO = "-l", "nodes=2"
SIX = "-l", "nodes=3:ppn=2", "-vm", "vms_per_node=2"
GUESTS = [f"vn{node}-{guest}" for node in (1, 2, 3) for guest in (1, 2)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm_site() as site:
        yield site


@pytest.fixture(scope="module")
def site(cluster: Slurm) -> Slurm:
    """The installation whose users the tests are."""
    return cluster


@pytest.fixture(autouse=True)
def no_node_is_drained(cluster: Slurm) -> Iterator[None]:
    """Whatever a hook meets, it takes no node down."""
    yield
    eventually(lambda: set(cluster.states().values()) == {"IDLE"}, lambda: str(cluster.states()), limit_s=30)


def output(user: User, job: str, stream: str = "o") -> str:
    return user.output(f"job.sh.{stream}{job.partition('.')[0]}")


def test_a_job_on_one_node(cluster: Slurm, user: User) -> None:
    script = (
        "#SBATCH --comment='my own = it'\n"
        "hostname; id -un; pwd\n"
        "echo $PBS_JOBID $PBS_JOBNAME $PBS_QUEUE $PBS_O_WORKDIR $PBS_ENVIRONMENT; cat $PBS_NODEFILE\n"
        "echo $SLURM_JOB_ID ${SLURM_NODELIST-none} ${SLURM_JOBID-none}; echo oops >&2; exit 3\n"
    )
    done = user.job(script)
    job = done.job_id.partition(".")[0]
    assert (done.status, done.err) == (3, "oops\n"), done
    assert done.out.splitlines() == [
        "vn1-1", user.name, str(user.home), f"{job}.ref job.sh batch {user.home} PBS_BATCH", "vn1-1",
        f"{job} none none",
    ]  # fmt: skip
    assert cluster.reached("n1", job, "gone"), "its agent has ended by itself, not by the Epilog"
    assert not list((user.home / ".vtorque").iterdir())
    assert cluster.control("-h", "-t", "all", "-o", "%k", "-j", job, program="squeue").stdout == "my own = it\n"


def test_mpi_over_three_nodes_with_two_guests_each(cluster: Slurm, user: User) -> None:
    """The image has no MPI: it is one of the user's own. The job ends as `mpirun` does."""
    own_openmpi(user)
    said = "hostname; echo $VTORQUE_RANK of $VTORQUE_GUESTS; cat $PBS_NODEFILE\n"
    done = user.job(f"{said}{OWN_OPENMPI}mpirun.openmpi ./ring.openmpi\n", *SIX)
    assert (done.status, done.err) == (0, ""), done
    assert done.out.splitlines() == ["vn1-1", f"0 of {' '.join(GUESTS)}", *GUESTS, *ring(GUESTS)]
    hooks = (user.home / "hooks").read_text().splitlines()
    assert sorted(hooks) == sorted(
        f"root-{hook}{'' if name == GUESTS[0] else '.parallel'} 0 {name}"
        for hook in ("prologue", "epilogue")
        for name in GUESTS
    )
    for node in ("n1", "n2", "n3"):
        assert cluster.reached(node, done.job_id, "gone"), "its agent has ended by itself, not by the Epilog"


def test_a_job_without_guests_finds_the_variables_of_pbs_too(cluster: Slurm, user: User) -> None:
    script = "#!/bin/sh\necho $PBS_JOBID $PBS_JOBNAME $(hostname)\ncd $PBS_O_WORKDIR && pwd\n"
    done = user.job(script, "-vm", "off", "-l", "nodes=1")
    assert done.status == 0, done
    assert user.output(f"slurm-{done.job_id}.out") == f"{done.job_id}.ref job.sh n1\n{user.home}\n"


def test_an_array(cluster: Slurm, user: User) -> None:
    """Two members are on a node at a time; the last one takes their directory away."""
    script = "echo $PBS_ARRAYID $SLURM_ARRAY_TASK_ID >array.$PBS_ARRAYID\n"
    job = user.submit(script, "-t", "3-5", "-l", "nodes=1:ppn=2", "-vm", "vcpus=1")
    number = re.match(r"\d+", job)
    assert number is not None
    eventually(lambda: not cluster.control("-h", "-j", number[0], program="squeue").stdout, "all have ended")
    said = {index: user.output(f"array.{index}") for index in (3, 4, 5)}
    errors = [path.read_text() for path in user.home.glob("job.sh.e*")]
    assert said == {index: f"{index} {index}\n" for index in said}, errors
    eventually(lambda: not list((user.home / ".vtorque").iterdir()), "their directory is gone", limit_s=15)
    noted = [line for node in cluster.nodes for path in cluster.own(node).glob("log/jobs/*.members-*")
             for line in path.read_text().splitlines()]  # fmt: skip
    assert sorted(line.split()[0] for line in noted) == ["3", "4", "5"] and f" {number[0]}.ref" in " ".join(noted)
    for index, whole in (line.split() for line in noted):
        report = f"{cluster.vmgr} report {number[0]}_{index} --here --json 2>/dev/null || :"
        told = [text for node in ("n1", "n2", "n3") if (text := cluster.enter(node, "sh", "-c", report))]
        assert [json.loads(text)["job_id"] for text in told] == [whole]


def test_an_interactive_job(cluster: Slurm, user: User) -> None:
    """Over two nodes: on each of them Slurm starts a wrapper, of which one stands for the job."""
    with terminal(user, str(cluster.vsub), "-I", *TWO, rows=33, columns=101) as tty:
        for stage in ("launched", "booted"):  # shown while the guest boots
            tty.expect(f"waiting for the guest: {stage}")
        tty.expect(SHELL)
        tty.run("echo host=$(hostname) where=$(pwd) in=$PBS_JOBID", rf"host=vn1-1 where={user.home} in=\d+\.ref\s")
        tty.expect(SHELL)
        check_size_and_keys(tty)
        tty.type("exit 7\r")
        assert tty.end() == 7, tty.seen


def test_what_stands_in_a_nodes_way(cluster: Slurm) -> None:
    told = cluster.enter("n1", "env", f"SLURM_CONF={cluster.conf}", "sh", "-c", f"{cluster.vmgr} doctor --json || :")
    found = [each for each in json.loads(told)["findings"] if each["subject"] == "batch system"]
    assert len(found) == 5 and {each["level"] for each in found} == {"ok"}, found


@pytest.mark.parametrize(
    "stage",
    [
        "agent", "spec", "staged", "booted", "job started",
        *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("prologue", "ready")),
    ],
)  # fmt: skip
def test_a_job_cancelled_at_any_stage_leaves_nothing(cluster: Slurm, user: User, stage: str) -> None:
    job = user.submit(STAYS, *TWO)
    cluster.wait_on("n1", job, stage)
    if stage == "job started":
        eventually((user.home / "runs").exists, "the script runs")
    cancelled(cluster, job)
    if stage == "job started":
        assert output(user, job) == "before\n"


def test_a_job_cancelled_in_its_epilogues_leaves_nothing(cluster: Slurm, user: User) -> None:
    for name in ("slow-epilogue", "slow-epilogue.parallel"):
        user.write(name, "")
    job = user.submit("echo before\n", *TWO)
    hooks = user.home / "hooks"
    eventually(lambda: hooks.exists() and hooks.read_text().count("-epilogue") == 2, "the VM epilogues run")
    cancelled(cluster, job)


def test_a_job_cancelled_while_its_specification_cannot_be_read(cluster: Slurm, user: User) -> None:
    """The job directory is on a file system that hangs, on every node: neither agents nor hooks wait for it."""
    job = user.submit("touch ran\n", "-h", "-l", "nodes=3")
    (spec,) = user.home.glob(".vtorque/*/*/spec.json")
    with hanging(cluster, user, spec.parent):
        assert cluster.control("release", job.partition(".")[0]).returncode == 0
        for node in ("n1", "n2", "n3"):
            cluster.wait_on(node, job, "agent")
        cancelled(cluster, job)
    assert not any(cluster.reached(node, job, "spec") for node in ("n1", "n2", "n3"))
    assert not (user.home / "ran").exists()


@pytest.mark.slow
def test_a_script_that_does_not_end_is_killed(cluster: Slurm, user: User) -> None:
    job = user.submit("trap '' TERM\ntouch runs\nfor i in $(seq 3000); do sleep 0.1; done\n")
    eventually((user.home / "runs").exists, "the script runs")
    cancelled(cluster, job)


TOLD = """\
trap 'echo told; exit 4' TERM
echo run on $(hostname)
touch runs
for i in $(seq 6000); do sleep 0.1; done
"""


@contextmanager
def patient(cluster: Slurm) -> Iterator[None]:
    """Slurm gives jobs that it ends a minute to end by themselves, as much as emulated guests may need."""
    text = cluster.conf.read_text()
    cluster.conf.write_text(text.replace("KillWait=5\n", "KillWait=60\n"))
    try:
        assert cluster.control("reconfigure").returncode == 0
        yield
    finally:
        cluster.conf.write_text(text)
        assert cluster.control("reconfigure").returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_reaches_its_time_limit(cluster: Slurm, user: User) -> None:
    """Its script is told, its VM epilogues run, its guests go."""
    epilogue = user.write("my-epilogue", "#!/bin/sh\necho my epilogue\n")
    with patient(cluster):
        job = user.submit(TOLD, *TWO, "-vm", f"vm_epilogue={epilogue}", "-l", "walltime=1:00:00")
        number = job.partition(".")[0]
        eventually((user.home / "runs").exists, "the script runs")
        assert cluster.control("update", f"JobId={number}", "TimeLimit=1").returncode == 0
        cluster.wait(job)
    assert cluster.facts(job)["JobState"] == "TIMEOUT"
    eventually(lambda: not cluster.left_behind(), lambda: f"left: {cluster.left_behind()}", limit_s=60)
    assert output(user, job).splitlines() == ["run on vn1-1", "told", "my epilogue"], output(user, job, "e")
    hooks = (user.home / "hooks").read_text().splitlines()
    ended = sorted(hook.split()[0] for hook in hooks if "-epilogue" in hook)
    assert ended == ["root-epilogue", "root-epilogue.parallel"], "that of the site runs in all guests"
    for node in ("n1", "n2"):
        assert cluster.reached(node, job, "gone"), "its agent has ended by itself, not by the Epilog"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("partition", "state"), [("batch", "PENDING"), ("spare", "PREEMPTED")])
def test_a_job_that_is_preempted(cluster: Slurm, user: User, partition: str, state: str) -> None:
    """Its script is told; it is queued again and starts anew, or has ended, as its partition has it."""
    with patient(cluster):
        # -n: Slurm lets nobody else preempt a job that shares its nodes with its own user alone (--exclusive=user)
        job = user.submit(TOLD, "-n", "-q", partition, "-l", "nodes=n1:ppn=4", "-vm", "vcpus=1")
        eventually((user.home / "runs").exists, "the script runs")
        first = output(user, job)
        (user.home / "runs").unlink()
        words = ("--parsable", "-p", "urgent", "-w", "n1", "-n", "4", "-D", "/", "-o", "/dev/null", "--wrap", "sleep 5")
        urgent = cluster.control(*words, program="sbatch").stdout.strip()
        eventually(lambda: cluster.facts(urgent)["JobState"] == "RUNNING", lambda: str(cluster.facts(urgent)))
        assert cluster.facts(job)["JobState"] == state
        if state == "PENDING":
            assert cluster.facts(job)["Restarts"] == "1" and cluster.facts(job)["Comment"].startswith("vtorque:/")
            eventually((user.home / "runs").exists, "the script runs again")
            cancelled(cluster, job)
        assert first == "run on vn1-1\n" and output(user, job) == f"{first}told\n"
    eventually(lambda: not cluster.left_behind(), lambda: f"left: {cluster.left_behind()}", limit_s=60)


@pytest.mark.slow
def test_a_job_that_slurm_suspends_goes_on(cluster: Slurm, user: User) -> None:
    """Slurm stops the job wrapper, and what is between it and the guest."""
    job = user.submit("trap 'echo stop' TSTP; touch runs; until [ -e go ]; do sleep 0.1; done; echo done\n")
    number = job.partition(".")[0]
    eventually((user.home / "runs").exists, "the script runs")
    assert cluster.control("suspend", number).returncode == 0
    assert cluster.facts(job)["JobState"] == "SUSPENDED"
    wrappers = cluster.processes("libexec/vtorque-job")
    eventually(lambda: any(each.status() == "stopped" for each in wrappers), "its wrapper is stopped")
    assert cluster.control("resume", number).returncode == 0
    user.write("go", "")
    assert cluster.wait(job) == 0 and output(user, job) == "stop\ndone\n"
    assert cluster.reached("n1", job, "gone"), "its agent has ended by itself"


def cancelled(cluster: Slurm, job: str) -> None:
    """Cancel a job: all nodes end clean soon, and stay so."""
    assert cluster.control(job.partition(".")[0], program="scancel").returncode == 0
    eventually(lambda: not cluster.left_behind(), lambda: f"left: {cluster.left_behind()}", limit_s=60)
    cluster.wait(job)
    assert cluster.facts(job)["JobState"] == "CANCELLED"
    assert not cluster.left_behind()


def test_a_user_who_changes_the_comment_gains_nothing(cluster: Slurm, user: User) -> None:
    """The Epilog knows a guest job by its record; a comment that names somebody else's directory brings no guests."""
    job = user.submit(STAYS)
    eventually((user.home / "runs").exists, "the script runs")
    done = user.run(str(BIN / "scontrol"), "update", f"job={job.partition('.')[0]}", "comment=mine")
    assert done.returncode == 0 and cluster.facts(job)["Comment"] == "mine"
    (shown,) = json.loads(cluster.enter("n1", str(cluster.vmgr), "ps", "--json"))
    assert (shown["job"], shown["node"], shown["user"]) == (cluster.whole(job), "n1", user.name), shown
    (agent,) = cluster.processes("libexec/vtorque-agent")
    agent.kill()  # what it had made is left to the Epilog
    cluster.wait(job)
    eventually(lambda: not cluster.left_behind(), lambda: f"left: {cluster.left_behind()}", limit_s=15)
    path = user.write("plain.sh", "#!/bin/sh\nhostname\n")
    foreign = f"--comment=vtorque:/root/.vtorque/{'a' * 16}/{'0' * 64}"
    done = user.run(str(BIN / "sbatch"), "--parsable", foreign, "-o", "plain.o", str(path))
    assert cluster.wait(done.stdout.strip()) == 0 and user.output("plain.o") == "n1\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_a_user_makes_of_jobs_by_hand_leaves_nothing(cluster: Slurm, user: User) -> None:
    """One specification for a plain job that runs, for both parts of a heterogeneous job, and for a job of root's."""
    held = user.submit("true\n", "-h").partition(".")[0]
    comment = cluster.facts(held)["Comment"]
    plain = str(user.write("plain.sh", "#!/bin/sh\nsleep 300\n"))
    sbatch = (str(BIN / "sbatch"), "--parsable", "--output=/dev/null")
    runs = user.run(*sbatch, plain).stdout.strip()
    parts = user.run(*sbatch, f"--comment={comment}", ":", f"--comment={comment}", plain).stdout.strip()
    roots = cluster.control("--parsable", "--output=/dev/null", f"--comment={comment}", plain, program="sbatch")
    jobs = [runs, parts, roots.stdout.strip()]
    eventually(lambda: all(cluster.running(job) for job in jobs), lambda: str([cluster.facts(job) for job in jobs]))
    done = user.run(str(BIN / "scontrol"), "update", f"job={runs}", f"comment={comment}")
    assert done.returncode == 0, done.stderr
    eventually(
        lambda: "no job has come for the guest" in "".join(map(cluster.log, cluster.nodes)), "guests without jobs"
    )
    assert any("jobs of root do not run in guests" in cluster.log(node) for node in cluster.nodes)
    for job in (*jobs, held):
        cluster.control(job, program="scancel")
    for job in jobs:
        cluster.wait(job)
    cluster.assert_clean()  # no tombstone either


def left_on(cluster: Slurm, node: str) -> list[str]:
    """What there is of jobs on a node."""
    return [what for what in cluster.left_behind() if what.startswith(f"{node} ") or f"/nodes/{node}/" in what]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_gives_a_node_back_goes_on_without_it(cluster: Slurm, user: User) -> None:
    job = user.submit("echo before; touch runs; while [ ! -e go ]; do sleep 1; done; echo after\n", *TWO)
    eventually((user.home / "runs").exists, "the script runs")
    done = user.run(str(BIN / "scontrol"), "update", f"job={job.partition('.')[0]}", "numnodes=1")
    assert done.returncode == 0, done.stderr
    # its Epilog waits there for `timeouts.sisters` first, in vain: the job has not ended
    eventually(lambda: not left_on(cluster, "n2"), lambda: str(left_on(cluster, "n2")))
    user.write("go", "")
    assert cluster.wait(job) == 0
    assert output(user, job) == "before\nafter\n"


def test_the_controller_may_go_while_guests_run(cluster: Slurm, user: User) -> None:
    job = user.submit("touch runs; until [ -e go ]; do sleep 0.2; done; echo done\n", *TWO)
    eventually((user.home / "runs").exists, "the script runs")
    cluster.end("slurmctld")
    user.write("go", "")
    for node in ("n1", "n2"):
        cluster.wait_on(node, job, "gone")
    cluster.start_controller()
    assert cluster.wait(job) == 0 and output(user, job) == "done\n"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_jobs_in_a_row(cluster: Slurm, user: User) -> None:
    jobs = [user.submit("hostname\n", "-l", "nodes=1:ppn=4", "-vm", "vcpus=1") for _ in range(50)]
    for job in jobs:
        assert cluster.wait(job) == 0, output(user, job, "e")
        assert re.fullmatch(r"vn\d-1\n", output(user, job))
    eventually(lambda: not cluster.left_behind(), lambda: f"left: {cluster.left_behind()}", limit_s=15)
    assert not list((user.home / ".vtorque").iterdir())


@pytest.mark.parametrize("noticed", ["by hand", pytest.param("by itself", marks=pytest.mark.slow)])
def test_a_node_loses_its_power(cluster: Slurm, user: User, noticed: str) -> None:
    """The job is queued again, nothing stays on its other node, and it runs to its end elsewhere."""
    lost = cluster.nodes[-1]
    script = "echo run on $(hostname); [ -e again ] || { touch again; sleep 300; }\n"
    job = user.submit(script, "-l", f"nodes=n1+{lost}")
    number = job.partition(".")[0]
    eventually((user.home / "again").exists, "the first run")
    cluster.lose(lost)
    if noticed == "by hand":
        assert cluster.control("update", f"nodename={lost}", "state=down", "reason=power").returncode == 0
    eventually(lambda: cluster.facts(job)["Restarts"] == "1", "it is queued again")
    assert cluster.control("update", f"job={number}", "reqnodelist=n1,n2").returncode == 0
    eventually(lambda: not cluster.left_behind(), lambda: f"left: {cluster.left_behind()}", limit_s=30)
    assert cluster.wait(job) == 0, output(user, job, "e")
    assert output(user, job).splitlines()[-1] == "run on vn1-1"
    assert not cluster.reached(lost, job, "gone")
