"""`vsub --wait`: stages, the end, the exit status. The node's part is played by a fake that writes its files."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
from vsubsite import Runner, Site

import vsub.cli
import vsub.follow
from vsub.engines import JobState, shell_status
from vsub.engines.embedded import Embedded
from vsub.engines.pbs import QsubDialect
from vsub.engines.torque import parse_qstat
from vsub.follow import durations
from vsub.status import Stage, parse_result, parse_status

QSTAT = """\
#!/bin/sh
test -e {record}/state || {{ echo "qstat: Unknown Job Id Error $2" >&2; exit 153; }}
echo "Job Id: $2"
cat {record}/state
"""


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the batch system more often than users need."""
    for name in ("LOOK_AGAIN_S", "ASK_FIRST_S", "ASK_AFTER_RESULT_S"):
        monkeypatch.setattr(vsub.follow, name, 0.05)


class FakeNode:
    """Plays the batch system's and the node's part of one job: stages, result, end."""

    def __init__(self, site: Site) -> None:
        self.site = site
        site.qstat.write_text(QSTAT.format(record=site.record))
        site.qstat.chmod(0o755)
        self.stages: list[tuple[str, float]] = []

    def state(self, letter: str, exit_status: Optional[int] = None) -> None:
        text = f"    job_state = {letter}\n" + ("" if exit_status is None else f"    exit_status = {exit_status}\n")
        self._put(self.site.record / "state", text)

    def status(self, *stages: tuple[str, float], **fields: Any) -> None:
        self.stages += stages
        names = [{"name": name, "t": t} for name, t in self.stages]
        data = {"v": 1, "job_id": "12.host", "attempt": "a", "node": "n1", "guest": "g", "state": "booting"}
        data.update({"code": None, "reason": None, "stages": names}, **fields)
        self._put(self.site.directory / "status.n1.json", json.dumps(data))

    def result(self, status: int, code: Optional[str] = None) -> None:
        self._put(self.site.directory / "result.json", json.dumps({"v": 1, "status": status, "code": code}))

    @staticmethod
    def _put(path: Path, text: str) -> None:
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(text)
        temporary.replace(path)


@pytest.fixture
def node(site: Site) -> FakeNode:
    site.script()
    return FakeNode(site)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Callable[[], None]], None]]:
    """Registers what happens as soon as vsub has said a certain text: no clock is involved."""
    reactions: list[tuple[str, Callable[[], None]]] = []
    say = vsub.follow.say

    def listen(text: str) -> None:
        say(text)
        while reactions and reactions[0][0] in text:
            reactions.pop(0)[1]()

    monkeypatch.setattr(vsub.follow, "say", listen)
    yield lambda text, act: reactions.append((text, act))
    assert not reactions, f"never said: {reactions[0][0]}"


def test_stages_result_and_timeline(site: Site, vsub_run: Runner, node: FakeNode, told: Any) -> None:
    node.state("Q")
    told("queued", lambda: (node.state("R"), node.status(("spec", 0.1), ("launched", 1.31))))
    told("launched", lambda: node.status(("ready", 5.0), state="ready"))
    told("ready", lambda: (node.result(3), node.state("C", 3)))
    outcome = vsub_run("--wait", "job.sh")
    assert outcome.status == 3 and outcome.stdout == "12.host\n"
    assert [line for line in outcome.stderr.splitlines() if "running" not in line][:-1] == [
        "vsub: 12.host  queued",
        "vsub: 12.host  +0.10 s  spec",
        "vsub: 12.host  +1.31 s  launched",
        "vsub: 12.host  +5.00 s  ready",
        "vsub: timeline: spec  0.10 s",
        "vsub: timeline: launched  1.21 s",
        "vsub: timeline: ready  3.69 s",
    ]
    last = outcome.stderr.splitlines()[-1]
    assert re.fullmatch(r"vsub: timeline: \d+\.\d\d s from submission to end, exit status 3", last)
    assert site.left_in_home() == [str(site.home / ".vtorque")]


def test_the_file_of_a_persistent_disk_is_told_once(site: Site, vsub_run: Runner, node: FakeNode, told: Any) -> None:
    node.state("R")
    path = f"{site.work}/vtorque-12.host.disk"
    told("running", lambda: node.status(("spec", 0.1), disk=path))
    told("persistent disk", lambda: node.status(("ready", 5.0), disk=path, state="ready"))
    told("ready", lambda: node.state("C", 0))
    outcome = vsub_run("--wait", "job.sh")
    said = [line for line in outcome.stderr.splitlines() if "disk" in line]
    assert outcome.status == 0 and said == [f"vsub: 12.host  persistent disk: {path}"]


