"""Without guests vsub is qsub: for the rows of the table, the same job, or the same refusal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
from conftest import Account, Done, Torque
from vsubrows import ROWS, Row

from vsub.options import OWN

CHANGING = re.compile(r"[cmqe]time|queue_rank|total_runtime|Walltime\.Remaining|hashname|job_id")
"""Attributes in which no two jobs are alike."""


class Line(NamedTuple):
    """What a plain qsub can be given."""

    words: tuple[str, ...]
    script: bytes
    stdin: Optional[bytes]
    env: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, bytes], ...]


def plain(row: Row) -> Optional[Line]:
    """The row without what is ours; None where nothing is left to compare.

    Without a directive `-vm`, which qsub misreads; without jobs that would wait for their start on a terminal.
    """
    words, rest = list(row.words), []
    while words:
        word = words.pop(0)
        if word == "--":
            rest += [word, *words]
            break
        if word == "-vm":
            if not words:
                return None
            words.pop(0)
        elif word in OWN:
            return None
        else:
            rest.append(word)
    asked = " ".join(rest) + row.script.decode(errors="replace")
    sessions = re.search(r"(^|\s)-I|interactive=true", asked) and re.search(r"(^|\s)-x", asked)
    if sessions or b"-vm" in row.script + (row.stdin or b"") or row.terminal:
        return None
    files = {name: data for name, data in row.files.items() if name in asked}
    return Line(tuple(rest), row.script, row.stdin, tuple(row.env.items()), tuple(files.items()))


LINES = {line: name for name, line in reversed([(name, plain(row)) for name, row in ROWS]) if line is not None}


def same(name: str, text: str, job: str) -> str:
    """An attribute of one job as that of any: without its number in the names of files, variables in any order."""
    if name == "Variable_List":  # with -V a shell hands them on in another order
        return ",".join(sorted(text.split(",")))
    number = re.match("[0-9]+", job)
    assert number is not None
    return re.sub(rf"\.([oe]){number[0]}\b", r".\1N", text)


def described(torque: Torque, done: Done) -> dict[str, Any]:
    """All that is to be the same of a submission."""
    told: dict[str, Any] = {"status": done.status, "err": done.err.replace(str(torque.qsub), "qsub")}
    job = done.out.strip()
    if not re.fullmatch(r"[0-9]+(\[\])?\.\S+", job):
        return {**told, "out": done.out}
    attributes = torque.attributes(job)
    return {
        **told,
        **{name: same(name, value, job) for name, value in attributes.items() if not CHANGING.fullmatch(name)},
    }


def run(torque: Torque, account: Account, program: Path, line: Line, *more: str) -> dict[str, Any]:
    words = [
        word.replace("<home>", str(account.home)).replace("<work>", str(account.home / "work")) for word in line.words
    ]
    done = torque.submit(program, [*more, "-h", *words], stdin=line.stdin or b"", env=dict(line.env))
    return described(torque, done)


@pytest.mark.parametrize(
    "line", [pytest.param(line, id=name) for line, name in sorted(LINES.items(), key=lambda item: item[1])]
)
def test_the_same_job(torque: Torque, account: Account, line: Line) -> None:
    account.write("job.sh", line.script)
    for name, data in line.files:
        account.write(name, data)
    expected = run(torque, account, torque.qsub, line)
    assert run(torque, account, torque.program, line, "-vm", "off") == expected
    assert run(torque, account, torque.front, line, "-vm", "off") == expected
