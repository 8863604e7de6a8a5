"""Jobs that give their nodes back and go on later, elsewhere: one installation, simulated nodes, real guests.

The batch system is the embedded one, or a real Slurm.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import EVERYWHERE, Cluster
from .conftest import CONFIG, PATIENCE_S, Site, User, as_user, eventually, on_engine

ENGINES = ("local", "slurm")
SUSPENDABLE = EVERYWHERE.replace(
    "policy:\n", "suspended: {{folder: {root}/suspended}}\npolicy:\n  suspend: {{enabled: true}}\n"
)
COUNTING = """\
secret=$RANDOM$RANDOM
echo "$secret began"
touch "$HOME/counting" # the login shell around has read its own files, which lie on a share
lines=0
until [ -e "$HOME/go" ]; do
    lines=$((lines + 1))
    echo "line $lines"
    sleep 0.2
done
echo "$secret wrote $lines"
hostname >&2
exit 3
"""
assert SUSPENDABLE != EVERYWHERE != CONFIG


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with on_engine(request.param, SUSPENDABLE) as here:
        folder = here.root / "suspended"
        folder.mkdir()
        folder.chmod(0o1777)
        yield here


def begun(cluster: Cluster, user: User, *options: str) -> str:
    """A job whose script counts."""
    job = user.submit(COUNTING, "-vm", "suspend=on", *options)
    cluster.wait_on("n1", job, "job started")
    eventually((user.home / "counting").exists, "the script counts")
    return job


def words_on(cluster: Cluster, node: str, user: User, *words: str) -> list[str]:
    """`vmgr` on a node, as the user."""
    local = str(cluster.prefix / "libexec" / "vtorque-local")
    return [local, "enter", node, *as_user(user, str(cluster.vmgr), *words)]


def vmgr(cluster: Cluster, user: User, *words: str) -> str:
    """What `vmgr` says to the user on the first node."""
    done = subprocess.run(words_on(cluster, "n1", user, *words), capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def suspend(cluster: Cluster, user: User, job: str) -> None:
    """Suspend a job: nothing is left of it but what is stored, and it waits, held."""
    assert f"job {cluster.whole(job)} is suspended" in vmgr(cluster, user, "suspend", job)
    cluster.assert_clean()
    eventually(lambda: cluster.held(job), "the job waits, held")
    (found,) = json.loads(vmgr(cluster, user, "show", "suspended", "--json"))
    assert (found["job_id"], found["user"]) == (cluster.whole(job), user.name)


def goes_on(cluster: Cluster, node: str, job: str) -> int:
    """How often a job has begun or gone on on a node."""
    return cluster.log(node).count(f"job {cluster.whole(job)}: job started after")


def waiting(cluster: Cluster, user: User) -> str:
    """Why the user's only suspended job did not go on the last time."""
    (found,) = json.loads(vmgr(cluster, user, "show", "suspended", "--json"))
    return str(found["reason"])


def check_counted(user: User, job: str, host: str, told: str = "") -> None:
    """The output is whole: one process has counted all of it. What was `told` stands before its errors."""
    number = job.partition(".")[0]
    out = user.output(f"job.sh.o{number}").splitlines()
    secret = out[0].partition(" ")[0]
    wrote = re.fullmatch(rf"{secret} wrote (\d+)", out[-1])
    assert wrote is not None and out[0] == f"{secret} began", out
    assert out[1:-1] == [f"line {line}" for line in range(1, int(wrote[1]) + 1)]
    errors = user.errors("job.sh", number)
    assert errors.endswith(f"{host}\n") and errors.count("\n") == 1 + bool(told) and errors.startswith(told), errors


def store_of(cluster: Cluster, user: User) -> list[Path]:
    return list((cluster.root / "suspended" / user.name).glob("*"))


def test_a_job_goes_on_where_it_was(cluster: Cluster, user: User) -> None:
    job = begun(cluster, user)
    suspend(cluster, user, job)
    assert [path.name for path in store_of(cluster, user)] == [cluster.whole(job)]
    assert "suspended" in vmgr(cluster, user, "ps")
    (part,) = store_of(cluster, user)[0].glob("node.*.json")
    text = part.read_text()
    part.write_text(re.sub(r'"qemu": "\d+', '"qemu": "1', text))
    vmgr(cluster, user, "resume", job)
    eventually(lambda: "QEMU 1." in waiting(cluster, user), "it could not go on, and waits again")
    eventually(lambda: cluster.held(job), "the job waits again, held")
    cluster.assert_clean()
    part.write_text(text)
    vmgr(cluster, user, "resume", job)
    eventually(lambda: goes_on(cluster, "n1", job) == 2, "its script goes on")
    suspend(cluster, user, job)
    with cluster.offline("n1"):
        vmgr(cluster, user, "resume", job)
        cluster.wait_on("n2", job, "job started")
    (user.home / "go").touch()
    assert cluster.wait(job) == 3
    check_counted(user, job, "vn1-1", "vtorque: the job does not go on here, and is to wait again, held: VT-LAUNCH: ")
    assert store_of(cluster, user) == []
    cluster.assert_clean()


@pytest.mark.slow
def test_an_agent_that_is_killed_does_not_lose_its_job(cluster: Cluster, user: User) -> None:
    """While its guest comes back: the job waits again, held, and goes on when it is released."""
    job = begun(cluster, user)
    suspend(cluster, user, job)
    vmgr(cluster, user, "resume", job)
    back = f"job {cluster.whole(job)}: pinned and running after"
    eventually(lambda: cluster.log("n1").count(back) == 2, "its guest comes back")
    agents = cluster.processes("libexec/vtorque-agent")  # and their children
    for agent in [each for each in agents if each.parent() not in agents]:
        agent.kill()
    eventually(lambda: "VT-AGENT: the node agent has died" in waiting(cluster, user), "it waits again")
    eventually(lambda: cluster.held(job), "the job waits again, held")
    cluster.assert_clean()
    (user.home / "go").touch()
    vmgr(cluster, user, "resume", job)
    assert cluster.wait(job) == 3
    check_counted(user, job, "vn1-1", "vtorque: the job does not go on here, and is to wait again, held: VT-AGENT: ")
    assert store_of(cluster, user) == []
    cluster.assert_clean()


def test_a_job_of_two_nodes_goes_on_elsewhere(cluster: Cluster, user: User) -> None:
    job = begun(cluster, user, "-l", "nodes=2")
    with subprocess.Popen(
        words_on(cluster, "n2", user, "ssh", f"{job}:1", "cd && echo there && cat"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holding:  # fmt: skip
        assert holding.stdout is not None and holding.stdout.readline() == "there\n"
        refused = subprocess.run(words_on(cluster, "n1", user, "suspend", job), capture_output=True, text=True)
        assert refused.returncode == 2 and "n2: the guest vn2-1 cannot let go of its shares" in refused.stderr
        assert cluster.running(job) and store_of(cluster, user) == []
        assert holding.communicate("still there\n")[0] == "still there\n"
    suspend(cluster, user, job)
    with cluster.offline("n1"):
        vmgr(cluster, user, "resume", job)
        eventually(lambda: goes_on(cluster, "n2", job) == 1, "its script goes on")
        (user.home / "go").touch()
        assert cluster.wait(job) == 3
    check_counted(user, job, "vn1-1")
    assert cluster.reached("n3", job, "resumed") and store_of(cluster, user) == []
    cluster.assert_clean()
