"""`vmgr report` and `vmgr logs` as commands: on this node and on others, for the owner alone, followed to the end."""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pexpect
import pytest
from nodesite import REPOSITORY, TEMPLATES
from pytest_console_scripts import ScriptRunner
from reports import an_attempt, failed, file_of, hostile, until
from test_vmgr_cli import Vmgr, vmgr_run  # noqa: F401

import vmgr.reach.batch
import vmgr.reach.shell
import vmgr.reach.where
import vmgr.report.find
from vmgr.errors import Code, VTorqueError
from vmgr.node.control import Control
from vmgr.node.state import Progress
from vmgr.reach.where import JobNodes
from vmgr.report.loglines import MAX_LINE_BYTES, Lines, merged, records, shown
from vmgr.report.members import note

pytestmark = pytest.mark.script_launch_mode("inprocess")
PYTHON = sys.executable
LOG = "2026-11-28 04:33:37,006 INFO agent after 0.050 s\n2026-11-28 04:33:38,100 ERROR VT-BOOT: the guest\ntrace\n"


class Kept:
    """What a node keeps of job 12.host."""

    def __init__(self, run: Vmgr) -> None:
        self.folder = run.node.base / "log" / "jobs"
        self.folder.mkdir(parents=True)
        templates = run.node.install.templates
        templates.parent.mkdir(parents=True)
        templates.symlink_to(TEMPLATES)

    def report(self, *attempts: dict[str, Any]) -> None:
        (self.folder / "12.host.report.json").write_bytes(file_of(*attempts))

    def log(self, text: str = LOG) -> None:
        (self.folder / "12.host.log").write_text(text)


@pytest.fixture
def kept(vmgr_run: Vmgr) -> Kept:
    return Kept(vmgr_run)


class Elsewhere:
    """The other nodes of the job, as far as they are reached; `asked` has what was run where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nodes: Sequence[str], answers: dict[str, bytes]) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.nodes, self.answers = tuple(nodes), answers
        for place in (vmgr.reach.shell, vmgr.report.find):
            monkeypatch.setattr(place, "run_on", self.run_on)
            monkeypatch.setattr(place, "is_here", lambda node: node in ("n1", os.uname().nodename))
        monkeypatch.setattr(vmgr.report.find, "nodes_of_job", self.nodes_of_job)

    def nodes_of_job(self, config: object, job_id: str) -> JobNodes:
        if not self.nodes:
            raise VTorqueError(f"job {job_id} has no nodes", code=Code.AGENT)
        return JobNodes("12.host", "alice", self.nodes)

    def run_on(self, node: str, argv: Sequence[str], *, timeout_s: float) -> vmgr.reach.shell.Completed:
        self.asked.append((node, *argv[1:]))
        if node not in self.answers:
            raise VTorqueError(f"node {node} cannot be reached", code=Code.CONNECT)
        answer = self.answers[node]
        refused = answer.startswith(b"VT-")
        return vmgr.reach.shell.Completed(2 if refused else 0, b"" if refused else answer, answer if refused else b"")


# --- report


def test_a_report_of_one_node(vmgr_run: Vmgr, kept: Kept) -> None:
    kept.report(an_attempt(nodes=["n1"]))
    status, out, err = vmgr_run("report", "12.host", "--here")
    assert (status, err) == (0, "") and out.splitlines()[0].startswith("job 12.host of alice: 2 guests of debian-12@3")
    assert "J job" in out and "SECONDS" in out and "1.75" in out
    tree = json.loads(vmgr_run("report", "12.host", "--here", "--json").stdout)
    assert tree.keys() == json.loads(vmgr_run("report", "12.host", "--json").stdout).keys()
    assert (tree["job_id"], tree["parts"][0]["job_status"], tree["missing"]) == ("12.host", 0, {})
    part = json.loads(vmgr_run("report", "12.host", "--part").stdout)
    assert part["v"] == 1 and part["attempts"][0]["job_status"] == 0, "what other nodes take"


def test_a_report_of_several_nodes(vmgr_run: Vmgr, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.report(an_attempt(nodes=["n1", "n2", "n3"]))
    elsewhere = Elsewhere(monkeypatch, [], {"n2": file_of(an_attempt("n2", 1))})
    tree = json.loads(vmgr_run("report", "12.host", "--json").stdout)
    assert [part["node"] for part in tree["parts"]] == ["n1", "n2"]
    assert tree["missing"] == {"n3": "node n3 cannot be reached"}
    assert tree["parts"][1]["guests"][0]["moments"][0] == {"name": "launched", "t": 0.42, "start": None}
    assert elsewhere.asked[0] == ("n2", "report", "--part", "12.host") and len(elsewhere.asked) == 2
    out = vmgr_run("report", "12.host").stdout
    assert "n3 is missing here: node n3 cannot be reached" in out and "vn2-2 (3)" in out


@pytest.mark.parametrize("named", [True, False])
def test_a_report_from_a_front_end(
    named: bool,
    vmgr_run: Vmgr,
    kept: Kept,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found through the batch system, or after the job through a node of it that is named."""
    lead = file_of(an_attempt("m1", nodes=["m1", "m2"]))
    elsewhere = Elsewhere(monkeypatch, [] if named else ["m1", "m2"], {"m1": lead, "m2": file_of(an_attempt("m2", 1))})
    words = ["--node", "m1"] if named else []
    tree = json.loads(vmgr_run("report", "12.host" if named else "12", *words, "--json").stdout)
    assert [part["node"] for part in tree["parts"]] == ["m1", "m2"] and tree["missing"] == {}
    assert sorted(asked[0] for asked in elsewhere.asked) == ["m1", "m2"]


