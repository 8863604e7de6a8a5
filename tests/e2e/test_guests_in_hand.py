"""`vmgr` and running guests: on their nodes, and from a front end over the user's own SSH.

One job of two guests on two of four simulated nodes. Real SSH daemons run on three of them, one of which lets nobody
in; the fourth has none. The machine itself is the front end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from .cluster import EVERYWHERE, Cluster
from .conftest import PATIENCE_S, Site, User, account, eventually, on_engine
from .terminal import SHELL, terminal

ENGINES = ("local", "slurm")
OWN = EVERYWHERE.replace("nodes: 3, ", "nodes: 4, ").replace("user_file: 2", "user_file: 2, reach: 5")
PORT = 22
SSHD = """\
Port {port}
ListenAddress {address}
HostKey {key}
PidFile none
UsePAM no
PasswordAuthentication no
AuthorizedKeysFile .ssh/authorized_keys
AllowUsers {users}
StrictModes no
"""


class Hand:
    """The installation, the user, the user's job."""

    def __init__(self, cluster: Cluster, user: User, other: User, job: str) -> None:
        self.cluster, self.user, self.other, self.job = cluster, user, other, job

    def vmgr(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """`vmgr` as the user, on the front end."""
        return self.as_user(self.user, *words, **options)

    def as_user(self, user: User, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
        argv = [str(self.cluster.vmgr), *words]
        return subprocess.run(
            argv, user=user.uid, group=user.gid, extra_groups=[], cwd=user.home, input=given, text=True,
            env={"PATH": "/usr/bin:/bin", "HOME": str(user.home), "LANG": "C.UTF-8", **self.cluster.environment},
            capture_output=True, timeout=PATIENCE_S,
        )  # fmt: skip

    def on(self, node: str, *words: str, user: str = "root") -> subprocess.CompletedProcess[str]:
        """`vmgr` in a node, as root or a user."""
        enter = [str(self.cluster.prefix / "libexec" / "vtorque-local"), "enter", node]
        become = [] if user == "root" else ["setpriv", "--reuid", user, "--regid", user, "--init-groups"]
        argv = [*enter, *become, str(self.cluster.vmgr), *words]
        return subprocess.run(
            argv, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S,
            env={**os.environ, **self.cluster.environment},
        )  # fmt: skip

    def states(self) -> dict[int, str]:
        done = self.vmgr("ps", "--job", self.job, "--json")
        assert done.returncode == 0, done.stderr
        return {row["rank"]: row["state"] for row in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with on_engine(request.param, OWN) as here:
        yield here


@pytest.fixture(scope="module")
def hand(cluster: Cluster) -> Iterator[Hand]:
    with ExitStack() as stack:
        for name in ("prologue", "prologue.parallel"):
            with (cluster.root / "vm" / name).open("a") as hook:
                hook.write("printf '\\033[31mHello from %s\\033[0m\\n' \"$(hostname)\" >/dev/console\n")
        user, other = (stack.enter_context(account(cluster)) for _ in range(2))
        for each in (user, other):
            subprocess.run(["usermod", "-p", "*", each.name], check=True)
        stack.enter_context(ssh_on_nodes(cluster, user))
        job = cluster.whole(user.submit("sleep 600\n", "-l", "nodes=2"))
        try:
            cluster.wait_on("n1", job, "job started")
            yield Hand(cluster, user, other, job)
        finally:
            cluster.client("qdel", job)
            cluster.assert_clean()


@contextmanager
def ssh_on_nodes(cluster: Cluster, user: User) -> Iterator[None]:
    """SSH daemons on n1 and n2, one on n3 that lets the user not in, and the user's key and known hosts."""
    folder, home = cluster.root / "ssh", user.home / ".ssh"
    folder.mkdir(mode=0o755)
    home.mkdir(mode=0o700)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / "id_ed25519")], check=True)
    shutil.copy(home / "id_ed25519.pub", home / "authorized_keys")
    config, known, daemons = "", "", []
    enter = [str(cluster.prefix / "libexec" / "vtorque-local"), "enter"]
    Path("/run/sshd").mkdir(exist_ok=True)
    try:
        for node in cluster.nodes:
            address, key = cluster.address(node), folder / node
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
            config += f"Host {node}\n  HostName {address}\n  HostKeyAlias {node}.cluster\n"
            known += f"{node}.cluster {key.with_suffix('.pub').read_text()}"
            users = "nobody-at-all" if node == "n3" else user.name
            settings = folder / f"{node}.config"
            settings.write_text(SSHD.format(port=PORT, address=address, key=key, users=users))
            if node != "n4":
                daemons.append(subprocess.Popen([*enter, node, "/usr/sbin/sshd", "-D", "-e", "-f", str(settings)]))
        (home / "config").write_text(config)
        (home / "known_hosts").write_text(known)
        for path in (home, *home.iterdir()):
            os.chown(path, user.uid, user.gid)
        for node in cluster.nodes[:2]:
            eventually(lambda node=node: answers(user, node), f"sshd on {node}", limit_s=20)  # type: ignore[misc]
        yield
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait()