def test_how_far_a_copy_is(site: Site, vsub_run: Runner, node: FakeNode, told: Any) -> None:
    node.state("R")
    told("running", lambda: node.status(("spec", 0.1), doing="copying 5 %"))
    told("copying 5", lambda: node.status(doing="copying 60 %"))
    told("copying 60", lambda: node.status(("staged", 2.0), doing=None))
    told("staged", lambda: node.state("C", 0))
    outcome = vsub_run("--wait", "job.sh")
    said = [line.partition("  ")[2] for line in outcome.stderr.splitlines()]
    assert outcome.status == 0 and said[1:5] == ["+0.10 s  spec", "copying 5 %", "copying 60 %", "+2.00 s  staged"]


def test_the_specification_tells_that_somebody_reads(site: Site, vsub_run: Runner, node: FakeNode, told: Any) -> None:
    seen = []
    node.state("R")
    told("running", lambda: (seen.append(site.spec.keep), node.state("C", 0)))
    assert vsub_run("--wait", "job.sh").status == 0
    assert seen == [True]


def test_failure_has_code_and_reason(vsub_run: Runner, node: FakeNode, told: Any) -> None:
    node.state("R")
    told("running", lambda: node.status(("spec", 0.1), state="failed", code="VT-BOOT", reason="no\x1b[2J\nready"))
    told("failed", lambda: (node.result(75, "VT-BOOT"), node.state("C", 75)))
    outcome = vsub_run("--wait", "job.sh")
    assert outcome.status == 75
    assert "vsub: 12.host  failed on n1: VT-BOOT: no\\x1b[2J\\nready\n" in outcome.stderr


def test_second_attempt_starts_anew(vsub_run: Runner, node: FakeNode, told: Any) -> None:
    node.state("R")
    told("running", lambda: node.status(("spec", 0.1), ("launched", 0.5)))

    def again() -> None:
        node.stages.clear()
        node.status(("spec", 0.2), attempt="b")

    told("launched", again)
    told("+0.20 s  spec", lambda: node.state("C", 0))
    outcome = vsub_run("--wait", "job.sh")
    assert outcome.status == 0 and "vsub: 12.host  started again\n" in outcome.stderr


def test_deleted_while_queued(site: Site, vsub_run: Runner, node: FakeNode, told: Any) -> None:
    node.state("Q")
    told("queued", lambda: (site.record / "state").unlink())
    told("left no exit status", lambda: None)
    outcome = vsub_run("--wait", "job.sh")
    assert outcome.status == 1
    assert site.left_in_home() == [str(site.home / ".vtorque")]


def test_gone_from_the_server_but_with_a_result(site: Site, vsub_run: Runner, node: FakeNode, told: Any) -> None:
    node.state("R")
    told("running", lambda: (node.result(9), (site.record / "state").unlink()))
    assert vsub_run("--wait", "job.sh").status == 9


def test_nonsense_in_the_job_directory(site: Site, vsub_run: Runner, node: FakeNode, told: Any) -> None:
    def nonsense() -> None:
        folder = site.directory
        os.mkfifo(folder / "status.fifo.json")
        (folder / "status.dir.json").mkdir()
        (folder / "status.link.json").symlink_to("/dev/zero")
        (folder / "status.big.json").write_bytes(b" " * (1 << 20))
        (folder / "status.bad.json").write_bytes(b"[" * 10_000)
        (folder / "result.json").write_text('{"v": 1, "status": "0"}')
        node.status(("good", 1.0))

    node.state("R")
    told("running", nonsense)
    told("good", lambda: node.state("C", 271))
    assert vsub_run("--wait", "job.sh").status == 143


def test_without_guests_it_waits_too(site: Site, vsub_run: Runner, node: FakeNode, told: Any) -> None:
    node.state("Q")
    told("queued", lambda: node.state("C", 4))
    outcome = vsub_run("-vm", "off", "--wait", "job.sh")
    assert (outcome.status, outcome.stdout) == (4, "12.host\n")
    assert site.argv == ["job.sh"] and site.left_in_home() == []


def test_failed_submission_is_not_waited_for(site: Site, vsub_run: Runner, node: FakeNode) -> None:
    site.answer(stderr="qsub: no\n", status=188)
    for words in ([], ["-vm", "off"]):
        assert vsub_run("--wait", *words, "job.sh") == (188, "", "qsub: no\n")


