"""Assignments of bash are read without running them: what is read is what bash would set, what is not read is named."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.migration.shellfile import read_shell
from vmgr.migration.shellwords import MAX_VALUE

Value = Union[str, tuple[str, ...]]


def values(text: str) -> dict[str, Value]:
    return {name: assigned.value for name, assigned in read_shell(text, {}).values.items()}


def reasons(text: str) -> list[str]:
    return [part.reason for part in read_shell(text, {}).unread]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('A="7";', "7"),
        ("A=7", "7"),
        ("A='a b' # comment", "a b"),
        ("export A=yes;", "yes"),
        ("readonly A=yes", "yes"),
        ("declare -rx A=yes", "yes"),
        (r'A="a \"quoted\" \$word"', 'a "quoted" $word'),
        (r"A=one\ word", "one word"),
        ("A=a'b'\"c\"", "abc"),
        ("A=x#y", "x#y"),
        ("A=", ""),
        ('B=/opt; A="$B/vm"', "/opt/vm"),
        ('B=/opt; A="${B}vm"', "/optvm"),
        ("A=1; A=2", "2"),
        ("A=1 B=2", "1"),
        ("A='two\nlines'", "two\nlines"),
        ("A=one\\\ntwo", "onetwo"),
        ("A=(x 'y z' \"w\") ;", ("x", "y z", "w")),
        ("A=(x # first\n  y)", ("x", "y")),
        ("A=()", ()),
        ('A="$"', "$"),
        ("set -o nounset;\nA=1", "1"),
        ("f() {\n  B=2\n}\nA=1", "1"),
        ("cat <<END\nA=2\nEND\nA=1", "1"),
    ],
)
def test_what_is_read(text: str, value: Value) -> None:
    assert values(text)["A"] == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('A="$(hostname)"', "the value of A is the output of a command"),
        ("A=`hostname`", "the value of A is the output of a command"),
        ("A=$(( 1 + 1 ))", "the value of A is the output of a command"),
        ("A=$B", "the value of A is $B, which this file does not set"),
        ('A="${B:-7}"', "the value of A is an expansion"),
        ("A=~/x", "the value of A is a home directory (~)"),
        ("A=$1", "the value of A is $1"),
        ("A=(*)", "the value of A is a pattern"),
        ("A+=1", "A is added to"),
        ("A[1]=1", "one element of A"),
        ("export A={a,b}", "the value of A is a pattern"),
        ("A=1 true", "the command A=1"),
        ("declare -i A=1+1", "the command declare"),
        ("if true; then A=1; fi", "set only as `if` goes"),
        ("while true; do A=1; break; done", "set only as `while` goes"),
        ("A=1 && true", "a command"),
        ("A=1 | true", "a command"),
        ("f() { A=1; }", "a command"),
        ("(A=1)", "a command"),
        ("f() { A=1; }; A=2; f", "A is set in a function or declared too"),
        ("function f { A=1; }; A=2; f", "A is set in a function or declared too"),
        ('A="no end', "a quote that does not end: from here on nothing was read"),
        ("A=(1", "an array that does not end: from here on nothing was read"),
        ("if true; then A=1", "`fi` is missing: from here on nothing was read"),
        ("A=$'x'", "a quote of the form $'…': from here on nothing was read"),
        ("UID=1", "UID is read-only: from here on nothing was read"),
        ("RANDOM=1", "RANDOM is a variable of the shell's own"),
        ("B=(1); B=2", "B is an array before"),
        ("B=1 readonly A=(1 2); A=3", "A is set in a function or declared too"),
        ("readonly A= B=$C; A=1", "A is set in a function or declared too"),
        ("readonly A=1 A=2", "A is read-only: from here on nothing was read"),
    ],
)
def test_what_is_not_read_is_named(text: str, reason: str) -> None:
    assert "A" not in values(text) and reason in reasons(text)


@pytest.mark.parametrize(
    "text",
    [
        "A=1\nif true; then A=2; fi", "A=1\nunset A", "A=1\nread A", "A=1\n: ${A:=2}", "A=1\n((A=2))", "A=1\nA+=1",
        "A=1\neval 'A=2'", "A=1\nprintf -v A 2", "A=1\nfor A in 2; do :; done", "A=1\nexport A=$(x)",
        'A=1\n"unclosed A=2', "A=1\ncat <<X\nA=2",
    ],
)  # fmt: skip
def test_a_value_that_may_have_changed_since_does_not_count(text: str) -> None:
    assert "A" not in values(text)


def test_what_follows_the_end_does_not_count() -> None:
    file = read_shell("A=1\nexit 0\nA=2\nB=2\n", {})
    assert {name: assigned.value for name, assigned in file.values.items()} == {"A": "1"}
    assert [(part.first, part.names) for part in file.unread] == [(2, ()), (3, ("B",))]


def test_lines_are_told() -> None:
    file = read_shell("# one\n\nA=1\nB='a\nb'\nif x; then\n C=1\nfi\nD=4", {})
    assert {name: assigned.line for name, assigned in file.values.items()} == {"A": 3, "B": 4, "D": 9}
    assert [(part.first, part.last, part.names) for part in file.unread] == [(6, 8, ("C",))]


def test_nothing_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    ways = (
        "{0}",
        "A=$({0})",
        "A=`{0}`",
        'A="$({0})"',
        "A[$({0})]=1",
        "A=({0}) $({0})",
        "A=<({0})",
        "{0} <<X\n$({0})\nX",
    )
    for way in ways:
        read_shell(way.format(f"touch {mark}"), {})
    assert not mark.exists()


def test_doubling_values_stay_bounded() -> None:
    text = "A=0123456789\n" + 'A="$A$A"\n' * 200
    begun = time.monotonic()
    file = read_shell(text, {})
    assert time.monotonic() - begun < 5
    assert "A" not in file.values and any(f"more than {MAX_VALUE}" in part.reason for part in file.unread)


@pytest.mark.parametrize(
    "piece", ["$(", "${", "(", "if x; then ", '"', "`", "A=", "A=(", "<<X\n", "((", "[[ ", "\\", "#", "A=1 "]
)
def test_long_files_take_no_long_time(piece: str) -> None:
    begun = time.monotonic()
    read_shell(piece * (200_000 // len(piece)), {})
    assert time.monotonic() - begun < 20


@FUZZ
@given(st.text(alphabet=st.sampled_from("AB=$(){}[]'\"`\\ \n\t;&|<>#~*?!:-+1fiesacdon"), max_size=80))
def test_any_text_is_read_or_named(text: str) -> None:
    file = read_shell(text, {"K": "known"})
    for assigned in file.values.values():
        assert 1 <= assigned.line <= text.count("\n") + 1
    for part in file.unread:
        assert 1 <= part.first <= part.last <= text.count("\n") + 1 and part.reason
    assert not set(file.values) & {name for part in file.unread[-1:] for name in part.names}


PIECES = r"""A=1|B="x $A"|C='q'|A=$B|D=${A}|E=(a "b c" 'd')|A+=2|A[1]=3|export A=4|readonly F=1|F=2|declare -r G=7
A=1 true|if false; then|if true; then|fi|else|for A in x y; do|while false; do|done|case x in|x)|y\|z)|;;
esac|{|}|(|)|fn() {|function gn {|fn|gn|true|false|&&|\|\||\||;|&|# c A=9|"A=5"|unset A|: ${A:=z}|: ${H:=z}|cat <<X
cat <<-X|X|cat <<'Y'|Y|((A=3))|[[ -z $A ]]|let A=8|[[ a < b ]]|read A|B=a\ b|B=a\|C=~|C=x:~|D=$(echo 1)|D=`echo 2`
D="$(echo ")")"|E=()|A=|A=#x|A=x#y|A="a\"b\$c\d"|I=$1|I=$|I="$"|I=${A:-4}|!|time|A=(1|2)|exit|return
export|J=a{1,2}|J=*|declare -i K=1+1|printf -v A 3|B=$E|in|do|then|UID=3|>/dev/null|2>&1|L='a|b'|L="a|b"
select q in a; do break;|export J=a{1,2}|export L=$B|until true; do|A=1 B=2|E=(1 2);E=3|I='a'$B"$C\\"x"""
PARTS = [part.replace("\0", "|") for part in re.split(r"[|\n]", PIECES.replace(r"\|", "\0"))]
NAMES = "ABCDEFGHIJKL"
SHOW = """
finish() {
  exec >&3
  for name in END {A..L}; do
    declare -p "$name" >/dev/null 2>&1 || continue
    eval "count=\\${#$name[@]}; elements=(\\"\\${$name[@]}\\")"
    printf '%s\\0%s\\0' "$name" "$count"
    [ "$count" = 0 ] || printf '%s\\0' "${elements[@]}"
  done
}
trap finish EXIT
exec 3>&1 >/dev/null 2>&1
. "$1" </dev/null
"""


def bash(file: Path) -> dict[str, list[str]]:
    """What bash sets when it runs a file of the pieces above, which do nothing but set variables."""
    done = subprocess.run(
        ["/bin/bash", "--norc", "-c", SHOW, "bash", file],
        capture_output=True,
        timeout=60,
        env={"HOME": "/h"},
        cwd="/proc",
    )
    out = iter(done.stdout.decode().split("\0")[:-1])
    return {name: [next(out) for _ in range(int(next(out)))] for name in out}


@settings(FUZZ, derandomize=True, max_examples=150)  # the same texts each time
@given(st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from([" ", "\n", "\n", ";"])), max_size=9))
def test_what_is_read_is_what_bash_sets(tmp_path: Path, pieces: list[tuple[str, str]]) -> None:
    text = "".join(part + separator for part, separator in pieces)
    read = {name: value for name, value in values(text).items() if name in NAMES}
    file = tmp_path / "config.sh"
    file.write_text(f"{text}\nEND=1\n")
    if not read or subprocess.run(["/bin/bash", "-n", file], capture_output=True).returncode:
        return  # bash takes no such file
    real = bash(file)
    if "END" not in real:
        return  # bash did not come to its end
    for name, value in read.items():
        if isinstance(value, tuple):
            assert real[name] == list(value), (name, text)
        else:
            assert real[name][0] == value, (name, text)