def answers(user: User, node: str) -> bool:
    return user.run("ssh", "-o", "BatchMode=yes", node, "true").returncode == 0


# --- what runs where


def test_guests_from_a_front_end(hand: Hand) -> None:
    done = hand.vmgr("ps")
    assert (done.returncode, done.stderr) == (0, ""), done
    head, *rows = [line.split() for line in done.stdout.splitlines()]
    assert head == ["JOB", "RANK", "NODE", "IMAGE", "VCPUS", "RAM_MIB", "STATE", "AGE", "CPU", "ADDRESS", "REASON"]
    assert [row[:3] for row in rows] == [[hand.job, "0", "n1"], [hand.job, "1", "n2"]]
    assert all(row[3].startswith("micro@") and row[4] == "1" and row[6] == "running" for row in rows), rows
    assert all(row[8].endswith("%") and row[9].startswith("10.") for row in rows)

    told = hand.vmgr("ps", "--all", "--json")
    assert told.returncode == 0
    rows = json.loads(told.stdout)
    assert [(row["guest"], row["user"]) for row in rows] == [("vn1-1", hand.user.name), ("vn2-1", hand.user.name)]
    assert all(row["cpu_s"] > 0 and row["age_s"] > 0 and row["mac"].count(":") == 5 for row in rows)
    lines = sorted(told.stderr.splitlines())
    assert len(lines) == 2 and all(line.startswith("VT-CONNECT: node n") for line in lines), lines
    assert "refuses your login by key; the site may forbid logins to its nodes" in lines[0]
    assert "VT-CONNECT: node n4 (" in lines[1] and "cannot be reached: " in lines[1]

    busy = hand.vmgr("top", "--count", "2", "--interval", "0.2", "--wide")
    assert busy.stdout.count("vn1-1") == 2 and busy.stdout.count("MAC") == 2


def test_guests_on_their_node(hand: Hand) -> None:
    here = hand.on("n2", "ps", "--json")
    assert [(row["rank"], row["node"]) for row in json.loads(here.stdout)] == [(1, "n2")], here.stderr
    assert hand.on("n3", "ps", "--json").stdout.strip() == "[]", "a node without guests asks nobody else"


def test_a_node_whose_key_is_not_known(hand: Hand) -> None:
    known = hand.user.home / ".ssh" / "known_hosts"
    text = known.read_text()
    others = [line for line in text.splitlines(True) if not line.startswith("n1.")]
    swapped = [line.replace("n2.cluster", "n1.cluster") for line in text.splitlines(True) if line.startswith("n2.")]
    try:
        known.write_text("".join(others))
        done = hand.vmgr("ssh", hand.job, "true")
        assert done.returncode == 79 and done.stderr.startswith("VT-CONNECT: the host key of node n1"), done
        known.write_text("".join([*others, *swapped]))
        done = hand.vmgr("ssh", hand.job, "true")
        assert done.returncode == 79 and "shows another host key than the one that you know" in done.stderr, done
        assert known.read_text() == "".join([*others, *swapped]), "nothing is added"
    finally:
        known.write_text(text)


