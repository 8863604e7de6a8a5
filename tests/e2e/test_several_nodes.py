"""Guest jobs over several nodes, several guests on each: simulated nodes, real guests.

The batch system is the embedded one, or a real Slurm.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmgr.errors import Code
from vmgr.report.parts import read_parts
from vmgr.report.timeline import Phase, Timeline, newest, plan

from .cluster import EVERYWHERE, FOUR, NODES, Cluster, hanging
from .conftest import Site, User, eventually, on_engine

ENGINES = ("local", "slurm")
HOOKS = pytest.mark.only("local", reason="changes the hooks of TORQUE's that the embedded batch system calls")
HOLDS = pytest.mark.only("local", reason="TORQUE's way to hold jobs; test_slurm.py and test_suspend.py show Slurm's")


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with on_engine(request.param, EVERYWHERE) as here:
        yield here


def test_two_nodes_with_two_guests_each(cluster: Cluster, user: User) -> None:
    done = user.job("hostname; echo rank $VTORQUE_RANK of $VTORQUE_GUESTS; cat $PBS_NODEFILE\n", *FOUR)
    guests = ["vn1-1", "vn1-2", "vn2-1", "vn2-2"]
    assert (done.status, done.err) == (0, ""), done
    assert done.out.splitlines() == ["vn1-1", f"rank 0 of {' '.join(guests)}", *guests]
    hooks = (user.home / "hooks").read_text().splitlines()
    assert sorted(hooks) == sorted(
        [f"root-{kind} 0 vn1-1" for kind in ("prologue", "epilogue")]
        + [f"root-{kind}.parallel 0 {name}" for kind in ("prologue", "epilogue") for name in guests[1:]]
    )
    for node in ("n1", "n2"):
        assert cluster.reached(node, done.job_id, "gone"), "its agent has ended by itself, not by the epilogue"
    assert not (user.home / ".vtorque").exists() or not list((user.home / ".vtorque").iterdir())
    rows = timeline(cluster, done.job_id).rows
    assert [(row.name, row.rank) for row in rows] == [
        ("n1", None), ("vn1-1", 0), ("vn1-2", 1), ("n2", None), ("vn2-1", 2), ("vn2-2", 3),
    ]  # fmt: skip
    jobs = [bar for row in rows for bar in row.bars if bar.phase is Phase.JOB]
    assert len(jobs) == 4 and max(bar.start for bar in jobs) - min(bar.start for bar in jobs) < 0.5


def timeline(cluster: Cluster, job_id: str) -> Timeline:
    """What the two nodes of a job have kept of it, put together."""
    vmgr = str(cluster.prefix / "bin" / "vmgr")
    told = [cluster.enter(node, vmgr, "report", "--part", cluster.whole(job_id)) for node in ("n1", "n2")]
    return plan(newest([part for text in told for part in read_parts(text.encode())]), time.time())


def test_the_barrier_has_little_slack(cluster: Cluster, user: User) -> None:
    done = user.job("true\n", "-l", "nodes=3")
    ready = re.findall(r"guests ready after ([0-9.]+) s", "".join(cluster.log(node) for node in NODES))
    assert done.status == 0 and len(ready) >= 3
    start = re.findall(rf"job {re.escape(cluster.whole(done.job_id))}: ready after ([0-9.]+) s", cluster.log("n1"))
    last = max(
        float(seconds)
        for node in NODES
        for seconds in re.findall(
            rf"job {re.escape(cluster.whole(done.job_id))}: guests ready after ([0-9.]+) s", cluster.log(node)
        )
    )
    assert float(start[-1]) - last <= 1.0, f"job ready at {start[-1]} s, the last node at {last} s"


def test_a_failing_hook_of_a_sister_ends_the_job_with_its_output(cluster: Cluster, user: User) -> None:
    user.write("fail-prologue.parallel", "")
    done = user.job("echo never\n", "-l", "nodes=2")
    assert (done.status, done.out) == (77, "")
    assert "the prologue.parallel of the site says no" in done.err
    assert "VT-HOOK: n2: the site's VM prologue ended with status 5 in vn2-1" in done.err


def test_a_failing_epilogue_of_a_sister_is_told(cluster: Cluster, user: User) -> None:
    user.write("fail-epilogue.parallel", "")
    done = user.job("echo done\n", "-l", "nodes=2")
    assert (done.status, done.out) == (77, "done\n")
    assert "VT-HOOK: n2: the site's VM epilogue ended with status 5 in vn2-1" in done.err


@pytest.mark.parametrize("what", ["guest", pytest.param("agent", marks=pytest.mark.slow)])
def test_what_dies_on_a_sister_ends_the_job(cluster: Cluster, user: User, what: str) -> None:
    job = user.submit("echo started; touch runs; sleep 300\n", "-l", "nodes=2")
    eventually(lambda: (user.home / "runs").exists(), "the script runs")
    (qemu,) = [process for process in cluster.processes("qemu-system") if "vn2-1" in " ".join(process.cmdline())]
    if what == "guest":
        qemu.kill()
    else:
        qemu.parent().kill()
    said = {
        "guest": (76, "VT-GUEST: n2: the guest vn2-1 ended while the job was running"),
        "agent": (Code.AGENT.status, "VT-AGENT: n2: the node agent has died"),
    }
    status, reason = said[what]
    assert cluster.wait(job) == status
    number = job.partition(".")[0]
    assert user.output(f"job.sh.o{number}") == "started\n"
    assert reason in user.output(f"job.sh.e{number}")


@pytest.mark.parametrize(
    "stage",
    [
        "agent", "staged", "booted", "job started",
        *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("spec", "prologue", "ready")),
    ],
)  # fmt: skip
def test_a_job_deleted_at_any_stage_leaves_nothing(cluster: Cluster, user: User, stage: str) -> None:
    job = user.submit("echo before; touch runs; sleep 300\n", *FOUR)
    cluster.wait_on("n1", job, stage)
    if stage == "job started":
        eventually(lambda: (user.home / "runs").exists(), "the script runs")
    begun = time.monotonic()
    assert cluster.client("qdel", job).returncode == 0
    cluster.wait(job)
    eventually(lambda: not cluster.left_behind(), lambda: f"left: {cluster.left_behind()}", limit_s=15)
    assert time.monotonic() - begun <= 20, "all nodes end clean soon"
    if stage == "job started":
        assert user.output(f"job.sh.o{job.partition('.')[0]}") == "before\n"


def test_a_job_deleted_in_its_epilogues_leaves_nothing(cluster: Cluster, user: User) -> None:
    for name in ("slow-epilogue", "slow-epilogue.parallel"):
        user.write(name, "")
    job = user.submit("echo before\n", "-l", "nodes=2")
    hooks = user.home / "hooks"
    eventually(lambda: hooks.exists() and hooks.read_text().count("-epilogue") == 2, "the VM epilogues run")
    deleted_in_time(cluster, job)
    assert user.output(f"job.sh.o{job.partition('.')[0]}") == "before\n"


def deleted_in_time(cluster: Cluster, job: str) -> None:
    """Delete a job: all nodes end clean within 15 s, and stay so."""
    assert cluster.client("qdel", job).returncode == 0
    eventually(lambda: not cluster.left_behind(), lambda: f"left: {cluster.left_behind()}", limit_s=15)
    cluster.wait(job)
    assert not cluster.left_behind()


@HOOKS
@pytest.mark.parametrize(("hook", "number"), [("prologue", 0), ("prologue.parallel", 2)])
def test_nothing_comes_up_on_a_node_whose_prologue_is_late(
    cluster: Cluster, user: User, hook: str, number: int
) -> None:
    """The job is deleted before that node has begun: its epilogues run beside the prologue, which begins then."""
    with changed_hook(cluster, hook, f"[ $PBS_NODENUM != {number} ] || sleep 6"):
        job = user.submit("touch ran\n", "-l", "nodes=3")
        cluster.wait_on("n2", job, "agent")
        assert cluster.client("qdel", job).returncode == 0
        cluster.wait(job)
        late = NODES[number]
        eventually(lambda: f"job {job}: the job was deleted before its guest" in cluster.log(late), "it sees that")
    if number:
        age_tombstone(cluster, NODES[0])
    eventually(lambda: not cluster.left_behind(), lambda: f"left: {cluster.left_behind()}", limit_s=15)
    assert not cluster.reached(late, job, "agent"), "not even the agent has begun"
    for node in NODES:
        assert not cluster.reached(node, job, "booted")
    assert not (user.home / "ran").exists()


def age_tombstone(cluster: Cluster, node: str) -> None:
    """Let the janitor find the tombstone of a job whose prologue never began on a node: it stays for an hour."""
    cluster.enter(node, "sh", "-c", f"touch -d '2 hours ago' {cluster.run}/tombstones/*")
    cluster.enter(node, str(cluster.vmgr), "node", "reap")


@contextmanager
def changed_hook(cluster: Cluster, name: str, line: str) -> Iterator[None]:
    """A hook of all nodes that begins with `line`."""
    path = cluster.root / "local" / "mom_priv" / name
    kept = path.read_text()
    first, _, rest = kept.partition("\n")
    path.write_text(f"{first}\n{line}\n{rest}")
    try:
        yield
    finally:
        path.write_text(kept)


def test_a_job_deleted_while_its_specification_cannot_be_read(cluster: Cluster, user: User) -> None:
    """The job directory is on a file system that hangs, on every node: neither agents nor hooks wait for it."""
    job = user.submit("touch ran\n", "-h", "-l", "nodes=3")
    (spec,) = user.home.glob(".vtorque/*/*/spec.json")
    with hanging(cluster, user, spec.parent):
        assert cluster.client("qrls", job).returncode == 0
        for node in NODES:
            cluster.wait_on(node, job, "agent")
        deleted_in_time(cluster, job)
    for node in NODES:
        assert not cluster.reached(node, job, "spec")
    assert not (user.home / "ran").exists()


@HOOKS
def test_epilogues_make_no_node_wait(cluster: Cluster, user: User) -> None:
    """Under 0.3 s, after a clean end and of a job that is killed. A node under load can make any one of them slow: so
    each may take that much CPU time, but of each kind only the fastest is held against the clock.
    """
    ends = {"clean": "true\n", "killed": "trap '' TERM\ntouch runs\nfor i in $(seq 3000); do sleep 0.1; done\n"}
    walls: dict[tuple[str, str], list[float]] = {}
    cpu: list[float] = []
    note = f"trap 'times >>{cluster.root}/log/costs' EXIT"
    with changed_hook(cluster, "epilogue", note), changed_hook(cluster, "epilogue.parallel", note):
        for end, script in ends.items():
            for _ in range(2):
                job = user.submit(script, "-l", "nodes=3")
                if end == "killed":
                    eventually((user.home / "runs").exists, "the script runs")
                    (user.home / "runs").unlink()
                    assert cluster.client("qdel", job).returncode == 0
                cluster.wait(job)
                eventually(lambda: not cluster.left_behind(), lambda: f"left: {cluster.left_behind()}", limit_s=15)
                for name, seconds in hook_times(cluster, job):
                    walls.setdefault((end, name), []).append(seconds)
                cpu += [seconds for node in NODES for seconds in cpu_times(cluster.own(node) / "log" / "costs")]
    print("epilogues, wall:", walls, "CPU:", sorted(cpu))
    assert [len(seconds) for seconds in walls.values()] == [4, 2, 4, 2] and len(cpu) == 12, "none is missed"
    assert max(cpu) < 0.3
    assert max(min(seconds) for seconds in walls.values()) < 0.3


def hook_times(cluster: Cluster, job: str) -> list[tuple[str, float]]:
    """The seconds of root's epilogues of a job, as the batch system saw them."""
    log = (cluster.root / "local" / "server_priv" / "log").read_text()
    found = re.findall(
        rf"{re.escape(job)}: n\d: \S*/mom_priv/(epilogue(?:\.parallel)?): status 0 after ([0-9.]+) s", log
    )
    return [(name, float(seconds)) for name, seconds in found]


