"""The doctor's checks side by side, and many nodes at once by a real pdsh: what hangs, dies or lies holds up nobody."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from interrupting import Told
from nodesite import FUZZ, REPOSITORY, make_node, short_folder, wait_gone
from test_vmgr_cli import Vmgr
from test_vmgr_cli import vmgr_run as vmgr_run  # the fixture

from vmgr import pdsh
from vmgr.doctor import examine as examination
from vmgr.doctor import fleet
from vmgr.doctor.examine import CHECKS, examine
from vmgr.doctor.finding import Check, Finding, Level, Node
from vmgr.doctor.run import run
from vmgr.errors import Code, VTorqueError

pytestmark = pytest.mark.script_launch_mode("inprocess")

needs_pdsh = pytest.mark.skipif(shutil.which("pdsh") is None, reason="needs pdsh")


@pytest.fixture
def node() -> Iterator[Node]:
    with short_folder() as base:
        made = make_node(base)
        yield Node(made.install, made.config)


def good(node: Node) -> Iterator[Finding]:
    yield Finding("good", Level.OK, "all is well")


def look(node: Node, limit_s: float = 10.0, **checks: Check) -> list[Finding]:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    try:
        return examine(node, checks, limit_s=limit_s)
    finally:
        assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_findings_come_in_order(node: Node) -> None:
    def bad(node: Node) -> Iterator[Finding]:
        yield Finding("bad", Level.FAILURE, "no", "do")
        yield Finding("bad", Level.NOTE, "so")

    found = look(node, bad=bad, good=good)
    assert [(each.subject, each.level) for each in found] == [
        ("bad", Level.FAILURE), ("bad", Level.NOTE), ("good", Level.OK),
    ]  # fmt: skip


def test_a_check_that_hangs_is_ended_with_all_it_started(node: Node, tmp_path: Path) -> None:
    file = tmp_path / "pid"

    def hangs(node: Node) -> Iterator[Finding]:
        file.write_text(str(os.getpid()))
        run(["/bin/sh", "-c", f"echo $$ >{file}.child; exec sleep 60"], timeout_s=60)
        yield Finding("x", Level.OK, "never")

    begun = time.monotonic()
    hung, well = look(node, 1.0, hangs=hangs, good=good)
    assert time.monotonic() - begun < 5
    assert (hung.subject, hung.level) == ("hangs", Level.FAILURE) and "did not end within 1 s" in hung.what
    assert well.level is Level.OK
    for path in (file, Path(f"{file}.child")):
        assert wait_gone(int(path.read_text())), "nothing of it runs on"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (VTorqueError("no topology", code=Code.NODE, hint="is /sys mounted?"), "no topology"),
        (ZeroDivisionError("oh"), "fault in the check: ZeroDivisionError: oh"),
    ],
)
def test_a_check_that_fails(node: Node, error: Exception, said: str) -> None:
    def fails(node: Node) -> Iterator[Finding]:
        yield Finding("x", Level.OK, "so far")
        raise error

    failed, well = look(node, fails=fails, good=good)
    assert (failed.level, failed.what, well.level) == (Level.FAILURE, said, Level.OK)


def test_a_check_that_dies_or_says_too_much(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(node: Node) -> Iterator[Finding]:
        os.kill(os.getpid(), 9)
        yield Finding("x", Level.OK, "never")

    def talks(node: Node) -> Iterator[Finding]:
        yield Finding("x", Level.OK, "y" * 100_000)

    monkeypatch.setattr(examination, "MAX_BYTES", 50_000)
    for found in look(node, dies=dies, talks=talks):
        assert found.level is Level.FAILURE and "died before its end" in found.what


def test_each_subject_names_itself(node: Node) -> None:
    """Each check on a real machine, in whatever state: it gives findings, and all are of its subject."""
    for subject, check in CHECKS.items():
        try:
            found = list(check(node))
        except (VTorqueError, PermissionError) as err:
            assert os.geteuid() != 0, err  # others may not try all of it
            continue
        assert {each.subject for each in found} <= {subject}


# the command


def as_root(monkeypatch: pytest.MonkeyPatch, vmgr_run: Vmgr) -> None:
    if os.geteuid() != 0:
        assert vmgr_run.refuses("doctor").startswith("VT-ACCESS: ")
        monkeypatch.setattr("vmgr.commands.doctor.os.geteuid", lambda: 0)
        monkeypatch.setattr("vmgr.config.check_trusted", lambda path: None)


def with_checks(monkeypatch: pytest.MonkeyPatch, *found: Finding) -> None:
    checks: Mapping[str, Check] = {"all": lambda node: iter(found)}
    monkeypatch.setattr(examination, "examine", lambda node: examine(node, checks))


WELL = Finding("kernel", Level.OK, "Linux 6")
ODD = Finding("memory", Level.WARNING, "little", "add some")
BAD = Finding("KVM", Level.FAILURE, "none", "buy some")


@pytest.mark.parametrize(("found", "status", "strict"), [((WELL,), 0, 0), ((WELL, ODD), 0, 1), ((BAD, ODD), 1, 1)])
def test_exit_statuses(
    vmgr_run: Vmgr, monkeypatch: pytest.MonkeyPatch, found: tuple[Finding, ...], status: int, strict: int
) -> None:
    as_root(monkeypatch, vmgr_run)
    with_checks(monkeypatch, *found)
    assert vmgr_run("doctor").status == status and vmgr_run("doctor", "--strict").status == strict
    told = vmgr_run("doctor", "--json")
    assert told.status == status and json.loads(told.stdout)["findings"] == [each.as_plain() for each in found]


def test_what_people_read(vmgr_run: Vmgr, monkeypatch: pytest.MonkeyPatch) -> None:
    as_root(monkeypatch, vmgr_run)
    with_checks(monkeypatch, WELL, BAD)
    assert vmgr_run("doctor").stdout.splitlines() == [
        "ok       kernel        Linux 6", "failure  KVM           none", " " * 23 + "remedy: buy some",
    ]  # fmt: skip


def test_a_configuration_that_cannot_be_read_is_a_finding(vmgr_run: Vmgr, monkeypatch: pytest.MonkeyPatch) -> None:
    as_root(monkeypatch, vmgr_run)
    vmgr_run.node.install.config.write_text("engine: nonsense\n")
    status, out, err = vmgr_run("doctor")
    assert (status, err) == (1, "") and out.startswith("failure  configuration") and "line 1: engine" in out


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_this_machine(vmgr_run: Vmgr) -> None:
    """All checks for real, KVM included; how it is with this machine is not the test's to say."""
    found = json.loads(vmgr_run("doctor", "--json").stdout)["findings"]
    assert {each["subject"] for each in found} == set(CHECKS)
    assert not [each for each in found if "fault in the check" in each["what"] or "did not end" in each["what"]]
    (kvm,) = (each for each in found if each["subject"] == "KVM")
    assert "no image in the pool" in kvm["what"], "of the test's own pool"


