"""`#SBATCH` lines, read as sbatch reads them. The words were recorded from its 22.05.8 and 25.11.7 (`-vvv`)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgr.errors import Code, VTorqueError
from vsub.engines.slurmdirectives import read_sbatch_lines, sbatch_lines, split_words
from vsub.engines.slurmoptions import parse_sbatch


def older() -> bool:
    """That a backslash takes no blank outside of quotes, as before Slurm 24.05."""
    return False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (' --comment="a b" --nodes=1', ["--comment=a b", "--nodes=1"]),
        (" --comment='a b' #x", ["--comment=a b"]),
        (" --comment=a\\ b", ["--comment=a", "b"]),
        (' --comment="a # b"', ["--comment=a # b"]),
        (' --comment="a \'b c" --mem=1', ["--comment=a 'b c", "--mem=1"]),
        (" --comment=a#b", ["--comment=a"]),
        (' --comment="" --mem=1', ["--comment=", "--mem=1"]),
        (' "" --mem=1', []),
        (" --comment=a\\", ["--comment=a"]),
        ("\t-N1 -n 2", ["-N1", "-n", "2"]),
        ("x", ["x"]),
        (' --comment=b""\\-\\\t', ["--comment=b-"]),
        (' --comment=\\ -b "-b "b', ["--comment=", "-b", "-b b"]),
        (" --comment=--='\\='a-\\ x", ["--comment=--==a-", "x"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert split_words(text, "x", older) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" --comment=a\\ b", ["--comment=a b"]),
        (" --comment=\\ ", ["--comment= "]),
        (" --comment=a\\\tb", ["--comment=a", "b"]),
        (' --comment="a\\ b"', ["--comment=a b"]),
        (" --comment=a\\\\ b", ["--comment=a\\", "b"]),
        (" \\ #x", [" "]),
    ],
)
def test_words_of_newer_versions(text: str, words: list[str]) -> None:
    assert split_words(text, "x", lambda: True) == words


@pytest.mark.parametrize(
    ("text", "code"), [(' --comment="a', Code.USAGE), (" : --mem=1", Code.OPTION), (" --mem=1 :x", Code.OPTION)]
)
def test_what_sbatch_gives_up_on(text: str, code: Code) -> None:
    with pytest.raises(VTorqueError) as problem:
        split_words(text, "x", older)
    assert problem.value.code is code


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (b"#!/bin/sh\n#SBATCH a\n\n \t\n# b\n  # c\n#SBATCHd\necho\n#SBATCH e\n", [(2, " a"), (7, "d")]),
        (b"#SBATCH a", [(1, " a")]),
        (b" #SBATCH a\n#SBATCH b\n", [(2, " b")]),
        (b":\n#SBATCH a\n", []),
        (b"##SBATCH a\n# SBATCH b\n#sbatch c\n", []),
        (b"#SBATCH a\r\n#SBATCH b\r\n", [(1, " a\r"), (2, " b\r")]),
        (b"", []),
    ],
)
def test_lines(script: bytes, found: list[tuple[int, str]]) -> None:
    assert list(sbatch_lines(script)) == found


@pytest.mark.parametrize("word", ["hetjob", "packjob", ":"])
def test_jobs_of_several_kinds_of_nodes_are_refused(word: str) -> None:
    with pytest.raises(VTorqueError, match="nodes of one kind") as problem:
        read_sbatch_lines(f"#SBATCH -N1\n#SBATCH {word}\n#SBATCH -N2\n".encode(), "job.sh", older)
    assert problem.value.code is Code.OPTION and "job.sh line 2" in str(problem.value)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("foo --mem=1", "'foo' is no option of sbatch (job.sh line 1)"),
        ("--mem=1 -- x", "'x' is no option of sbatch (job.sh line 1)"),
        ("--nosuch", "sbatch's option --nosuch is not known (job.sh line 1)"),
        ("--dry-run", "sbatch's option --dry-run is not known (job.sh line 1)"),
        ("-N", "sbatch's option --nodes needs a value (job.sh line 1)"),
    ],
)
def test_what_sbatch_would_not_take(line: str, problem: str) -> None:
    assert read_sbatch_lines(f"#SBATCH {line}\n".encode(), "job.sh", older).problem == problem


def test_words_as_getopt_reads_them() -> None:
    def options(*words: str) -> list[str]:
        return [f"{option}|{option.source}" for option in parse_sbatch(words, "here").options]

    assert options("-HN2", "-J", "-x") == ["-h|--hold, here", "--nodes=2|here", "-N -x|--job-name=-x, here"]
    assert options("--nice", "--nice=", "--exclusive=user") == ["--nice|here", "--nice=|here", "--exclusive=user|here"]
    assert options("--requeue", "--no-requeue") == ["-r y|--requeue, here", "-r n|--no-requeue, here"]
    assert options("--requeue=expedite") == ["--requeue=expedite|here"]
    found = parse_sbatch(["-p", "x", "--", "-script", "-N", "2"])
    assert (found.operands, found.rest, found.problem) == (("-script", "-N", "2"), ("-p", "x"), None)
    found = parse_sbatch(["-p", "x", "--odd", "y", "job.sh"])
    assert (found.operands, found.rest) == ((), ("-p", "x", "--odd", "y", "job.sh"))


@given(st.binary(max_size=200), st.booleans())
def test_whatever_a_script_holds(data: bytes, takes_blanks: bool) -> None:
    """It is read, or refused for a reason."""
    try:
        read_sbatch_lines(b"#SBATCH " + data, "x", lambda: takes_blanks)
    except VTorqueError as problem:
        assert problem.code in (Code.USAGE, Code.OPTION)


@given(st.text(max_size=60), st.booleans())
def test_words_have_no_quotes_left_open(text: str, takes_blanks: bool) -> None:
    try:
        words = split_words(text, "x", lambda: takes_blanks)
    except VTorqueError:
        return
    assert all(words) and sum(map(len, words)) <= len(text)