def cpu_times(path: Path) -> list[float]:
    """The CPU seconds of shells and their children, from what `times` of each has said in two lines; takes the file."""
    lines = path.read_text().splitlines()
    path.unlink()
    parts = [sum(60 * float(m) + float(s) for m, s in re.findall(r"([0-9]+)m([0-9.]+)s", line)) for line in lines]
    return [mine + children for mine, children in zip(parts[::2], parts[1::2])]


@HOLDS
def test_a_job_that_is_held_and_queued_again_starts_clean_elsewhere(cluster: Cluster, user: User) -> None:
    """By the programs that hold, requeue and release it: its owner's, and root's on its node."""
    batch = str(cluster.prefix / "libexec" / "vtorque-batch")
    script = "echo run $VTORQUE_RANK on $(hostname); [ -e again ] || { touch again; sleep 300; }\n"
    job = user.submit(script, *FOUR)
    cluster.wait_on("n1", job, "job started")
    eventually(lambda: (user.home / "again").exists(), "the first run")
    assert user.run(batch, "hold", job).stdout == '{"new": true}\n'
    refused = user.run(batch, "requeue", job)
    assert refused.returncode == 2 and "VT-ACCESS" in refused.stderr
    assert cluster.enter("n1", batch, "requeue", job) == "{}\n"
    eventually(lambda: "job_state = H" in cluster.client("qstat", "-f", job).stdout, "the job is held")
    eventually(lambda: not cluster.left_behind(), lambda: f"left: {cluster.left_behind()}", limit_s=15)
    with cluster.offline("n1"):
        assert user.run(batch, "release", job).stdout == "{}\n"
        assert cluster.wait(job) == 0
    assert user.output(f"job.sh.o{job.partition('.')[0]}") == "run 0 on vn1-1\nrun 0 on vn2-1\n"


def test_more_nodes_than_the_policy_has(cluster: Cluster, user: User) -> None:
    path = user.write("job.sh", "true\n")
    done = user.run(str(cluster.vsub), "-l", "nodes=4", str(path))
    assert done.returncode == 2 and "1 to 3 is allowed" in done.stderr
