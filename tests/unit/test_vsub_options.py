"""qsub's option grammar and the directives in a script, read exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgr.errors import VTorqueError
from vsub.asked import requested
from vsub.directives import PREFIX, directive_lines, read_directives, split_words
from vsub.honour import check_options, split_resources
from vsub.options import FLAGS, OWN, WITH_VALUE, Option, parse_line

WORDS = st.lists(st.text(st.characters(blacklist_characters="\0"), max_size=12), max_size=8)
SOURCE = "the command line"


def read(*words: str) -> tuple[list[str], list[str], list[str]]:
    """Options as text, operands, and the values of -vm."""
    line = parse_line(list(words))
    return [str(option) for option in line.options], list(line.operands), [option.value or "" for option in line.vm]


@pytest.mark.parametrize(
    ("words", "options", "operands", "vm"),
    [
        ([], [], [], []),
        (["job"], [], ["job"], []),
        (["-"], [], ["-"], []),
        (["-N", "a", "job"], ["-N a"], ["job"], []),
        (["-Na", "job"], ["-N a"], ["job"], []),
        (["job", "-Na"], ["-N a"], ["job"], []),
        (["-hVNa"], ["-h", "-V", "-N a"], [], []),
        (["-hV", "-N", "-h"], ["-h", "-V", "-N -h"], [], []),
        (["-N", "--", "--", "-h"], ["-N --"], ["-h"], []),
        (["-N", ""], ["-N "], [], []),
        (["-vm", "a", "-v", "m", "-vmx"], ["-v m", "-v mx"], [], ["a"]),
        (["-v", "-vm", "x"], ["-v -vm"], ["x"], []),
        (["-Vvm", "x"], ["-V", "-v m"], ["x"], []),
        (["--", "-vm", "x"], [], ["-vm", "x"], []),
        (["-vm", "--wait"], [], [], ["--wait"]),
    ],
)
def test_grammar(words: list[str], options: list[str], operands: list[str], vm: list[str]) -> None:
    assert read(*words) == (options, operands, vm)


def test_every_letter_of_torque() -> None:
    assert sorted(WITH_VALUE) == sorted("AabCcDdeFiJjKkLlMmNoPpqrSTtuvWw")
    assert sorted(FLAGS) == sorted("EfhInVXxz")


def test_our_words() -> None:
    line = parse_line(["--wait", "job", "--debug", "-vm", "off", "-N", "--wait"])
    assert line.own == {"--wait", "--debug"}
    assert line.rest == ("job", "-N", "--wait")


@given(WORDS)
def test_any_words_are_read_or_refused(words: list[str]) -> None:
    try:
        line = parse_line(words)
    except VTorqueError:
        return
    if not line.vm and not line.own:
        assert list(line.rest) == words
    try:
        check_options(line.options, "carol")
        requested(line.vm)
    except VTorqueError as err:
        assert str(err).isprintable()


@given(WORDS)
def test_options_written_back_read_the_same(words: list[str]) -> None:
    try:
        line = parse_line([word for word in words if word != "-vm" and word not in OWN])
    except VTorqueError:
        return
    if line.problem is None:
        again = parse_line([word for option in line.options for word in option.argv()] + ["--", *line.operands])
        assert (again.options, again.operands, again.problem) == (line.options, line.operands, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" -l nodes=1  -N x ", ["-l", "nodes=1", "-N", "x"]),
        ("\t-N\tx", ["-N", "x"]),
        (" -N 'a b'c\"d 'e\"", ["-N", "a bcd 'e"]),
        (" -N a\\ b\\'", ["-N", "a b'"]),
        (" -N ''", ["-N", ""]),
        (" '\\'", ["\\"]),
        (" a\\", ["a"]),
        ("", []),
    ],
)
def test_directive_words(text: str, words: list[str]) -> None:
    assert split_words(text, "here") == words


@pytest.mark.parametrize(
    ("script", "lines"),
    [
        (b"", []),
        (b"#PBS -h", [(1, " -h")]),
        (b"#!/bin/sh\n\n  \t#PBS -h\n#PBS-V\n", [(3, " -h"), (4, "-V")]),
        (b"##PBS -h\n#pbs -h\n# PBS -h\n", []),
        (b": comment\n#PBS -h\n", [(2, " -h")]),
        (b" : command\n#PBS -h\n", []),
        (b"true\n#PBS -h\n", []),
        (b"#PBS -l \\\na=1,\\\nb=2\n#PBS -h\n", [(1, " -l a=1,b=2"), (4, " -h")]),
        (b"#PBS -l \\", [(1, " -l ")]),
        (b"#PBS -h\r\n#PBS -V\r\n", [(1, " -h"), (2, " -V")]),
        (b"#PBS -N \xff\n", [(1, " -N \udcff")]),
    ],
)
def test_directive_lines(script: bytes, lines: list[tuple[int, str]]) -> None:
    assert list(directive_lines(script, PREFIX)) == lines


@given(st.binary(max_size=200).map(lambda tail: b"#PBS " + tail), st.sampled_from([PREFIX, "#P", "", "#PBS -"]))
def test_any_script_is_read_or_refused(script: bytes, prefix: str) -> None:
    try:
        read_directives(script, prefix, "job")
    except VTorqueError as err:
        assert str(err).isprintable()


@given(st.lists(st.text(st.characters(blacklist_characters="\0\n\r'"), min_size=0), max_size=5))
def test_quoted_words_survive_a_directive(words: list[str]) -> None:
    quoted = " ".join(f"'{word}'" for word in words)
    assert split_words(quoted, "here") == words


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("nodes=1:ppn=2,mem=1gb", [("nodes", "1:ppn=2"), ("mem", "1gb")]),
        ("software='a,b',x", [("software", "a,b"), ("x", "")]),
        ("a='open,b=1", [("a", "open,b=1")]),
        ("", [("", "")]),
    ],
)
def test_resources(text: str, items: list[tuple[str, str]]) -> None:
    assert list(split_resources(text)) == items


def test_off_and_more() -> None:
    assert requested(()) == {}
    assert requested((Option("vm", "off", SOURCE),)) is None
    with pytest.raises(VTorqueError, match="exclude each other"):
        requested((Option("vm", "img=a", SOURCE), Option("vm", "off", "job line 1")))
