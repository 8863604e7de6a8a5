"""The nodes of a job, from the batch system's own files: read as they are, awaited, and refused when they are none."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Optional
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.errors import Code, VTorqueError
from vmgr.node import allocation, folders
from vmgr.node.allocation import (
    Allocation,
    TaskFile,
    find,
    guest_name,
    over,
    parse_exec_host,
    parse_node_file,
    parse_slots,
    parse_task_file,
)

COOKIE = "0A1B2C3D4E5F60718293A4B5C6D7E8F9"
PATIENCE_S = 10.0

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the batch system's files are root's")


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, PATIENCE_S))


def task_file(hosts: str = "n1/0-1+n2/0-1", cookie: str = COOKIE, name: str = "job.sh") -> str:
    return (
        f'<?xml version="1.0"?>\n<job>\n<attributes>\n<Job_Name>{escape(name)}</Job_Name>\n'
        f"<exec_host>{hosts}</exec_host>\n<cookie>{cookie}</cookie>\n</attributes>\n</job>\n"
    )


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("n1/0", ("n1",)),
        ("n1/0-3+n2/0-3", ("n1", "n2")),
        ("n2/0+n2/1+n1.cluster/0+n1.cluster/1\n", ("n2", "n1.cluster")),
        ("", None), ("+", None), ("n1/0+", None), ("../x/0", None), ("n1 n2/0", None), ("-n/0", None), ("n.-/0", None),
    ],
)  # fmt: skip
def test_exec_host(text: str, nodes: Optional[tuple[str, ...]]) -> None:
    assert parse_exec_host(text) == nodes


def test_a_task_file() -> None:
    assert parse_task_file(task_file().encode()) == TaskFile(("n1", "n2"), COOKIE.lower(), "n1/0-1+n2/0-1")
    assert parse_task_file(task_file(name="</Job_Name><exec_host>evil/0</exec_host>").encode()) is not None
    whole = task_file().encode()
    for end in range(whole.index(b"</cookie>") + 8):
        assert parse_task_file(whole[:end]) is None, "cut off while it was written"
    assert parse_task_file((task_file() + task_file("n3/0")).encode()) is None
    assert parse_task_file(task_file(cookie="").encode()) is None


@FUZZ
@given(st.binary(max_size=300))
def test_whatever_stands_in_a_task_file(data: bytes) -> None:
    found = parse_task_file(b"<exec_host>" + data + b"</exec_host><cookie>" + COOKIE.encode() + b"</cookie>")
    assert found is None or (found.nodes and all("/" not in node and " " not in node for node in found.nodes))


def test_a_node_file() -> None:
    assert parse_node_file(b"n1\nn1\nn2\nn2\n") == ("n1", "n2")
    assert parse_node_file(b"") is None and parse_node_file(b"n1\n/etc\n") is None


def test_a_job_of_one_node(tmp_path: Path) -> None:
    nodes = tmp_path / "12.host"
    nodes.write_text("n1.cluster\nn1.cluster\n")
    found = run(find(None, str(nodes), 0, "attempt", timeout_s=1))
    assert found == Allocation(("n1.cluster",), 0, "attempt") and found.name == "n1"
    assert guest_name(found.nodes[0], 2) == "vn1-2"


def test_a_job_of_several_nodes_waits_for_its_file(tmp_path: Path) -> None:
    path = tmp_path / "12.host.JB"

    async def work() -> Allocation:
        waiting = asyncio.ensure_future(find(str(path), None, 1, "attempt", timeout_s=PATIENCE_S))
        await asyncio.sleep(0.05)
        path.write_text(task_file()[:80])
        await asyncio.sleep(0.05)
        assert not waiting.done()
        path.write_text(task_file())
        return await waiting

    assert run(work()) == Allocation(("n1", "n2"), 1, COOKIE[:16].lower(), frozenset((0, 1)))


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("n1/0", {0}),
        ("n1/0-3,6+n2/0-1", {0, 1, 2, 3, 6}),
        ("n2/7+n1/0+n1/2+n10/9", {0, 2}),
        ("n2/0", set()), ("n1", set()), ("n1/", set()), ("n1/x+n1/1", {1}), ("n1/0-99999999", set()), ("", set()),
    ],
)  # fmt: skip
def test_the_slots_of_a_node(text: str, slots: set[int]) -> None:
    assert parse_slots(text, "n1") == slots


def test_what_is_refused(tmp_path: Path) -> None:
    path, nodes = tmp_path / "12.host.JB", tmp_path / "12.host"
    path.write_text(task_file())
    nodes.write_text("?\n")
    for arguments, said in (
        ((str(path), None, 2, "a"), "names 2 nodes, and this would be number 2"),
        ((None, None, 1, "a"), "names no file about the nodes"),
        ((str(path), str(nodes), 0, "a"), "names no nodes"),
        ((str(tmp_path / "absent.JB"), None, 1, "a"), "does not tell the nodes of the job within 0.1 s"),
    ):
        with pytest.raises(VTorqueError, match=said) as caught:
            run(find(*arguments, timeout_s=0.1))
        assert caught.value.code is Code.NODE
    path.write_text(task_file("n1.a/0+n1.b/0"))
    with pytest.raises(VTorqueError, match="two nodes of the job are called n1 up to the first dot"):
        run(find(str(path), None, 1, "a", timeout_s=1))
    path.write_text(task_file())
    os.chown(path, 65534, 65534)
    with pytest.raises(VTorqueError, match="does not tell"):
        run(find(str(path), None, 1, "a", timeout_s=0.1))


@pytest.mark.parametrize("events", [True, False])
def test_an_attempt_is_over_when_its_file_goes_or_changes(
    tmp_path: Path, events: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, key = tmp_path / "12.host.JB", COOKIE[:16].lower()
    if not events:
        monkeypatch.setattr(allocation, "LOOK_AGAIN_SECONDS", 0.05)
        monkeypatch.setattr(folders, "_watch", lambda *_: None)

    async def work() -> None:
        for change in (path.unlink, lambda: path.write_text(task_file(cookie="F" * 32))):
            path.write_text(task_file())
            waiting = asyncio.ensure_future(over(str(path), key))
            await asyncio.sleep(0.1)
            path.write_text(task_file(name="touched"))  # TORQUE writes it again and again
            await asyncio.sleep(0.1)
            assert not waiting.done()
            change()
            await waiting

    run(work())