def test_others_are_refused(hand: Hand) -> None:
    assert json.loads(hand.as_user(hand.other, "ps", "--json").stdout) == []
    for words in (["ps", "--job"], ["ssh"], ["console"], ["power", "on"], ["report"], ["logs"]):
        done = hand.as_user(hand.other, *words, hand.job)
        assert done.returncode == 2 and done.stderr.startswith("VT-ACCESS: "), (words, done)
    for words in (["ssh"], ["console"], ["power", "reset", "--yes"]):
        done = hand.on("n1", *words, f"{hand.job}:0", user=hand.other.name)
        assert done.returncode == 2 and "this job belongs to uid" in done.stderr, (words, done)
    assert json.loads(hand.on("n1", "ps", "--json", user=hand.other.name).stdout) == []
    assert hand.states() == {0: "running", 1: "running"}


# --- what is kept of the job


def test_reports_and_logs_from_a_front_end(hand: Hand) -> None:
    told = hand.vmgr("report", hand.job.partition(".")[0], "--json")
    assert (told.returncode, told.stderr) == (0, ""), told
    report = json.loads(told.stdout)
    assert [(part["node"], part["alive"]) for part in report["parts"]] == [("n1", True), ("n2", True)]
    assert report["job_id"] == hand.job and report["missing"] == {} and report["parts"][0]["state"] == "running"
    shown = hand.vmgr("report", hand.job).stdout
    assert "vn2-1 (1)" in shown and shown.splitlines()[1].endswith(", running")
    lines = hand.vmgr("logs", hand.job).stdout.splitlines()
    assert {line.partition(" ")[0] for line in lines} == {"n1:", "n2:"}
    assert [line.split()[1:3] for line in lines] == sorted(line.split()[1:3] for line in lines)
    assert "job started after" in hand.vmgr("logs", hand.job, "--node", "n1").stdout
    console = hand.vmgr("logs", hand.job, "--console", "1")
    assert "Hello from vn2-1" in console.stdout and "\x1b" not in console.stdout, console
    for command in ("report", "logs"):
        assert hand.on("n1", command, hand.job, "--here", user=hand.user.name).returncode == 0
        refused = hand.on("n1", command, hand.job, "--here", user=hand.other.name)
        assert refused.returncode == 2 and "another user's" in refused.stderr, refused


# --- in a guest


def test_into_guests(hand: Hand) -> None:
    with terminal(hand.user, str(hand.cluster.vmgr), "ssh", f"{hand.job.partition('.')[0]}:1") as shell:
        shell.expect(SHELL)
        shell.run("tty; hostname; exit 5", r"/dev/pts/\d+\r\nvn2-1\r\n")
        assert shell.end() == 5
    assert hand.on("n1", "ssh", f"{hand.job}:0", "hostname", user=hand.user.name).stdout.strip() == "vn1-1"
    as_root = hand.on("n1", "exec", hand.job, "--", "id", "-un")
    assert as_root.stdout.strip() == hand.user.name, as_root
    missing = hand.vmgr("ssh", f"{hand.job}:7", "true")
    assert missing.returncode == 2 and "has no guest of rank 7; it has 0 to 1" in missing.stderr


def test_running_a_command(hand: Hand) -> None:
    done = hand.vmgr("exec", hand.job, "--", "sh", "-c", 'cat; echo "$1" >&2; exit 3', "sh", "a  b;$HOME'", given="in")
    assert (done.returncode, done.stdout, done.stderr) == (3, "in", "a  b;$HOME'\n"), done
    child = hand.user.start(str(hand.cluster.vmgr), "exec", hand.job, "--", "sh", "-c", "echo up; exec sleep 100")
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 128 + signal.SIGTERM, "the signal has reached it"


def test_copying(hand: Hand) -> None:
    folder = hand.user.home / "folder"
    folder.mkdir()
    (folder / "a file").write_text("data\n")
    for path in (folder, *folder.iterdir()):
        os.chown(path, hand.user.uid, hand.user.gid)
    done = hand.vmgr("cp", "-r", "folder", f"{hand.job}:1:/tmp/there")
    assert done.returncode == 0, done
    done = hand.vmgr("cp", f"{hand.job}:1:/tmp/there/a file", "12:back")
    assert done.returncode == 2 and done.stderr.startswith("VT-USAGE: "), done
    done = hand.vmgr("cp", f"{hand.job}:1:/tmp/there/a file", "./12:back")
    assert done.returncode == 0 and (hand.user.home / "12:back").read_text() == "data\n", done


