"""Advice of numad: what is made of its answer, of none, and of one that is no answer."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.topology import numad
from vmgr.topology.cpulist import show_cpus
from vmgr.topology.numad import advise, parse_advice


@pytest.mark.parametrize(
    ("said", "nodes"),
    [
        (b"0\n", {0}),
        (b"0-1,3\n", {0, 1, 3}),
        (b"2", {2}),
        (b"\n", None),
        (b"", None),
        (b"all\n", None),
        (b"3-1\n", None),
        (b"0\n1\n", None),
        (b"0 " + b" " * 5000, None),
        (b"\xff\n", None),
        ("²\n".encode(), None),
        (b"99999\n", None),
    ],
)
def test_its_answer(said: bytes, nodes: Optional[set[int]]) -> None:
    assert parse_advice(said) == nodes


@FUZZ
@given(st.binary(max_size=60) | st.text("0123456789,- \n\0", max_size=40).map(str.encode))
def test_any_answer_gives_nodes_or_none(said: bytes) -> None:
    nodes = parse_advice(said)
    assert nodes is None or (nodes and parse_advice(show_cpus(nodes).encode() + b"\n") == nodes)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a numad of the test's own goes."""
    monkeypatch.setattr(numad, "PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "numad"


def install(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def ask(timeout_s: float = 20, vcpus: int = 4, ram_mib: int = 2048) -> Optional[frozenset[int]]:
    return asyncio.run(advise(vcpus, ram_mib, timeout_s=timeout_s))


def test_it_is_asked_for_vcpus_and_memory(program: Path) -> None:
    install(program, f'echo "$# $*" >{program}.args; echo 1-2')
    assert numad.is_installed() and ask() == {1, 2}
    assert Path(f"{program}.args").read_text() == "2 -w 4:2048\n"
    assert ask(vcpus=1 << 40, ram_mib=1 << 40) == {1, 2}
    assert Path(f"{program}.args").read_text() == "2 -w 21474835:21474835\n"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo nothing", "numad said b'nothing\\n': guests are placed without its advice"),
        ("echo 1; exit 3", "numad ended with status 3"),
        ("exec yes 1", "numad said b'1\\n1\\n1"),
    ],
)
def test_no_sense_is_no_advice(program: Path, script: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    install(program, script)
    with caplog.at_level(logging.WARNING, "vtorque"):
        assert ask() is None
    assert reason in caplog.text


def test_it_is_not_waited_for(program: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(program, f"echo $$ >{program}.pid; echo 1; exec sleep 60")
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING, "vtorque"):
        assert ask(timeout_s=0.5) is None
    assert time.monotonic() - begin < 20 and "numad has not answered in 0.5 s" in caplog.text
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path(f"{program}.pid").read_text()), 0)


def test_without_numad_there_is_no_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numad, "PATH", os.fspath(tmp_path))
    with caplog.at_level(logging.WARNING, "vtorque"):
        assert not numad.is_installed() and ask() is None
    assert "numad is not installed" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0 or not numad.is_installed(), reason="needs root and numad")
def test_the_real_one() -> None:
    nodes = ask()
    there = {int(path.name[4:]) for path in Path("/sys/devices/system/node").glob("node[0-9]*")}
    assert nodes and nodes <= there
