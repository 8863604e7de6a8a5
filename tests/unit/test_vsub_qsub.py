"""Jobs without guests: everything goes to qsub untouched."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vsubsite import Site

from vsub import process

PLAIN_SITE = ", without_vm: qsub"


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["-vm", "off", "job.sh"], ["job.sh"]),
        (["job.sh", "-vm", "off", "-lnodes=2", "--", "-vm"], ["job.sh", "-lnodes=2", "--", "-vm"]),
        (["-vm", "off", "-I", "-x", "a b", "-t", "1-3"], ["-I", "-x", "a b", "-t", "1-3"]),
        (["-vm", "off", "--about"], ["--about"]),
        (["-vm", "off", "-Y", "job.sh", "-N"], ["-Y", "job.sh", "-N"]),
        (["--debug", "-vm", "off", "-v", "m", "job.sh"], ["-v", "m", "job.sh"]),
    ],
)
def test_off_on_the_command_line(site: Site, words: list[str], seen: list[str]) -> None:
    site.answer(stdout="7.host\n", stderr="a note\n", status=5)
    done = site.launch(*words, stdin=b"some\0input")
    assert (done.returncode, done.stdout) == (5, b"7.host\n")
    assert done.stderr.endswith(b"a note\n")
    assert site.argv == seen
    assert site.stdin == b"some\0input"
    assert (site.record / "cwd").read_text() == f"{site.work}\n"
    assert site.left_in_home() == []


def test_off_in_the_script(site: Site) -> None:
    site.script("#!/bin/sh\n#PBS -v A=1\n#PBS -vm off\ntrue\n")
    done = site.launch("-N", "x", "job.sh")
    assert (done.returncode, done.stderr) == (0, b"")
    assert site.argv == ["-v", "A=1", "-N", "x", "job.sh"]  # qsub would read the last directive as -v m
    site.launch("-v", "B", "job.sh")
    assert site.argv == ["-v", "B", "job.sh"]


def test_off_in_a_script_on_standard_input(site: Site) -> None:
    script = b"#PBS -vm off\necho \xff\r\n" + b"x" * 200_000
    done = site.launch("-N", "x", stdin=script)
    assert (done.returncode, done.stderr) == (0, b"")
    assert site.argv == ["-N", "x"]
    assert site.stdin == script


def test_command_line_wins_over_off_in_the_script(site: Site) -> None:
    site.script("#PBS -vm off\ntrue\n")
    assert site.launch("-vm", "vcpus=2", "job.sh").returncode == 0
    assert site.spec.groups[0].vcpus == 2


def test_site_without_guests_by_default(site: Site) -> None:
    site.configure(submit=PLAIN_SITE)
    site.script()
    assert site.launch("job.sh").returncode == 0
    assert site.argv == ["job.sh"]
    assert site.launch(stdin=b"echo\n").returncode == 0
    assert (site.argv, site.stdin) == ([], b"echo\n")
    assert site.left_in_home() == []


@pytest.mark.parametrize("script", ["#PBS -vm vcpus=2\ntrue\n", "#PBS -vm img=micro\ntrue\n"])
def test_inline_request_counts_there_too(site: Site, script: str) -> None:
    site.configure(submit=PLAIN_SITE)
    site.script(script)
    assert site.launch("job.sh").returncode == 0
    assert site.spec.groups[0].image == "micro"


@pytest.mark.parametrize("words", [["missing"], ["-I"], ["."]])
def test_what_qsub_refuses_is_left_to_it(site: Site, words: list[str]) -> None:
    site.configure(submit=PLAIN_SITE)
    site.answer(stderr="qsub: no\n", status=1)
    done = site.launch(*words)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"qsub: no\n")
    assert site.argv == words


def test_signals_are_not_ignored_in_qsub(site: Site) -> None:
    site.qsub.write_text("#!/bin/sh\nkill -PIPE $$\n")
    assert site.launch("-vm", "off", "job.sh").returncode == -signal.SIGPIPE


def test_terminated_submission_leaves_nothing(site: Site) -> None:
    site.script()
    started = site.base / "started"
    os.mkfifo(started)
    site.qsub.write_text(f"#!/bin/sh\necho >{started}\nexec sleep 60\n")
    with subprocess.Popen(site.command("job.sh"), cwd=site.work, stderr=subprocess.PIPE) as vsub:
        try:
            assert started.read_text() == "\n"  # returns when qsub runs
            vsub.send_signal(signal.SIGTERM)
            assert vsub.wait(10) == 130
            assert vsub.stderr is not None and vsub.stderr.read() == b"vsub: interrupted\n"
        finally:
            vsub.kill()
    assert site.left_in_home() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_as_soon_as_qsub_has_started(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    started: list[int] = []
    spawn = process.spawn

    def interrupted(argv: list[str], **how: Any) -> int:
        started.append(spawn(argv, **how))
        signal.raise_signal(number)  # to this thread: vsub has no other, a test runner may
        return started[0]

    monkeypatch.setattr(process, "spawn", interrupted)
    with process.ending_by_exception():
        ended = process.run_captured(["/bin/sleep", "60"])
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        process.let_signals_in()
    assert ended == (128 + signal.SIGTERM, b"", True)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)
    process.let_signals_in()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


TOOK = {
    "after its word": "#!/bin/sh\necho 77.host\necho >{started}\nexec sleep 60\n",
    "not to be ended": "#!/bin/sh\ntrap '' TERM\necho >{started}\nsleep 1\necho 77.host\n",
}


@pytest.mark.parametrize("way", TOOK)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_job_that_was_taken_when_the_signal_came_is_not_lost(site: Site, number: signal.Signals, way: str) -> None:
    site.script()
    started = site.base / "started"
    os.mkfifo(started)
    site.qsub.write_text(TOOK[way].format(started=started))
    with subprocess.Popen(
        site.command("job.sh"), cwd=site.work, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as vsub:
        assert started.read_text() == "\n"
        vsub.send_signal(number)
        out, err = vsub.communicate(timeout=20)
    assert (vsub.returncode, out, err) == (130, b"77.host\n", b"vsub: interrupted; the job has been submitted\n")
    assert site.spec and (site.directory.parent / "job_id").read_text() == "77.host\n"


REPOSITORY = Path(__file__).resolve().parents[2]
HOLD = "86395"


def test_what_qsub_has_started_holds_up_nobody() -> None:
    """As a site's script around the batch system's own, which hears nothing of a signal that came to vsub alone."""
    script = f"sleep {HOLD} & echo $! 77.host; trap '' TERM; kill -TERM $PPID; wait"
    program = f"""\