def test_no_job_id(site: Site, vsub_run: Runner, node: FakeNode) -> None:
    site.answer(stdout="\n")
    outcome = vsub_run("--wait", "job.sh")
    assert outcome.status == 2 and "printed no job id" in outcome.stderr


@pytest.mark.parametrize("words", [["-z"], ["-I"], ["-t", "1-2"], ["-z", "-vm", "off"], ["-I", "-vm", "off"]])
def test_what_cannot_be_waited_for(site: Site, vsub_run: Runner, node: FakeNode, words: list[str]) -> None:
    outcome = vsub_run("--wait", *words, "job.sh")
    assert outcome.status == 2 and f"--wait cannot be combined with {words[0]}" in outcome.stderr
    assert not site.called and site.left_in_home() == []


def test_interrupted(site: Site, node: FakeNode) -> None:
    node.state("Q")
    with subprocess.Popen(
        site.command("--wait", "job.sh"),
        cwd=site.work,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background have it ignored
    ) as process:
        try:
            assert process.stderr is not None and process.stderr.readline() == "vsub: 12.host  queued\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
            text = process.stderr.read()
        finally:
            process.kill()
    assert "job 12.host keeps running: `qstat 12.host` shows it, `qdel 12.host` ends it" in text
    assert site.directory.exists()


class FakeEngine(QsubDialect):
    """A batch system that tells a job's end on a socket, as the embedded one does; state() is never needed."""

    def __init__(self, qsub: str) -> None:
        self.qsub = qsub
        self.ours, self.theirs = socket.socketpair()
        self.asked = 0

    def check_state(self) -> None:
        pass

    def state(self, job_id: str) -> JobState:
        self.asked += 1
        return JobState("completed", 5)

    def completion(self, job_id: str) -> socket.socket:
        return self.theirs

    def read_completion(self, line: bytes) -> JobState:
        return Embedded.read_completion(self, line)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "status", "asked"),
    [
        (b'{"exit_status": 7, "reason": ""}\n', 7, 0),
        (b'{"exit_status": 265, "reason": ""}\n', 137, 0),
        (b'{"exit_status": null, "reason": "deleted"}\n', 1, 0),
        (b'{"error": 15001, "detail": ""}\n', 1, 0),
        (b"", 5, 1),
        (b"nonsense\n", 5, 1),
    ],
)
def test_end_on_a_socket(
    site: Site, vsub_run: Runner, monkeypatch: pytest.MonkeyPatch, said: bytes, status: int, asked: int
) -> None:
    site.script()
    engine = FakeEngine(str(site.qsub))
    monkeypatch.setattr(vsub.cli, "engine", lambda *_: engine)

    engine.ours.sendall(said)
    engine.ours.close()
    assert vsub_run("--wait", "job.sh").status == status
    assert engine.asked == asked


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("Job Id: 1.h\n    Job_Name = x\n    job_state = R\n", JobState("running")),
        ("    job_state = C\n    exit_status = 271\n", JobState("completed", 143)),
        ("    job_state = C\n    exit_status = -2\n", JobState("completed", 1)),
        ("    job_state = F\n    exit_status = x\n", JobState("completed")),
        ("", JobState("unknown")),
        ("    job_state = ?\n", JobState("unknown")),
    ],
)
def test_qstat(text: str, state: JobState) -> None:
    assert parse_qstat(text) == state


def test_statuses_of_torque() -> None:
    assert [shell_status(status) for status in (0, 3, 137, 255, 256 + 9, 256 + 15, -1)] == [0, 3, 137, 255, 137, 143, 1]


def test_stage_durations() -> None:
    assert durations((Stage("a", 1.0), Stage("b", 0.5), Stage("c", 2.0))) == [("a", 1.0), ("b", 0.0), ("c", 1.0)]


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"v": 2}', b"\xff", b"nan", b'{"v": 1, "status": true}'])
def test_files_that_say_nothing(data: bytes) -> None:
    assert parse_result(data) is None
    if b'"v": 1' not in data:
        assert parse_status(data) is None


def test_status_with_odd_stages() -> None:
    status = parse_status(b'{"v": 1, "stages": [1, {"name": "a"}, {"name": "b", "t": NaN}, {"name": "c", "t": 1}]}')
    assert status is not None and status.stages == (Stage("c", 1.0),)