# many nodes


def report_of(*found: Finding) -> str:
    return json.dumps({"worst": "ok", "findings": [each.as_plain() for each in found]}, indent=1)


def test_the_order_of_people() -> None:
    ordered = ["10", "a", "n1", "n1b", "n2", "n10"]
    mixed = ordered[3:] + ordered[:3]
    assert sorted(mixed, key=pdsh.natural) == ordered


def test_lines_are_told_apart_by_node() -> None:
    data = b"n1: {\nn2: x\npdsh@front: n3: ssh exited with exit code 255\nn1:  }\nn4: stranger\nnoise\nn3: a: b\n"
    for step in (1, 7, len(data)):
        heard = pdsh.Heard(["n1", "n2", "n3"])
        for at in range(0, len(data), step):
            heard.feed(data[at : at + step])
        assert heard.by_node() == {
            "n1": "{\n }", "n2": "x", "n3": "ssh exited with exit code 255\na: b",
        }  # fmt: skip


def test_a_node_that_is_called_as_a_program() -> None:
    heard = pdsh.Heard(["clush1", "n2"])
    heard.feed(b"clush1: n2: not its own\nclush: n2: ssh failed\n")
    assert heard.by_node() == {"clush1": "n2: not its own", "n2": "ssh failed"}


def test_a_node_that_says_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdsh, "MAX_NODE_BYTES", 100)
    heard = pdsh.Heard(["n1", "n2"])
    for _ in range(50):
        heard.feed(b"n1: xxxxxxxxx\n" * 50)
    heard.feed(b"n2: well\n")
    for _ in range(50):
        heard.feed(b"without an end" * 50)
        assert len(heard._rest) <= 100, "what is told of one node takes no more room than that"
    texts = heard.by_node()
    assert len(texts["n1"]) <= 110 and texts["n2"] == "well"