from vsub import process
process.LAST_WORD_SECONDS = 0.3
with process.ending_by_exception():
    ended = process.run_captured(["/bin/sh", "-c", {script!r}])
    process.let_signals_in()
print(ended.output.decode().strip(), ended.status, ended.interrupted)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, timeout=60
    )
    started, *said = done.stdout.split()
    os.kill(int(started), signal.SIGKILL)
    assert said == ["77.host", str(128 + signal.SIGKILL), "True"]


@pytest.mark.parametrize("closed", [">&-", ">/dev/full"])
def test_a_job_is_submitted_though_its_id_cannot_be_printed(site: Site, closed: str) -> None:
    site.script()
    command = shlex.join(site.command("job.sh"))
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], cwd=site.work, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.startswith("vsub: submitted: 12.host; it cannot be printed: ")


def test_refusals_are_not_told_to_standard_output(site: Site) -> None:
    site.script()
    command = shlex.join(site.command("-vm", "vcpus=99", "job.sh"))
    done = subprocess.run(["sh", "-c", f"{command} 2>&-"], cwd=site.work, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")


def test_qsub_blocks_and_ignores_nothing_that_we_do() -> None:
    ended = process.run_captured(["/bin/grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"])
    process.let_signals_in()
    blocked, ignored = (int(line.split()[1], 16) for line in ended.output.splitlines())
    assert (ended.status, ended.interrupted, blocked) == (0, False, 0)
    assert not any(ignored >> (number - 1) & 1 for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT))


@pytest.mark.parametrize("words", [["-vm", "off"], []])
@pytest.mark.parametrize(
    ("given", "seen"),
    [({}, None), ({"LC_CTYPE": "C"}, "C"), ({"LC_CTYPE": "C.UTF-8"}, "C.UTF-8"), ({"LC_ALL": "C"}, None)],
)
def test_environment_is_the_users(site: Site, words: list[str], given: dict[str, str], seen: str | None) -> None:
    site.script()
    site.qsub.write_text(f"#!/bin/sh\nprintf '%s' \"${{LC_CTYPE-none}}\" >{site.record}/locale\necho 12.host\n")
    locale = {"PATH": os.environ["PATH"], "PWD": str(site.work), **given}
    subprocess.run(site.command(*words, "job.sh"), cwd=site.work, env=locale, check=True, stdout=subprocess.DEVNULL)
    assert (site.record / "locale").read_text() == (seen or "none")
