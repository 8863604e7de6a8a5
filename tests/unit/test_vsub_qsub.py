"""Jobs without guests: everything goes to qsub untouched."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from vsubsite import Site

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
    with subprocess.Popen(site.command("job.sh"), cwd=site.work, stderr=subprocess.PIPE) as process:
        try:
            assert started.read_text() == "\n"  # returns when qsub runs
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 130
            assert process.stderr is not None and process.stderr.read() == b"vsub: interrupted\n"
        finally:
            process.kill()
    assert site.left_in_home() == []
