"""What a node counts: events and their sums, and a store that loses nothing when a writer or a reader is killed."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, REPOSITORY, Node, make_node, short_folder

from vmgr.metrics import store
from vmgr.metrics.totals import BUCKETS, MAX_NAMES, OTHER, Totals, fold, from_plain

READY = {"e": "ready", "image": "micro", "guests": 2, "boot_s": 4.2, "start_s": 6.0, "hits": 2, "misses": 1}


@pytest.fixture
def node() -> Iterator[Node]:
    with short_folder() as base:
        yield make_node(base)


def test_sums() -> None:
    totals = fold(
        Totals(),
        [
            READY, {**READY, "boot_s": 700, "image": "debian-12"}, {"e": "failed", "code": "VT-BOOT"},
            {"e": "failed", "code": "VT-BOOT"}, {"e": "ended"}, {"e": "reaped", "kinds": {"overlay": 3, "attempt": 1}},
        ],
    )  # fmt: skip
    assert totals.ready == {"micro": 1, "debian-12": 1} and totals.guests == {"micro": 2, "debian-12": 2}
    assert (totals.hits, totals.misses, totals.ended) == (4, 2, 1)
    assert totals.failed == {"VT-BOOT": 2} and totals.reaped == {"overlay": 3, "attempt": 1}
    assert totals.boot["micro"][BUCKETS.index(5)] == 1 and totals.boot["micro"][-1] == 4.2
    assert totals.boot["debian-12"][len(BUCKETS)] == 1, "above all bounds"
    assert sum(totals.start["micro"][:-1]) == 1


def test_a_time_that_is_a_bound_lies_within_it() -> None:
    assert fold(Totals(), [{**READY, "boot_s": 5}]).boot["micro"][BUCKETS.index(5)] == 1


@pytest.mark.parametrize(
    "event",
    [
        None, 7, {}, {"e": "nonsense"}, {"e": "ready"}, {**READY, "boot_s": -1}, {**READY, "boot_s": float("nan")},
        {**READY, "guests": True}, {**READY, "hits": "3"}, {"e": "failed"}, {"e": "reaped", "kinds": 3},
        {"e": "reaped", "kinds": {"overlay": -1}}, {"e": ["ready"]},
    ],
)  # fmt: skip
def test_what_is_no_event_changes_nothing(event: Any) -> None:
    before = fold(Totals(), [READY])
    assert fold(before, [event]) == before


def test_what_is_told_apart_is_bounded() -> None:
    totals = fold(Totals(), ({**READY, "image": f"image{number}"} for number in range(MAX_NAMES + 20)))
    assert len(totals.ready) == MAX_NAMES + 1 and totals.ready[OTHER] == 20 == sum(totals.boot[OTHER][:-1])
    totals = fold(Totals(), [{**READY, "image": 'x"}\n evil 1'}, {"e": "failed", "code": "VT-\n"}])
    assert totals.ready == {OTHER: 1} and totals.failed == {"VT-INTERNAL": 1}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(st.dictionaries(st.sampled_from([*READY, "code", "kinds"]), _JSON | st.sampled_from(["ready", "reaped"])))
def test_no_event_breaks_the_sums(event: dict[str, Any]) -> None:
    totals = fold(Totals(), [event])
    assert from_plain(json.loads(json.dumps(totals._asdict()))) == totals


@FUZZ
@given(_JSON | st.fixed_dictionaries(dict.fromkeys(Totals._fields, _JSON)))
def test_what_is_read_are_totals_or_refused(data: Any) -> None:
    try:
        assert isinstance(from_plain(data), Totals)
    except ValueError:
        pass


def test_events_are_kept_and_read_often(node: Node) -> None:
    paths = node.config.paths
    assert store.read(paths) == Totals()
    store.note(paths, READY)
    store.note(paths, {"e": "ended"})
    assert store.read(paths).ready == {"micro": 1}
    assert store.read(paths) == store.read(paths)
    store.note(paths, READY)
    assert store.read(paths).ready == {"micro": 2} and store.read(paths).ended == 1
    assert sorted(path.name for path in store.folder(paths).iterdir()) == ["lock", "totals"]
    assert stat.S_IMODE(store.folder(paths).stat().st_mode) == 0o700


def test_a_large_journal_is_folded_by_its_writer(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = node.config.paths
    monkeypatch.setattr(store, "MAX_JOURNAL_BYTES", 2000)
    for _ in range(200):
        store.note(paths, READY)
        assert sum(path.stat().st_size for path in store.folder(paths).iterdir()) < 6000
    assert store.read(paths).ready == {"micro": 200}


class Dead(BaseException):
    """As by SIGKILL."""


@pytest.mark.parametrize("last", ["rename", "open", "replace", "unlink"])
@pytest.mark.parametrize("writers", [0, 2])
def test_after_a_fold_that_died_all_is_counted_once(node: Node, last: str, writers: int) -> None:
    """`last` is the last thing that it did to its files; events are written before the next fold, or none."""
    paths, does = node.config.paths, getattr(Path, last)

    def die(path: Path, *arguments: Any) -> Any:
        does(path, *arguments)
        raise Dead

    store.note(paths, READY)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Dead):
        patch.setattr(Path, last, die)
        store.read(paths)
    for _ in range(writers):
        store.note(paths, READY)
    assert store.read(paths).ready == {"micro": 1 + writers}
    store.note(paths, READY)
    assert store.read(paths).ready == {"micro": 2 + writers}
    assert sorted(path.name for path in store.folder(paths).iterdir()) == ["lock", "totals"]


def test_a_line_that_was_cut_off_costs_no_other(node: Node) -> None:
    paths = node.config.paths
    store.note(paths, READY)
    with (store.folder(paths) / "journal").open("ab") as stream:
        stream.write(b'{"e":"rea')
    store.note(paths, {"e": "ended"})
    totals = store.read(paths)
    assert totals.ready == {"micro": 1} and totals.ended == 1


def test_totals_that_cannot_be_read_are_begun_anew(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    paths = node.config.paths
    store.read(paths)
    for text in ("", "[" * 100_000, "{}", '{"folded": 1}'):
        (store.folder(paths) / "totals").write_text(text)
        store.note(paths, READY)
        assert store.read(paths).ready == {"micro": 1}


def test_a_store_that_cannot_be_written_stops_nobody(node: Node) -> None:
    node.config.paths.spool.mkdir()
    store.folder(node.config.paths).write_text("in the way")
    store.note(node.config.paths, READY)
    with pytest.raises(OSError, match="metrics"):
        store.read(node.config.paths)


def test_writers_and_readers_that_are_killed_lose_nothing(node: Node) -> None:
    """Events are numbered as they are acknowledged: every one that was is counted, and none twice."""
    code = f"""\
