"""Tables and progress on a real terminal and in a pipe, with hostile cells."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, REPOSITORY

from vmgr.commands.table import encodable, print_rows
from vmgr.errors import printable

HOSTILE = ["\x1b[2J\x1b]0;owned\x07", "[bold red]x[/bold red]", ":smile:", "a\nb\rc", "\u202egnp.exe", "http://x.y/z"]
ROWS = [["1.host", "n1-1", "running", 4], ["2.host", "n1-2", "failed", 16]]

_TABLE = """\
import json, sys
sys.path[:0] = sys.argv[1].split(":")
from vmgr.commands.table import print_rows
headings, rows = json.loads(sys.argv[2])
print_rows(headings, rows, as_json=False)
"""
_PROGRESS = """\
import sys
sys.path[:0] = sys.argv[1].split(":")
from vmgr.commands import progress
progress._LINE_SECONDS = 0.0
told = progress.Shown()
told.line("looking at [bold]\\x1b[2Jdisk")
with told.bar("copying [bold]\\x1b[2Jdisk", 8 << 20) as advance:
    for part in (3 << 20, 5 << 20):
        advance(part)
    if "fail" in sys.argv:
        raise SystemExit("it broke")
"""
PATH = ":".join([str(REPOSITORY), *filter(None, sys.path)])


def on_terminal(code: str, *arguments: str, columns: int = 60, **environment: str) -> str:
    """What a program writes to a terminal of so many columns."""
    child = pexpect.spawn(
        sys.executable, ["-I", "-c", code, PATH, *arguments], dimensions=(24, columns), encoding="utf-8", timeout=30,
        env={"TERM": "xterm-256color", "LANG": "C.UTF-8", "PATH": os.environ["PATH"], **environment},
    )  # fmt: skip
    text: str = child.read()
    child.close()
    return text.replace("\r\n", "\n")


def in_pipe(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", "-c", code, PATH, *arguments], capture_output=True, text=True)


def plain(text: str) -> str:
    """What is seen of a terminal's text, without the sequences that set colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def table(headings: list[str], rows: list[list[object]]) -> str:
    return json.dumps([headings, rows])


def test_a_table_in_a_pipe_is_aligned_text() -> None:
    done = in_pipe(_TABLE, table(["job", "guest", "state", "vcpus"], ROWS))
    assert done.stdout == ("JOB     GUEST  STATE    VCPUS\n1.host  n1-1   running  4\n2.host  n1-2   failed   16\n")


def test_a_table_in_a_pipe_costs_no_library_of_terminals() -> None:
    code = _TABLE + "print([name for name in sys.modules if name.split('.')[0] in ('rich', 'pygments')])"
    assert in_pipe(code, table(["job"], [["1.host"]])).stdout.splitlines()[-1] == "[]"


def test_a_table_on_a_terminal_has_colours_and_numbers_to_the_right() -> None:
    text = on_terminal(_TABLE, table(["job", "guest", "state", "vcpus"], ROWS))
    assert "\x1b[32mrunning" in text and "\x1b[31mfailed" in text and "\x1b[1mJOB" in text
    lines = [line.rstrip() for line in plain(text).splitlines()]
    assert lines[0].split() == ["JOB", "GUEST", "STATE", "VCPUS"]
    assert lines[1].endswith("   4") and lines[2].endswith("  16")


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_without_colours(environment: dict[str, str]) -> None:
    text = on_terminal(_TABLE, table(["job", "guest", "state", "vcpus"], ROWS), **environment)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", text) and "failed" in text


@pytest.mark.parametrize("columns", [20, 200])
def test_a_table_fits_its_terminal_and_loses_nothing(columns: int) -> None:
    words = ["a", "reason", "that", "is", "longer", "than", "a", "narrow", "terminal", "is", "wide,", "by", "far"]
    text = plain(on_terminal(_TABLE, table(["job", "reason"], [["1.host", " ".join(words)]]), columns=columns))
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns
    seen = "".join(text.split())
    assert all(word in seen for word in words) or columns < 40
    assert sorted(seen) == sorted("JOBREASON1.host" + "".join(words))


def test_names_and_numbers_stay_in_one_piece() -> None:
    row = ["1.host", "10.170.225.65", "02:84:f5:a8:dc:64", ""]
    headings = ["job", "address", "mac", "reason"]
    narrow = plain(on_terminal(_TABLE, table(headings, [row]), columns=20))
    assert "10.170.225.65" in narrow and "02:84:f5:a8:dc:64" in narrow and "REASON" not in narrow
    told = plain(on_terminal(_TABLE, table(headings, [[*row[:3], "it " * 20]]), columns=60))
    assert "REASON" in told and max(map(len, told.splitlines())) <= 60