def test_a_job_that_is_over_by_its_number(vmgr_run: Vmgr, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch system has forgotten the job, and knows how its ids go on."""
    monkeypatch.setattr(
        vmgr.reach.batch, "ask", lambda config, *words: f"{words[1]}.host" if words[0] == "whole" else []
    )
    kept.report(an_attempt(nodes=["n1"]))
    Elsewhere(monkeypatch, [], {"m1": file_of(an_attempt("m1", nodes=["m1"]))})
    for words in (["12"], ["12", "--here"]):
        assert json.loads(vmgr_run("report", *words, "--json").stdout)["job_id"] == "12.host"
    (kept.folder / "12.host.report.json").unlink()
    assert json.loads(vmgr_run("report", "12", "--node", "m1", "--json").stdout)["parts"][0]["node"] == "m1"
    assert "nothing is kept of job 12.host here" in vmgr_run.refuses("report", "12")
    assert "no log of job 12.host on this node" in vmgr_run.refuses("logs", "12", "--here")


def test_a_member_of_an_array_that_is_forgotten(vmgr_run: Vmgr, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a number of its own, which its node knows, and which the other nodes are asked by."""

    def ask(config: object, *words: str) -> object:
        if words[0] == "whole":
            raise VTorqueError(f"job {words[1]} is not known to Slurm", code=Code.ENGINE)
        return "host" if words == ("server",) else []

    monkeypatch.setattr(vmgr.reach.batch, "numbers_members", lambda config: True)
    monkeypatch.setattr(vmgr.reach.batch, "ask", ask)
    note(kept.folder, "9_3", "12.host", os.geteuid())
    kept.report(an_attempt(nodes=["n1"]))
    for name in ("9_3", "9[3]", "9_3.host"):
        for words in ([], ["--here"]):
            assert json.loads(vmgr_run("report", name, *words, "--json").stdout)["job_id"] == "12.host"
    assert "VT-VALUE: nothing is kept of job 9_4 here" in vmgr_run.refuses("report", "9_4")
    strange = {**an_attempt("m1", nodes=["m1"]), "job_id": "--html=x"}
    for told, asked in ((an_attempt("m1", nodes=["m1", "m2"]), ["9_4", "12.host"]), (strange, ["9_4"])):
        elsewhere = Elsewhere(monkeypatch, [], {"m1": file_of(told), "m2": file_of(an_attempt("m2", 1))})
        vmgr_run("report", "9_4", "--node", "m1", "--json")
        assert [words[-1] for words in elsewhere.asked] == asked, "what another node says is no word for a third"


@pytest.mark.parametrize("answers", [True, False])
def test_a_report_from_a_sister(
    answers: bool,
    vmgr_run: Vmgr,
    kept: Kept,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """She knows the mother superior, who knows all; the batch system need not know the job any more."""
    kept.report(an_attempt("n2", 1, nodes=["m1"]))
    others = {
        "m1": file_of(an_attempt("m1", nodes=["m1", "n2", "m3"])),
        "m3": file_of(an_attempt("m3", 2, nodes=["m1"])),
    }
    Elsewhere(monkeypatch, [], others if answers else {})
    for place in (vmgr.reach.shell, vmgr.report.find):
        monkeypatch.setattr(place, "is_here", lambda node: node in ("n2", os.uname().nodename))
    tree = json.loads(vmgr_run("report", "12.host", "--json").stdout)
    if answers:
        assert [part["node"] for part in tree["parts"]] == ["m1", "n2", "m3"] and tree["missing"] == {}
    else:
        assert [part["node"] for part in tree["parts"]] == ["n2"]
        assert tree["missing"] == {"m1": "node m1 cannot be reached"}


def test_a_report_of_a_job_that_nobody_knows(
    vmgr_run: Vmgr,
    kept: Kept,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Elsewhere(monkeypatch, [], {})
    assert "VT-VALUE: nothing is kept of job 12.host here; name the job whole" in vmgr_run.refuses("report", "12.host")
    assert "no report of job 12.host on this node" in vmgr_run.refuses("report", "12.host", "--here")
    assert "node m1 cannot be reached" in vmgr_run.refuses("report", "12.host", "--node", "m1")
    (kept.folder / "12.host.report.json").write_text("{}")
    assert vmgr_run("report", "12.host", "--here")[0] == Code.AGENT.status


@pytest.mark.parametrize("job", ["../12.host", "12.host/../x", "x", "", "12.host:0", "12\n", "-1.host"])
def test_what_is_no_job(job: str, vmgr_run: Vmgr, kept: Kept) -> None:
    for command in ("report", "logs"):
        assert vmgr_run(command, "--", job)[0] == 2


def test_options_that_contradict_each_other(vmgr_run: Vmgr, kept: Kept) -> None:
    for words in (["report", "1", "--here", "--node", "x"], ["logs", "1", "--here", "--node", "x"]):
        assert "contradict" in vmgr_run.refuses(*words)
    assert "standard output" in vmgr_run.refuses("report", "1", "--json", "--html", "-")


def test_a_page(vmgr_run: Vmgr, kept: Kept, tmp_path: Path) -> None:
    kept.report(*hostile()[:0], an_attempt(nodes=["n1"]))
    assert vmgr_run("report", "12.host", "--here", "--html", str(tmp_path / "r.html")) == (0, "", "")
    page = (tmp_path / "r.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "vn1-2" in page
    assert vmgr_run("report", "12.host", "--here", "--html", "-").stdout.startswith("<!DOCTYPE html>")
    refused = vmgr_run.refuses("report", "12.host", "--here", "--html", str(tmp_path / "no" / "r.html"))
    assert "cannot be written" in refused
    both = vmgr_run("report", "12.host", "--here", "--json", "--html", str(tmp_path / "r.html"))
    assert both[0] == 0 and json.loads(both.stdout)["job_id"] == "12.host"


def test_hostile_names_in_text_and_json(vmgr_run: Vmgr, kept: Kept) -> None:
    kept.report(*hostile())
    for words in ([], ["--json"]):
        out = vmgr_run("report", "12.host", "--here", *words).stdout
        assert all(line.isprintable() for line in out.splitlines())


def test_bars_on_a_terminal(vmgr_run: Vmgr, kept: Kept) -> None:
    kept.report(*failed()[:1])
    for columns, environment in ((100, {}), (50, {}), (80, {"NO_COLOR": "1"}), (80, {"TERM": "dumb"})):
        child = pexpect.spawn(
            PYTHON, [str(vmgr_run.program), "report", "12.host", "--here"], dimensions=(40, columns),
            encoding="utf-8", timeout=30,
            env={"PATH": os.environ["PATH"], "TERM": "xterm-256color", "LANG": "C.UTF-8", **environment},
        )  # fmt: skip
        seen = child.read()
        child.close()
        assert child.exitstatus == 0 and ("\u2588" in seen) is ("TERM" not in environment), seen
        assert ("\x1b[33m" in seen) is (not environment)


# --- logs


def test_a_log(vmgr_run: Vmgr, kept: Kept) -> None:
    kept.log(LOG + "2026-11-28 04:33:39,000 INFO said \x1b[31mred\x1b[0m\tx\x07 no end")
    out = vmgr_run("logs", "12.host", "--here").stdout
    assert out == LOG + "2026-11-28 04:33:39,000 INFO said red\tx\\x07 no end\n".expandtabs()
    lines = [json.loads(line) for line in vmgr_run("logs", "12.host", "--here", "--json").stdout.splitlines()]
    assert lines[0]["level"] == "INFO" and lines[0]["text"] == "agent after 0.050 s"
    assert (lines[2]["text"], lines[2]["level"]) == ("trace", None)
    assert vmgr_run("logs", "12.host", "--here", "--follow").stdout == out, "no agent: nothing more can come"


def test_the_logs_of_several_nodes(vmgr_run: Vmgr, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.report(an_attempt(nodes=["n1", "n2", "n3"]))
    kept.log()
    theirs = b"2026-11-28 04:33:37,500 INFO in between\nwith \x1b]0;owned\x07more\n"
    Elsewhere(monkeypatch, [], {"n2": theirs, "n3": b"VT-ACCESS: the log of job 12.host is another user's"})
    status, out, err = vmgr_run("logs", "12.host")
    assert status == 0 and [line.partition(": ")[0] for line in out.splitlines()] == ["n1", "n2", "n2", "n1", "n1"]
    assert "n2: with more" in out and err == "vmgr: n3: VT-ACCESS: the log of job 12.host is another user's\n"
    lines = [json.loads(line) for line in vmgr_run("logs", "12.host", "--json").stdout.splitlines()]
    assert [line["node"] for line in lines] == ["n1", "n2", "n2", "n1", "n1"]
    assert vmgr_run("logs", "12.host", "--node", "n2").stdout == theirs.decode().replace("\x1b]0;owned\x07", "")
    assert vmgr_run("logs", "12.host", "--node", "n9")[0] == Code.CONNECT.status


def test_consoles_are_found_by_rank(vmgr_run: Vmgr, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.report(an_attempt())
    (kept.folder / "12.host.console").write_bytes(b"\x1b[H\x1b[2Jone\r\nlogin: \xff")
    (kept.folder / "12.host.2.console").write_bytes(b"two\r\n")
    elsewhere = Elsewhere(monkeypatch, [], {"n2": b"four\n"})
    assert vmgr_run("logs", "12.host", "--console").stdout == "one\nlogin: \ufffd\n"
    assert vmgr_run("logs", "12.host", "--console", "1").stdout == "two\n"
    assert json.loads(vmgr_run("logs", "12.host", "--console", "1", "--json").stdout) == {
        "node": "n1", "rank": 1, "line": "two",
    }  # fmt: skip
    assert vmgr_run("logs", "12.host", "--console", "3").stdout == "four\n"
    assert elsewhere.asked[-1] == ("n2", "logs", "--here", "12.host", "--console", "3")
    assert "it has 0 to 3" in vmgr_run.refuses("logs", "12.host", "--console", "4")
    assert "is not on this node" in vmgr_run.refuses("logs", "12.host", "--console", "2", "--here")
    (kept.folder / "12.host.console").unlink()
    assert "there is no console of guest 0" in vmgr_run.refuses("logs", "12.host", "--console", "--here")


def test_a_job_before_its_first_report(vmgr_run: Vmgr, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.log()
    Elsewhere(monkeypatch, [], {})
    assert vmgr_run("logs", "12.host").stdout == LOG


def test_where_nothing_is_logged(vmgr_run: Vmgr) -> None:
    text = vmgr_run.node.install.config.read_text().replace(str(vmgr_run.node.base / "log" / "node.log"), "null")
    vmgr_run.node.install.config.write_text(text)
    for command in ("report", "logs"):
        assert "logging.file is not set" in vmgr_run.refuses(command, "12.host", "--here")


_AS_OTHER = f"""\
import os, sys
sys.path[:0] = [{str(REPOSITORY)!r}, *sys.argv[2].split(":")]
import vmgr.schema, vmgr.yamlfile, vmgr.reach.agents, vmgr.reach.shell, vmgr.report.find, vmgr.report.loglines
import vmgr.report.text, vmgr.report.timeline
from vmgr.cli import main
uid = int(sys.argv[3])
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
sys.executable = sys.argv[1]
sys.exit(main(sys.argv[4:]))
"""


def test_another_users_job_is_refused(vmgr_run: Vmgr, kept: Kept) -> None:
    from vmgr.logs import _readers, open_for

    if os.geteuid() != 0:
        pytest.skip("needs root, to be other users")
    base = vmgr_run.node.base
    base.chmod(0o755)
    kept.folder.chmod(0o711)
    for name, data in (
        ("12.host.log", LOG.encode()),
        ("12.host.report.json", file_of(an_attempt(nodes=[os.uname().nodename]))),
    ):
        fd = open_for(kept.folder / name, 48211)
        os.write(fd, data)
        listed = _readers(fd)
        os.close(fd)
        if not listed:
            pytest.skip("the file system has no access control lists")
    python, path = str(vmgr_run.node.install.root / "venv" / "bin" / "python3"), ":".join(filter(None, sys.path))
    for uid in (48211, 48212):
        for words in (["logs", "12.host", "--here"], ["logs", "12.host"], ["report", "12.host", "--here"]):
            argv = [PYTHON, "-I", "-c", _AS_OTHER, python, path, str(uid), *words]
            done = subprocess.run(argv, capture_output=True, text=True, cwd="/", timeout=60)
            if uid == 48211:
                assert (done.returncode, done.stderr) == (0, "") and (
                    "04:33:37" in done.stdout or "vn1-2" in done.stdout
                )
            else:
                assert (done.returncode, done.stdout) == (Code.ACCESS.status, "") and done.stderr.count("\n") == 1
                assert done.stderr.startswith("VT-ACCESS: ") and "another user's" in done.stderr


def test_a_folder_that_the_site_has_closed(vmgr_run: Vmgr, kept: Kept) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    vmgr_run.node.base.chmod(0o755)
    kept.report(an_attempt(nodes=["n1"]))
    kept.folder.chmod(0o700)
    python, path = str(vmgr_run.node.install.root / "venv" / "bin" / "python3"), ":".join(filter(None, sys.path))
    argv = [PYTHON, "-I", "-c", _AS_OTHER, python, path, "48211", "report", "12.host", "--here"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == 2 and done.stderr == f"VT-CONFIG: {kept.folder} is closed to you; ask the administrator\n"


class Follower(NamedTuple):
    child: subprocess.Popen[bytes]

    def read(self, wanted: bytes, limit_s: float = 20.0) -> bytes:
        """What is printed up to `wanted`."""
        assert self.child.stdout is not None
        seen, deadline = b"", time.monotonic() + limit_s
        while wanted not in seen:
            ready, _, _ = select.select([self.child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, seen
            data = os.read(self.child.stdout.fileno(), 65536)
            assert data, seen
            seen += data
        return seen


@pytest.fixture
def agent(vmgr_run: Vmgr) -> Iterator[threading.Event]:
    """The agent of job 12.host, as far as who follows the log asks it; it goes when the event is set."""
    place = vmgr_run.node.place()
    place.socket.parent.mkdir(parents=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place.socket))
    listener.listen(8)
    over = threading.Event()

    async def live() -> None:
        progress = Progress(0, {"job_id": "12.host"})
        control = Control(progress, os.getuid(), over=lambda: None, attached=lambda: None)
        server = await control.serve(listener)
        await asyncio.get_running_loop().run_in_executor(None, over.wait)
        place.socket.unlink()
        await asyncio.sleep(0.05)  # who has just connected is served by now: an agent's end would end that too
        server.close()
        await control.drain(0)

    thread = threading.Thread(target=lambda: asyncio.run(live()))
    thread.start()
    yield over
    over.set()
    thread.join()


def test_following_a_log_until_the_job_ends(
    vmgr_run: Vmgr,
    kept: Kept,
    agent: threading.Event,
    script_runner: ScriptRunner,
) -> None:
    kept.log()
    argv = [PYTHON, str(vmgr_run.program), "logs", "12.host", "--follow", "--here"]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    follower = Follower(child)
    follower.read(b"trace\n")
    with (kept.folder / "12.host.log").open("a") as log:
        for n in range(3):
            log.write(f"line {n}\n")
            log.flush()
            began = time.monotonic()
            follower.read(b"line %d\n" % n)
            assert time.monotonic() - began < 3, "told by the kernel, not found by looking again"
        log.write("last, without an end")
    agent.set()
    out, err = child.communicate(timeout=20)
    assert (child.returncode, out, err) == (0, b"last, without an end\n", b"")


def test_lines_are_cut_and_bounded() -> None:
    told: list[str] = []
    lines = Lines(told.append)
    for piece in (b"a", b"b\nc", b"\n\nd\r\n", b"x" * (MAX_LINE_BYTES + 1), b"y\n"):
        lines.feed(piece)
    lines.end()
    assert told == ["ab", "c", "", "d", "x" * (MAX_LINE_BYTES + 1), "y"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"\x1b[1;31mred\x1b[0m", "red"),
        (b"\x1b]0;title\x07x\x1b]2;t\x1b\\y", "xy"),
        (b"10 %\r20 %\r30 %\r\n", "30 %"),
        (b"\x1b[2\x1b[J", "\\x1b[2"),
        (b"\x9b2J\x1b", "\ufffd2J\\x1b"),
        ("\u202eevil".encode(), "\\u202eevil"),
        (b"a\tb", "a       b"),
    ],
)
def test_what_a_console_says_is_made_harmless(line: bytes, text: str) -> None:
    assert shown(line) == text and shown(line).isprintable()


def test_lines_of_one_record_stay_together() -> None:
    one = records("n1", ["2026-11-28 04:00:02,000 INFO b", "more", "2026-11-28 04:00:04,000 INFO d"])
    two = records("n2", ["no time", "2026-11-28 04:00:01,000 INFO a", "2026-11-28 04:00:03,000 INFO c"])
    assert [record.text for record in merged([one, two])] == ["no time", "a", "b", "more", "c", "d"]


def test_what_is_going_on_now(vmgr_run: Vmgr, kept: Kept, agent: threading.Event) -> None:
    kept.report(until(an_attempt(nodes=["n1"], began=time.time() - 14), 14.0, state="running"))
    out = vmgr_run("report", "12.host", "--here").stdout
    assert out.splitlines()[1].endswith(", running") and "JOB" in out and "END" not in out
    assert json.loads(vmgr_run("report", "12.host", "--part").stdout)["alive"] is True
