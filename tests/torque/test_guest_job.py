"""Guest jobs at a real TORQUE: it takes what vsub submits, and understands it as it is meant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Account, Torque
from test_same_job import described, plain, run
from vsubrows import ROWS, Row

CHANGED = re.compile(
    r"Resource_List\.(prologue|nodes|nodect|neednodes|p?v?mem|procs|ncpus|naccesspolicy)"
    r"|Shell_Path_List|submit_args|job_arguments"
)
"""Attributes that a guest job has of its own."""
NODES = "cannot locate feasible nodes"
"""Refusal of what guests need more than this site has."""


def vectors() -> Iterator[tuple[str, Row]]:
    """The rows of guest jobs that are submitted, each vector once."""
    seen = set()
    for name, row in ROWS:
        if row.spec is not None and row.argv is not None and not row.spec.get("interactive") and not row.qsub[2]:
            if tuple(row.argv) not in seen:
                yield name, row
            seen.add(tuple(row.argv))


def for_guests(words: list[str]) -> Iterator[tuple[str, str]]:
    """What stands at the end of a vector for the guests, `-l NAME=VALUE` each; not what the user asked for."""
    while words[-2:-1] == ["-l"] and re.fullmatch(r"nodes=[^,]+|p?v?mem=[0-9]+mb|naccesspolicy=[a-z]+", words[-1]):
        name, _, value = words[-1].partition("=")
        yield name, value
        words = words[:-2]


def refused_anyway(torque: Torque, account: Account, row: Row) -> int:
    """The status with which qsub refuses what the user asks for when no guest is in it."""
    return int(submitted_plain(torque, account, row)["status"])


def submitted_plain(torque: Torque, account: Account, row: Row) -> dict[str, Any]:
    """What comes of the row, without its requests to guests, when qsub alone reads it."""
    without = [re.sub(rb"-vm \S+", b"", text or b"").replace(b"\r\n", b"\n") for text in (row.script, row.stdin)]
    line = plain(row._replace(script=without[0], stdin=without[1]))
    assert line is not None
    account.write("job.sh", line.script)
    for name, data in line.files:
        account.write(name, data)
    return run(torque, account, torque.qsub, line)


def expanded(torque: Torque, account: Account, argv: list[str]) -> tuple[Path, list[str]]:
    """The job directory, with a job in it, and a vector with all paths put in."""
    folder = account.write(f"../.vtorque/0123456789abcdef/{'0' * 64}/job", b"#!/bin/sh\ntrue\n").parent
    home = str(account.home)
    known = {"DIR": str(folder), "PREFIX": str(torque.prefix), "<home>": home, "<work>": f"{home}/work"}
    for word, value in known.items():
        argv = [text.replace(word, value) for text in argv]
    return folder, argv


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in vectors()])
def test_arguments_of_a_guest_job(torque: Torque, account: Account, row: Row) -> None:
    assert row.argv is not None
    folder = account.write(f"../.vtorque/0123456789abcdef/{'0' * 64}/job", b"#!/bin/sh\ntrue\n").parent
    known = {
        "DIR": str(folder),
        "PREFIX": str(torque.prefix),
        "<home>": str(account.home),
        "<work>": f"{account.home}/work",
    }
    words = list(row.argv)
    for word, value in known.items():
        words = [text.replace(word, value) for text in words]
    done = torque.submit(torque.qsub, ["-h", *words])
    if done.status != 0:
        if NODES in done.err:
            pytest.skip("the site has no such nodes")
        assert refused_anyway(torque, account, row) == done.status, done.err
        return
    assert (done.status, done.err) == (0, "")
    if "-z" in words:
        return
    attributes = torque.attributes(done.out.strip())
    listed = [name for name in attributes if name.startswith("Resource_List.")]
    assert listed[0] == "Resource_List.prologue"
    assert attributes["Resource_List.prologue"] == f"{folder}/prologue"
    assert attributes["Shell_Path_List"] == f"{torque.prefix}/libexec/vtorque-job"
    names = [words[index + 1] for index, word in enumerate(words) if word == "-N"]
    assert attributes["Job_Name"] == (names[-1] or "none")
    for name, value in dict(reversed([*for_guests(words[:-1])])).items():
        assert attributes[f"Resource_List.{name}"] == value
    assert ("interactive" in attributes) is False


READ_BY_QSUB = [(name, row) for name, row in vectors() if (row.script + (row.stdin or b"")).strip() not in (b"", b"\0")]
"""A job with an empty script is none to TORQUE, though it gives it an id."""


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in READ_BY_QSUB])
def test_all_else_is_as_in_a_plain_job(torque: Torque, account: Account, row: Row) -> None:
    assert row.argv is not None
    job = submitted_plain(torque, account, row)
    _, words = expanded(torque, account, row.argv)
    guest = described(torque, torque.submit(torque.qsub, ["-h", *words], env=dict(row.env)))
    if job["status"] != 0 or guest["status"] != 0:
        pytest.skip("qsub refuses it; see test_arguments_of_a_guest_job")
    assert unchanged(guest) == unchanged(job)


def unchanged(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if not CHANGED.fullmatch(name)}


WHOLE = [
    ("job.sh", {"Resource_List.mem": "768mb", "Resource_List.naccesspolicy": "uniqueuser", "Job_Name": "job.sh"}),
    (
        "-vm vcpus=2,ram=1G -N x job.sh",
        {"Resource_List.mem": "1280mb", "Resource_List.nodes": "1:ppn=2", "Job_Name": "x"},
    ),
    ("-t 1-2 job.sh", {"job_array_request": "1-2", "Resource_List.mem": "768mb"}),
    ("-l walltime=60,mem=1gb -F x job.sh", {"Resource_List.mem": "1gb", "Resource_List.walltime": "00:01:00"}),
]


@pytest.mark.parametrize(("line", "expected"), WHOLE, ids=[row[0] for row in WHOLE])
@pytest.mark.parametrize("program", ["front", "program"])
def test_a_whole_submission(held: Torque, account: Account, program: str, line: str, expected: dict[str, str]) -> None:
    account.write("job.sh", b"#!/bin/sh\n#PBS -A account\ntrue\n")
    path: Path = getattr(held, program)
    done = held.submit(path, line.split())
    assert (done.status, done.err) == (0, "")
    job = done.out.strip()
    attributes = held.attributes(job)
    directory = Path(attributes["Resource_List.prologue"]).parent
    assert directory.parts[:-2] == (account.home / ".vtorque").parts
    assert directory.is_dir() and (directory.parent / "job_id").read_text() == f"{job}\n"
    assert {**attributes, **expected, "Account_Name": "account"} == attributes
    assert "arguments" not in attributes and "job_arguments" not in attributes


def test_a_refusal_leaves_nothing(held: Torque, account: Account) -> None:
    account.write("job.sh", b"true\n")
    before = sorted((account.home / ".vtorque").glob("*"))
    plain = held.submit(held.held_qsub, ["-q", "nowhere", "job.sh"])
    done = held.submit(held.program, ["-q", "nowhere", "job.sh"])
    assert plain.status != 0 and done == plain
    assert sorted((account.home / ".vtorque").glob("*")) == before