def test_hostile_cells_are_text() -> None:
    rows = [[cell] for cell in HOSTILE]
    piped = in_pipe(_TABLE, table(["name"], rows)).stdout
    shown = on_terminal(_TABLE, table(["name"], rows), columns=120)
    expected = ["NAME", *map(printable, HOSTILE)]
    assert piped.splitlines() == expected
    assert [line.rstrip() for line in plain(shown).splitlines()] == expected


@FUZZ
@given(rows=st.lists(st.tuples(st.text(max_size=20), st.one_of(st.integers(), st.none(), st.text(max_size=9)))))
def test_any_cell_stays_on_its_line(rows: list[tuple[object, ...]]) -> None:
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as out:
        print_rows(("a", "b"), rows, as_json=False)
    lines = out.getvalue().split("\n")
    assert len(lines) == len(rows) + 2 and all(line.isprintable() for line in lines)
    with redirect_stdout(StringIO()) as out:
        print_rows(("a", "b"), rows, as_json=True)
    assert json.loads(out.getvalue()) == [{"a": a, "b": b} for a, b in rows]


def test_what_the_output_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert encodable("grün · 1") == "gr\\xfcn \\xb7 1"
        print_rows(("name",), [["grün"]], as_json=False)
    assert (tmp_path / "out").read_text() == "NAME\ngr\\xfcn\n"


def test_progress_in_a_pipe_is_lines() -> None:
    done = in_pipe(_PROGRESS)
    lines = [re.sub(r"^\[ +[0-9.]+ s\] ", "", line) for line in done.stderr.splitlines()]
    name = "copying [bold]\\x1b[2Jdisk"
    assert (done.stdout, done.returncode) == ("", 0)
    assert lines == ["looking at [bold]\\x1b[2Jdisk", name, f"{name}: 37 %", f"{name}: 100 %"]


def test_progress_on_a_terminal_is_a_bar() -> None:
    text = plain(on_terminal(_PROGRESS, columns=100))
    assert "copying [bold]\\x1b[2Jdisk" in text and "\x1b[2J" not in text
    assert "100%" in [line for line in text.splitlines() if "━" in line][-1]


def test_progress_that_breaks_off_gives_the_terminal_back() -> None:
    text = on_terminal(_PROGRESS, "fail", columns=100)
    assert text.rstrip().endswith("it broke") and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert in_pipe(_PROGRESS, "fail").returncode == 1


def test_a_reader_that_has_seen_enough_is_no_fault() -> None:
    code = 'import sys\nsys.path[:0] = sys.argv[1].split(":")\nfrom vmgr.cli import main\nsys.exit(main(["errors"]))'
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-I", "-c", code, PATH], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


_RUN = 'import sys\nsys.path[:0] = sys.argv[1].split(":")\nfrom vmgr.cli import main\nsys.exit(main(sys.argv[2:]))'


def test_a_full_disk_is_told_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-I", "-c", _RUN, PATH, "errors"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (70, "vmgr: No space left on device\n")


def test_standard_output_that_is_closed_is_no_fault() -> None:
    shell = 'exec "$@" >&-'
    command = ["sh", "-c", shell, "sh", sys.executable, "-I", "-c", _RUN, PATH, "errors"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


_BROKEN = """\
import sys
sys.path[:0] = sys.argv[1].split(":")
from vmgr import cli
def broken(**_options):
    raise KeyError("what")
cli.cli.commands["errors"].callback = broken
sys.exit(cli.main(sys.argv[2:]))
"""


def test_a_fault_is_one_line_unless_more_is_asked_for() -> None:
    short, long = in_pipe(_BROKEN, "errors"), in_pipe(_BROKEN, "--debug", "errors")
    assert (short.returncode, short.stderr.count("\n")) == (70, 1)
    assert short.stderr.startswith("VT-INTERNAL: KeyError: 'what'; ") and "Traceback" in long.stderr


_CONFIRM = """\
import asyncio, sys
sys.path[:0] = sys.argv[1].split(":")
from vmgr.commands import power
from vmgr.reach.target import parse_target
import click
@click.command()
def ask():
    async def ask():
        power._confirm(parse_target("12:1"), "off", False)
        print("switched off")
    asyncio.run(ask())
from vmgr import cli
cli.cli.add_command(ask)
sys.exit(cli.main(["ask"]))
"""


@pytest.mark.parametrize(
    ("keys", "status", "said"),
    [("y\n", 0, "switched off"), ("n\n", 1, "nothing was done"), ("\x03", 130, "vmgr: interrupted")],
)
def test_a_question_takes_yes_no_and_an_interrupt(keys: str, status: int, said: str) -> None:
    child = pexpect.spawn(sys.executable, ["-I", "-c", _CONFIRM, PATH], encoding="utf-8", timeout=30)
    child.expect(r"Go on\? \[y/N\]: ")
    child.send(keys)
    child.expect(said)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == status