import sys; sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from vmgr.config import Paths
from vmgr.metrics import store
paths = Paths(*map(Path, sys.argv[2:4]))
while True:
    if sys.argv[1] == "read":
        store.read(paths)
    else:
        store.note(paths, {{"e": "ended"}})
        print("x", end="", flush=True)
"""
    paths = node.config.paths

    def start(what: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-I", "-c", code, what, *map(str, paths)], stdout=subprocess.PIPE)

    acknowledged = killed = 0
    for turn in range(3):
        processes = [start("write"), start("write"), start("read")]
        for writer in processes[:2]:
            assert writer.stdout is not None
            acknowledged += len(writer.stdout.read(20))
        time.sleep(0.02 * turn)
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            acknowledged += len(process.communicate()[0])
        killed += 2
    counted = store.read(paths).ended
    assert acknowledged <= counted <= acknowledged + killed, "one that was written, but not yet told of, may count"


def test_a_write_is_cheap(node: Node) -> None:
    paths = node.config.paths
    store.note(paths, READY)
    times = []
    for _ in range(50):
        begun = time.perf_counter()
        store.note(paths, READY)
        times.append(time.perf_counter() - begun)
    assert sorted(times)[len(times) // 2] < 0.005, "half of them take less than 5 ms, on a busy machine too"


def test_an_agent_needs_none_of_the_heavy_libraries() -> None:
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import vmgr.metrics.watch; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert not {"prometheus_client", "click", "yaml", "http"} & set(done.stdout.split())


def test_a_hostile_link_is_not_followed(node: Node, tmp_path: Path) -> None:
    paths = node.config.paths
    store.read(paths)
    target = tmp_path / "elsewhere"
    (store.folder(paths) / "journal").symlink_to(target)
    store.note(paths, READY)
    assert not target.exists()
