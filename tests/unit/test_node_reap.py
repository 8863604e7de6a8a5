"""The janitor on a node on which everything was left that a node makes: told beforehand, taken, and counted."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nodesite import Node, make_node, note_process, short_folder, sleeper
from test_vmgr_cli import Vmgr
from test_vmgr_cli import vmgr_run as vmgr_run  # the fixture

from vmgr.metrics import store
from vmgr.node import reap as janitor
from vmgr.node import record
from vmgr.node.network import nft
from vmgr.node.network.undo import stale_links
from vmgr.node.reap import KINDS, find, reap
from vmgr.node.staging.cache import lock_name

HASHES = ["a" * 64, "b" * 64, "c" * 64]


@pytest.fixture
def node() -> Iterator[Node]:
    with short_folder() as base:
        yield make_node(base, images={"cache": {"folder": str(base / "cache")}})


def old(path: Path) -> Path:
    os.utime(path, (0, 0))
    return path


def dead_attempt(node: Node, job_id: str, *steps: dict[str, Any]) -> record.Place:
    place = node.place(job_id)
    lock, listener = record.create(place, {})
    listener.close()
    for step in steps:
        record.append(place, step)
    os.close(lock)
    return place


def test_what_an_attempt_has_left_is_named(node: Node) -> None:
    node.config.images.overlays.mkdir()
    overlay, gone = (node.config.images.overlays / name for name in ("a.qcow2", "gone.qcow2"))
    overlay.touch()
    cache = node.base / "cache"
    cache.mkdir()
    copy = cache / f".{HASHES[0]}.tmp"
    copy.touch()
    group = node.base / "job" / "vtorque"
    group.mkdir(parents=True)
    place = dead_attempt(
        node, "12.host",
        {"do": "overlay", "path": str(overlay)}, {"do": "overlay", "path": str(gone)}, {"do": "cpus", "cpus": [1]},
        {"do": "group", "path": str(group), "root": str(node.base), "lock": str(node.base)},
        {"do": "filling", "path": str(copy), "lock": str(node.config.paths.run / "x.lock")}, {"do": "ramdisk"},
        {"do": "process", "role": "qemu", "boot": "another", "pid": 1, "start": 1}, {"do": "overlay"}, {"do": 7},
    )  # fmt: skip
    guest = sleeper()
    note_process(place, guest.pid, "qemu")
    (thing,) = find(node.config)[0]
    assert thing.line == f"attempt 12.host {place.attempt}"
    assert thing.holds == (
        f"socket {place.socket}", f"overlay {overlay}", f"group {group}", f"copy {copy}", f"process {guest.pid} (qemu)",
    )  # fmt: skip
    failures = thing.remove()
    assert guest.wait() == -9 and not overlay.exists() and not copy.exists() and not group.parent.exists()
    assert [failure.partition(":")[0] for failure in failures] == ["overlay"], "the step that is none"


def test_what_is_the_users_is_named_unseen() -> None:
    steps = [{"do": kind, "path": f"/home/carol/{kind}"} for kind in ("workspace", "shared", "partial")]
    assert list(janitor._holds(steps, ())) == [
        "workspace /home/carol/workspace", "workspace /home/carol/shared", "file /home/carol/partial",
    ]  # fmt: skip


def everything(node: Node) -> dict[str, Path]:
    """One of each thing that files show, under the name that the janitor has for it."""
    overlays, (spool, run) = node.config.images.overlays, node.config.paths
    cache = node.base / "cache"
    left = {
        "overlay": overlays / "stray.qcow2",
        "socket": run / "jobs" / "14.host" / "1.sock",
        "tombstone": run / "tombstones" / "old",
        "word": spool / "ended" / ".half.77",
        "copy": cache / f".{HASHES[1]}.tmp",
    }
    for path in left.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    left["half"] = spool / "jobs" / "15.host" / ".1"
    (left["half"] / "more").mkdir(parents=True)
    left["empty"] = run / "jobs" / "16.host"
    left["empty too"] = spool / "jobs" / "17.host"
    for name in ("empty", "empty too"):
        left[name].mkdir()
    for name in ("tombstone", "word", "half", "empty", "empty too"):
        old(left[name])
    return left


def test_a_dry_run_says_what_the_run_does(node: Node) -> None:
    left = everything(node)
    dead_attempt(node, "12.host")
    said = reap(node.config, dry_run=True)
    assert all(path.exists() for path in left.values())
    assert set(map(str, left.values())) <= set(said) and len(said) == len(left) + 1
    assert reap(node.config) == said
    assert not any(path.exists() for path in left.values()) and reap(node.config) == []
    assert not left["half"].parent.exists() and not left["socket"].parent.exists()


def test_it_is_counted(node: Node) -> None:
    everything(node)
    dead_attempt(node, "12.host")
    reap(node.config, dry_run=True)
    assert store.read(node.config.paths).reaped == {}
    reap(node.config)
    counts = {"attempt": 1, "overlay": 1, "socket": 1, "mark": 2, "folder": 3, "copy": 1}
    assert store.read(node.config.paths).reaped == counts and set(counts) < set(KINDS)


def test_what_somebody_is_at_stays(node: Node) -> None:
    """A copy under its lock, what an attempt that lives has named, and what is young."""
    cache, (spool, run) = node.base / "cache", node.config.paths
    place = node.place("13.host")
    lock, listener = record.create(place, {})
    listener.close()
    named, copied, whole = node.config.images.overlays / "b.qcow2", cache / f".{HASHES[0]}.tmp", cache / HASHES[2]
    foreign = [cache / "notes.tmp", cache / f".{HASHES[1]}.tmp.x", node.config.images.overlays / "README"]
    for path in (named, copied, whole, *foreign):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    record.append(place, {"do": "overlay", "path": str(named)})
    young = [spool / "jobs" / "18.host" / ".1", run / "jobs" / "19.host"]
    for path in young:
        path.mkdir(parents=True)
    filling = os.open(run / f"{lock_name(HASHES[0])}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(filling, fcntl.LOCK_EX)
    assert reap(node.config) == [] == reap(node.config, dry_run=True)
    assert all(path.exists() for path in (named, copied, whole, *foreign, *young))
    os.close(filling)
    assert reap(node.config) == [str(copied)], "once its filler has gone"
    os.close(lock)


def test_a_folder_into_which_an_attempt_has_come_meanwhile_stays(node: Node) -> None:
    empty = node.config.paths.spool / "jobs" / "16.host"
    empty.mkdir(parents=True)
    old(empty)
    (thing,) = find(node.config)[0]
    lock, listener = record.create(node.place("16.host"), {})
    listener.close()
    assert thing.remove() == [] and empty.exists()
    os.close(lock)


def test_what_cannot_be_removed_is_left_and_not_counted(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    everything(node)

    def refuse(path: object) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(janitor.shutil, "rmtree", refuse)
    half = node.config.paths.spool / "jobs" / "15.host" / ".1"
    assert f"left: {half}: Input/output error" in reap(node.config)
    assert half.exists() and store.read(node.config.paths).reaped["folder"] == 2


def test_links_that_no_record_names() -> None:
    step = {
        "do": "network", "mark": "of-1", "vni": 1, "subnet": None, "macs": [], "addresses": [], "pair": None,
        "tables": [], "links": ["vt1-1"],
    }  # fmt: skip
    links = [("vt1-1", "of-1"), ("vt1-1", "of-2"), ("vt2-1", "of-1")]
    assert stale_links(links, [step, {"do": "cpus"}]) == links[1:]
    assert stale_links(links, []) == links


def test_marks_tell_spools_apart(node: Node) -> None:
    place = node.place()
    assert nft.mark_of(place).startswith(nft.mark_of_spool(node.config.paths.spool))
    assert not nft.mark_of(place).startswith(nft.mark_of_spool(node.config.paths.run))


@pytest.mark.script_launch_mode("inprocess")
def test_the_command(vmgr_run: Vmgr, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        monkeypatch.setattr("vmgr.commands.nodes.os.geteuid", lambda: 0)
        monkeypatch.setattr("vmgr.node.network.undo.tables_of", lambda spool: [])  # only root may ask
        monkeypatch.setattr("vmgr.config.check_trusted", lambda path: None)
    everything(vmgr_run.node)
    dead_attempt(vmgr_run.node, "12.host")
    dry = json.loads(vmgr_run("node", "reap", "--dry-run", "--json").stdout)
    assert dry.pop("dry_run") is True and {thing["kind"] for thing in dry["things"]} >= {"attempt", "overlay", "mark"}
    lines = vmgr_run("node", "reap", "--dry-run").stdout
    assert vmgr_run("node", "reap").stdout == lines and lines.count("\n") == len(dry["things"]) + 1
    assert json.loads(vmgr_run("node", "reap", "--json").stdout) == {"dry_run": False, "things": [], "left": []}


def test_janitors_at_once(node: Node) -> None:
    """Several at the same time: nothing fails, everything is gone, each thing is counted at least once."""
    said: list[list[str]] = []
    for turn in range(1, 6):
        everything(node)
        threads = [threading.Thread(target=lambda: said.append(reap(node.config))) for _ in range(4)]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(said) == 4 * turn and not [line for lines in said for line in lines if line.startswith("left")]
        assert time.monotonic() - begun < 20 and reap(node.config) == []