def test_reports() -> None:
    assert fleet.report("n1", report_of(BAD), "") == fleet.Report("n1", (BAD,))
    for out in ("", "{}", "[]", "nonsense", '{"findings": [3]}', "[" * 100_000):
        assert fleet.report("n1", out, "").problem == "no answer"
    said = fleet.report("n1", "", "ssh exited with exit code 255\nssh: no route\x1b[2J")
    assert said.problem == "ssh: no route\\x1b[2J"
    assert fleet.report("n1", "", "ssh exited with exit code 2").problem == "ssh exited with exit code 2"


@FUZZ
@given(st.binary(max_size=400))
def test_whatever_nodes_say(data: bytes) -> None:
    heard = pdsh.Heard(["n1", "n2"])
    heard.feed(data)
    for text in heard.by_node().values():
        assert isinstance(fleet.report("n1", text, text), fleet.Report)


@needs_pdsh
def test_sets_of_nodes() -> None:
    assert pdsh.expand("n[08-11],x,n[2],x") == ["n2", "n08", "n09", "n10", "n11", "x"]
    for nodes in ("", "-Q", "^/etc/passwd", "n[1", "n[3-1]", "a b", "a;b", "%h", "root@x", "ssh:x", ",", "n[1-20000]"):
        with pytest.raises(VTorqueError, match="--nodes") as raised:
            pdsh.expand(nodes)
        assert raised.value.code is Code.VALUE and raised.value.hint


def test_no_pdsh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VTorqueError, match="pdsh is not installed") as raised:
        pdsh.expand("n1")
    assert "apt-get install pdsh" in str(raised.value)


SSH = f"""\
#!{sys.executable}
import os, sys, time
host = next(word for word in sys.argv[1:] if word.startswith("n"))
if host == "n2":
    sys.exit("ssh: connect to host n2 port 22: No route to host")
if host in ("n3", "n30"):
    time.sleep(60)
if host == "n4":
    print("motd: welcome")
    sys.exit(0)
os.execv("/bin/sh", ["sh", "-c", sys.argv[-1]])
"""