def test_the_console(hand: Hand) -> None:
    seen = hand.vmgr("console", hand.job, "--no-follow", "--last", "65536")
    assert (seen.returncode, seen.stdout.splitlines()[-1:]) == (0, ["Hello from vn1-1"]), seen
    raw = hand.vmgr("console", f"{hand.job}:0", "--no-follow", "--raw")
    assert "\x1b[31mHello from vn1-1\x1b[0m" in raw.stdout, raw
    argv = [str(hand.cluster.vmgr), "console", f"{hand.job}:1", "--last", "0"]
    follower = hand.user.start(*argv)
    typist = subprocess.Popen(
        [*argv, "--attach"], user=hand.user.uid, group=hand.user.gid, extra_groups=[], cwd=hand.user.home,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin", "HOME": str(hand.user.home), **hand.cluster.environment},
    )  # fmt: skip
    assert typist.stdin is not None and typist.stdout is not None and follower.stdout is not None
    try:
        time.sleep(0.1)
        typist.stdin.write(b"is anybody there\r")
        typist.stdin.flush()
        assert b"is anybody there" in typist.stdout.readline(), "the guest's terminal echoes"
    finally:
        for child in (follower, typist):
            child.kill()
            child.wait()
    eventually(lambda: not hand.cluster.processes("agent-link"), "nothing of them is left on the node", limit_s=20)


# --- its power


def test_power(hand: Hand) -> None:
    second = f"{hand.job}:1"
    for words, says in (
        (["reset", hand.job, "--yes"], f"VT-VALUE: job {hand.job} has 2 guests; say which"),
        (["reset", second], "VT-USAGE: power reset of"),
        (["on", second], "VT-GUEST: the guest vn2-1 is not off"),
    ):
        done = hand.vmgr("power", *words)
        assert done.returncode != 0 and done.stderr.startswith(says), done
    start = time.monotonic()
    with terminal(hand.user, str(hand.cluster.vmgr), "power", "reset", second) as asked:
        asked.expect(r"power reset of .*: what runs in it is lost\. Go on\?")
        asked.type("y\r")
        asked.expect(r"vn2-1 is booting\r\nvn2-1 is ready\r\n")
        assert asked.end() == 0
    uptime = float(hand.vmgr("exec", second, "cat", "/proc/uptime").stdout.split()[0])
    assert uptime < time.monotonic() - start + 1, "it has booted anew"
    done = hand.vmgr("power", "off", second, "--yes")
    assert (done.returncode, done.stdout) == (0, "vn2-1 is off\n"), done
    assert hand.states() == {0: "running", 1: "off"}
    assert "root-epilogue.parallel 0 vn2-1" in (hand.user.home / "hooks").read_text(), "it was shut down"
    done = hand.vmgr("ssh", second, "true")
    assert done.returncode == 76 and done.stderr.startswith("VT-GUEST: the guest vn2-1 is off; "), done
    done = hand.on("n2", "power", "on", second)
    assert (done.returncode, done.stdout) == (0, "vn2-1 is booting\nvn2-1 is ready\n"), done
    assert hand.vmgr("ssh", second, "hostname").stdout == "vn2-1\n"
    assert hand.states() == {0: "running", 1: "running"}, "the job has gone on"


def test_the_job_ends_with_its_first_guest(hand: Hand) -> None:
    done = hand.vmgr("power", "off", f"{hand.job}:0", "--yes", "--now")
    assert done.returncode == 0 and f"job {hand.job} ends" in done.stdout, done
    assert hand.cluster.wait(hand.job) == 76
    said = hand.user.output(f"job.sh.e{hand.job.partition('.')[0]}")
    assert "VT-GUEST: the guest vn1-1, in which the job's script runs, was switched off by uid" in said
    hand.cluster.assert_clean()
    gone = hand.vmgr("ssh", hand.job, "true")
    assert gone.returncode == 78 and gone.stderr.startswith(f"VT-AGENT: job {hand.job} has no nodes"), gone
