"""qsub's option grammar and the directives in a script, read exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgr.errors import VTorqueError
from vsub.asked import requested
from vsub.attributes import read_attributes
from vsub.directives import PREFIX, directive_lines, read_directives, split_words
from vsub.honour import check_options
from vsub.options import FLAGS, OWN, WITH_VALUE, Option, parse_line
from vsub.resources import parse_list

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
    assert sorted(WITH_VALUE) == sorted("-AabCcDdeFiJjKkLlMmNoPpqrSTtuvWw")
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
        check_options(line.options, read_attributes(line.options), "carol", "users")
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
        (b"#PBS -l \\", [(1, " -l \\")]),
        (b"#PBS -l \\\n", [(1, None)]),
        (b"#PBS -l a=1,\\\n", [(1, None)]),
        (b"#PBS -h\r\n#PBS -V\r\n", [(1, " -h"), (2, " -V")]),
        (b"#PBS -N \xff\n", [(1, " -N \udcff")]),
    ],
)
def test_directive_lines(script: bytes, lines: list[tuple[int, str | None]]) -> None:
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
        ("software='a,b',x=1", [("software", "a,b"), ("x", "1")]),
        ('software="a,b",x=1', [("software", "a,b"), ("x", "1")]),
        ("a='open,b=1", [("a", "open,b=1")]),
        ("a=b'c,d'e,f=1", None),
        ("a=x[1,2],b=3", [("a", "x[1,2]"), ("b", "3")]),
        (" a = 1", [("a", "1")]),
        ("a=1,a=2", [("a", "1"), ("a", "2")]),
        ("\x1c=1,\xa0b=\xa0", [("\x1c", "1"), ("\xa0b", "\xa0")]),  # blanks to Python, not to C
        ("a=,b=1", [("a", ""), ("b", "1")]),
        ("", []),
        ("a", None),
        ("a,b=1", None),
        ("=1", None),
        (",a=1", None),
        ("a=1,", None),
        ("a=1,,b=2", None),
    ],
)
def test_resources(text: str, items: list[tuple[str, str]] | None) -> None:
    option = Option("l", text, SOURCE)
    if items is None:
        with pytest.raises(VTorqueError, match="illegal -l value"):
            parse_list(option)
    else:
        assert [(item.name, item.value) for item in parse_list(option)] == items


def test_off_and_more() -> None:
    assert requested(()) == {}
    assert requested((Option("vm", "off", SOURCE),)) is None
    with pytest.raises(VTorqueError, match="exclude each other"):
        requested((Option("vm", "img=a", SOURCE), Option("vm", "off", "job line 1")))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("umask=022", "umask", "022"),
        (" depend = afterok:1,before:2 ", "depend", "afterok:1,before:2"),
        ("x='a b',\"c\"", "x", "a b,c"),
        ("ADVRES:a.1", "x", "ADVRES:a.1"),
        ("two words=1", "x", "two words=1"),
        ("=1", "x", "=1"),
        ("a=", "a", ""),
        ("a=\x1f", "a", "\x1f"),
        ("a=b=c", "a", "b=c"),
    ],
)
def test_attributes(text: str, name: str, value: str) -> None:
    (attribute,) = read_attributes((Option("W", text, SOURCE),))
    assert (attribute.name, attribute.value) == (name, value)