@pytest.fixture
def cluster(vmgr_run: Vmgr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Vmgr:
    """Nodes n1 to n5 behind an `ssh` that pdsh starts; n2 cannot be reached, n3 hangs, n4 has no vTorque."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.delenv("PDSH_SSH_ARGS", raising=False)
    program = vmgr_run.node.install.root / "bin" / "vmgr"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n[ \"$*\" = 'doctor --json' ] || exit 9\ncat <<'E'\n{report_of(WELL, ODD)}\nE\n")
    program.chmod(0o755)
    return vmgr_run


@needs_pdsh
def test_many_nodes(cluster: Vmgr) -> None:
    begun = time.monotonic()
    status, out, err = cluster("doctor", "--nodes", "n[5,1-4]", "--timeout", "2")
    assert (status, err) == (1, "") and time.monotonic() - begun < 15
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["NODE", "n1", "n2", "n3", "n4", "n5"]
    assert lines[1].split() == ["n1", "warning", "memory", "little", "add", "some"]
    assert "No route to host" in lines[2] and "timeout" in lines[3] and "no answer" in lines[4]
    assert lines[-1] == "no answer from 3 of 5 nodes: n2, n3, n4"


@needs_pdsh
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_runs_on_when_it_is_ended(cluster: Vmgr, tmp_path: Path, sig: signal.Signals) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); "
        f"sys.executable = {str(cluster.node.install.root / 'venv' / 'bin' / 'python3')!r}\n"
        "from vmgr.cli import main\nsys.exit(main(['doctor', '--nodes', 'n3,n30']))"
    )
    doctor = psutil.Popen([str(Path(sys.prefix) / "bin" / "python3"), "-c", code], start_new_session=True)
    deadline = time.monotonic() + 20

    def reached() -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [each for each in doctor.children(recursive=True) if str(tmp_path / "bin" / "ssh") in each.cmdline()]
        return []

    while len(reached()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    started = doctor.children(recursive=True)
    assert len(reached()) == 2
    doctor.send_signal(sig)
    assert doctor.wait(10) in (128 + sig, 130)
    assert all(wait_gone(each.pid) for each in started)


STARTER = """\
trap 'setsid sleep {0} & echo another' USR1
setsid sleep {0} &
echo {0}
while :; do wait; done
"""
"""Starts what outlives it, as pdsh does, and more at each USR1."""
HOLD = "86398"


@pytest.fixture
def sleepers() -> Iterator[Callable[[], list[psutil.Process]]]:
    """What a starter has left running."""

    def found() -> list[psutil.Process]:
        return [each for each in psutil.process_iter(["cmdline"]) if HOLD in " ".join(each.info["cmdline"] or ())]

    yield found
    for each in found():
        each.kill()


@pytest.mark.usefixtures("told")
def test_ended_while_it_starts_nothing_runs_on(
    sleepers: Callable[[], list[psutil.Process]], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = subprocess.Popen._execute_child  # type: ignore[attr-defined]

    def interrupted(child: subprocess.Popen[bytes], *arguments: Any) -> None:
        start(child, *arguments)
        deadline = time.monotonic() + 10
        while not psutil.Process(child.pid).children() and time.monotonic() < deadline:
            time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess.Popen, "_execute_child", interrupted)
    with pytest.raises(Told):
        pdsh.run(["sh", "-c", STARTER.format(HOLD)], len, len)
    assert all(wait_gone(each.pid) for each in sleepers())


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("again", [True, False])
def test_ended_nothing_of_it_runs_on(
    again: bool, sleepers: Callable[[], list[psutil.Process]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what it starts meanwhile; nor when a second signal comes."""
    below = pdsh._descendants

    def looked(parent: int) -> list[int]:
        found = below(parent)
        if again:
            signal.raise_signal(signal.SIGTERM)
        os.kill(parent, signal.SIGUSR1)
        time.sleep(0.2)
        return found

    monkeypatch.setattr(pdsh, "_descendants", looked)
    said = bytearray()

    def hear(data: bytes) -> None:
        said.extend(data)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Told):
        pdsh.run(["sh", "-c", STARTER.format(HOLD)], hear, len)
    assert said == f"{HOLD}\n".encode() and all(wait_gone(each.pid) for each in sleepers())


def test_it_can_be_ended_by_signals() -> None:
    """That none is let through while it starts is not handed down to it."""
    out = bytearray()
    assert pdsh.run(["grep", "SigBlk", "/proc/self/status"], out.extend, len) == 0
    assert out.split()[1] == b"0" * 16


@needs_pdsh
def test_when_pdsh_itself_takes_too_long(cluster: Vmgr) -> None:
    before = set(psutil.Process().children(recursive=True))
    out = bytearray()
    pdsh.run(["pdsh", "-R", "ssh", "-w", "n3", "true"], out.extend, len, limit_s=0.5)
    assert out == b"" and set(psutil.Process().children(recursive=True)) == before


@needs_pdsh
def test_nodes_that_are_well(cluster: Vmgr) -> None:
    assert cluster("doctor", "--nodes", "n[1,5]").status == 0
    assert cluster("doctor", "--nodes", "n[1,5]", "--strict").status == 1
    lines = cluster("doctor", "--nodes", "n1", "--all").stdout.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["warning", "ok"], "the worst first"
    found: dict[str, Any] = json.loads(cluster("doctor", "--nodes", "n[1-2]", "--json").stdout)["nodes"]
    assert found["n1"]["worst"] == "warning" and found["n1"]["findings"][0] == WELL.as_plain()
    assert "No route" in found["n2"]["problem"]


@needs_pdsh
def test_nodes_by_another_way(cluster: Vmgr) -> None:
    """pdsh's own module `exec`: the command is run here, once for each name."""
    status, out, _ = cluster("doctor", "--nodes", "a[1-3]", "--rcmd", "exec")
    assert status == 0 and [line.split()[0] for line in out.splitlines()[1:]] == ["a1", "a2", "a3"]
    assert "VT-VALUE: --nodes a1: pdsh:" in cluster.refuses("doctor", "--nodes", "a1", "--rcmd", "nonsense")


@needs_pdsh
def test_what_is_no_set(cluster: Vmgr) -> None:
    assert cluster.refuses("doctor", "--nodes", "a b").startswith("VT-VALUE: --nodes a b: no set of nodes")
