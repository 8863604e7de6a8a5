"""Reports: written by the agent, read back, put in order, as text and as a page; with everything hostile in them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodesite import FUZZ, TEMPLATES
from reports import BEGAN, HOSTILE, a_guest, an_attempt, failed, file_of, hostile, moment, parts_of, until

from vmgr.errors import Code, VTorqueError, printable
from vmgr.node.guestport import Stretch
from vmgr.node.process import TICKS_PER_SECOND
from vmgr.node.state import MAX_MOMENTS, Progress, Together
from vmgr.report import keep as keep_module
from vmgr.report.gather import gather
from vmgr.report.keep import keep
from vmgr.report.page import draw_page
from vmgr.report.parts import MAX_ATTEMPTS, MAX_BYTES, SUFFIX, Part, read_parts
from vmgr.report.text import axis, cells, clock, headline, label, scale
from vmgr.report.timeline import Phase, Timeline, newest, plan

BOTH = [an_attempt(), an_attempt("n2", 1)]


def timeline(*attempts: dict[str, Any], now: float = BEGAN + 60, alive: bool = False) -> Timeline:
    return plan(newest(parts_of(*attempts, alive=alive)), now)


# written by the agent


def facts() -> dict[str, Any]:
    return {"job_id": "12.host", "attempt": "1", "node": "n1", "guest": "vn1-1", "guests": ["vn1-1", "vn1-2"]}


def started(seconds_ago: float = 1.0) -> int:
    import time

    return int((time.clock_gettime(time.CLOCK_BOOTTIME) - seconds_ago) * TICKS_PER_SECOND)


def kept(log: Path, *, reader: Optional[int] = None, **learned: Any) -> list[Part]:
    """What stands in the report of an attempt that has lived its life."""

    async def live() -> None:
        progress = Progress(started(), facts())
        together = Together(progress, 2)
        told = {"user": "alice", "key": "k", "node_index": 0, "nodes": ["n1", "n2"], "first_rank": 0, **learned}
        writing = asyncio.ensure_future(keep(progress, log, os.getuid() if reader is None else reader, told))
        await asyncio.sleep(0)
        progress.stage("agent")
        progress.private.update(spec={"groups": [{"image": "micro", "vcpus": 2, "ram_mib": 512}]}, image="micro@3")
        progress.stage("spec", "staging")
        await asyncio.sleep(0)
        for n in range(1000):
            progress.doing(f"copying {n}")
            await asyncio.sleep(0)
        for guest in ("vn1-1", "vn1-2"):
            progress.reached(guest, "started")
            together.said(guest, "booted", (Stretch("uptime", 0.5, 0.0),))
        for guest in ("vn1-1", "vn1-2"):
            together.said(guest, "ready")
            together.said(guest, "times", (Stretch("uptime", 0.9, 0.0), Stretch("kernel", 0.9, 0.4)))
        progress.stage("ready", "ready")
        progress.ended_with(4)
        progress.ended_with(5)
        progress.stage("gone", "ended")
        await asyncio.wait_for(writing, 5)

    asyncio.run(live())
    return read_parts(log.with_suffix(".report.json").read_bytes())


def test_an_attempt_is_written_down(tmp_path: Path) -> None:
    (part,) = kept(tmp_path / "12.host.log")
    assert (part.job_id, part.user, part.node, part.node_index, part.nodes) == (
        "12.host",
        "alice",
        "n1",
        0,
        ("n1", "n2"),
    )
    assert (part.image, part.vcpus, part.ram_mib, part.job_status, part.state) == ("micro@3", 2, 512, 4, "ended")
    assert [stage.name for stage in part.stages] == ["agent", "spec", "booted", "ready", "gone"] and part.is_over
    first, second = part.guests
    assert (first.name, first.rank, second.rank) == ("vn1-1", 0, 1)
    names = ["started", "booted", "uptime", "ready", "uptime", "kernel"]
    assert [each.name for each in first.moments] == names, "`ready` of one guest is no stage of its node"
    kernel = first.moments[-1]
    assert kernel.start is not None and kernel.t - kernel.start == pytest.approx(0.5, abs=0.002)


def test_what_comes_together_is_written_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = keep_module.write

    def count(path: Path, reader: int, attempts: list[Any]) -> None:
        written.append(len(attempts[-1]["stages"]))
        write(path, reader, attempts)

    monkeypatch.setattr(keep_module, "write", count)

    async def live() -> None:
        progress = Progress(started(), facts())
        writing = asyncio.ensure_future(keep(progress, tmp_path / "12.host.log", os.getuid(), {"user": "alice"}))
        for n in range(50):
            progress.stage(f"stage {n}")
            await asyncio.sleep(0.001)
        while not written:
            await asyncio.sleep(0.01)
        progress.stage("last")
        await asyncio.sleep(0)
        progress.stage("gone", "ended")
        began = asyncio.get_running_loop().time()
        await asyncio.wait_for(writing, 5)
        assert asyncio.get_running_loop().time() - began < keep_module.SETTLE_SECONDS, "the end is not put off"

    asyncio.run(live())
    assert written == [50, 52]


def test_a_failure_is_written_at_once(tmp_path: Path) -> None:
    async def live() -> None:
        progress = Progress(started(), facts())
        log = tmp_path / "12.host.log"
        writing = asyncio.ensure_future(keep(progress, log, os.getuid(), {"user": "alice"}))
        progress.stage("agent")
        await asyncio.sleep(keep_module.SETTLE_SECONDS / 10)
        progress.fail(VTorqueError("it broke", code=Code.GUEST))
        for _ in range(10):
            await asyncio.sleep(0)
        (part,) = read_parts(log.with_suffix(SUFFIX).read_bytes())
        assert (part.state, part.code) == ("failed", "VT-GUEST")
        progress.stage("gone")
        await asyncio.wait_for(writing, 5)

    asyncio.run(live())


def test_attempts_of_a_job_are_kept_and_not_too_many(tmp_path: Path) -> None:
    for _ in range(MAX_ATTEMPTS + 3):
        parts = kept(tmp_path / "12.host.log")
    assert len(parts) == MAX_ATTEMPTS and [path.name for path in tmp_path.iterdir()] == ["12.host.report.json"]


def test_another_users_job_of_the_same_id_starts_anew(tmp_path: Path) -> None:
    kept(tmp_path / "12.host.log", reader=4711)
    assert len(kept(tmp_path / "12.host.log", reader=4712)) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"attempts":[{}]}', "[" * 99999, '{"attempts":7}', "\xff"])
def test_what_is_no_report_is_written_over(text: str, tmp_path: Path) -> None:
    (tmp_path / "12.host.report.json").write_text(text)
    assert len(kept(tmp_path / "12.host.log")) == 1


def test_a_report_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        kept(tmp_path / "absent" / "12.host.log")
    assert not (tmp_path / "absent").exists(), "the attempt has lived to its end all the same"


def test_a_report_that_is_too_large_loses_its_oldest_attempts(tmp_path: Path) -> None:
    large = [an_attempt(reason="x" * (MAX_BYTES // 3), attempt=str(n)) for n in range(5)]
    keep_module.write(tmp_path / "r", os.getuid(), large)
    data = (tmp_path / "r").read_bytes()
    assert len(data) <= MAX_BYTES
    assert [attempt["attempt"] for attempt in json.loads(data)["attempts"]] == ["3", "4"]


def test_a_guest_says_no_end_of_things() -> None:
    async def work() -> None:
        progress = Progress(0, facts())
        for n in range(1000):
            progress.reached("vn1-1", f"x{n}", (Stretch("a", 1, 0),) * 16)
        assert len(progress.guests["vn1-1"]) == MAX_MOMENTS
        for status in (None, True, -1, 256, "0", 1.0):
            progress.ended_with(status)
            assert progress.job_status is None

    asyncio.run(work())


# read back


def test_what_is_written_is_read() -> None:
    lead, sister = parts_of(*BOTH)
    assert (lead.node, sister.node, sister.node_index, lead.job_status) == ("n1", "n2", 1, 0)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@FUZZ
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_report_or_none(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_parts(data)


@FUZZ
@given(key=st.sampled_from(sorted(an_attempt())), value=_JSON, deep=st.booleans())
def test_any_value_anywhere_is_read_or_refused(key: str, value: Any, deep: bool) -> None:
    attempt = an_attempt()
    if deep:
        guest = attempt["guests"][0]
        guest["moments"] = [{**each, **dict.fromkeys(list(each)[:1], value)} for each in guest["moments"]]
    else:
        attempt[key] = value
    try:
        (part,) = read_parts(json.dumps({"v": 1, "attempts": [attempt]}).encode())
    except ValueError as err:
        assert str(err)
        return
    draw_page([part], plan([part], BEGAN), {}, TEMPLATES)


@pytest.mark.parametrize(
    "text", ['{"v":2,"attempts":[]}', "[" * 99999, '{"v":1,"attempts":{}}', '{"v":1,"attempts":[7]}']
)
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        read_parts(text.encode())


# put in order


def test_the_phases_of_nodes_and_guests() -> None:
    rows = timeline(*BOTH).rows
    assert [(row.name, row.rank) for row in rows] == [
        ("n1", None), ("vn1-1", 0), ("vn1-2", 1), ("n2", None), ("vn2-1", 2), ("vn2-2", 3),
    ]  # fmt: skip
    assert [bar.phase.name for bar in rows[0].bars] == ["PREPARE", "STAGE", "LAUNCH", "END"]
    guest = rows[1]
    assert [(bar.phase.name, round(bar.start, 2), round(bar.end, 2)) for bar in guest.bars] == [
        ("FIRMWARE", 0.61, 0.95), ("KERNEL", 0.95, 2.7), ("SYSTEM", 2.7, 4.9), ("SETUP", 4.9, 6.3), ("WAIT", 6.3, 7.9),
        ("JOB", 7.9, 20.9), ("END", 20.9, 22.4),
    ]  # fmt: skip
    assert [detail.name for detail in guest.details] == ["cloud-init init-local", "cloud-init init"]
    sister = {bar.phase: bar for bar in rows[4].bars}
    assert sister[Phase.JOB].start == pytest.approx(7.9), "the job is the mother superior's, by the clock"
    assert sister[Phase.KERNEL].start == pytest.approx(0.99), "and the rest its own"


def test_without_the_guests_word_the_kernel_is_all_until_its_program() -> None:
    guest = a_guest("vn1-1", 0)
    guest["moments"] = [each for each in guest["moments"] if "start" not in each]
    (_, row) = timeline(an_attempt(guests=[guest])).rows
    assert [bar.phase.name for bar in row.bars] == ["KERNEL", "SETUP", "WAIT", "JOB", "END"]


def test_a_guest_that_was_suspended_boots_nothing() -> None:
    guest = a_guest("vn1-1", 0)
    kept = [each for each in guest["moments"] if each["name"] in ("launched", "started")]
    guest["moments"] = [*kept, {"name": "resumed", "t": 1.5}]
    (_, row) = timeline(an_attempt(guests=[guest])).rows
    assert [bar.phase.name for bar in row.bars] == ["SETUP", "WAIT", "JOB", "END"]
    assert round(row.bars[1].start, 2) == 1.5


def test_what_goes_on_ends_now() -> None:
    rows = timeline(until(an_attempt(), 10.0, state="running"), now=BEGAN + 11, alive=True).rows
    assert rows[1].bars[-1].phase is Phase.JOB and rows[1].bars[-1].open
    assert rows[1].bars[-1].end == pytest.approx(11) and not rows[0].bars[-1].open


def test_what_nobody_heard_the_end_of_ends_with_what_was_heard() -> None:
    cut = until(an_attempt(), 10.0, state="running")
    rows = timeline(cut, now=BEGAN + 1e6).rows
    assert rows[1].bars[-1].phase is Phase.JOB and not rows[1].bars[-1].open
    assert max(bar.end for row in rows for bar in row.bars) == pytest.approx(7.9)
    assert headline(parts_of(cut))[1].endswith("running when its agent was last heard")
    assert headline(parts_of(cut, alive=True))[1].endswith(", running")


def test_a_failure_ends_what_went_on() -> None:
    rows = timeline(*failed()).rows
    assert rows[0].failed == pytest.approx(12.1) and rows[3].failed == pytest.approx(12.04)
    assert [bar.phase.name for bar in rows[4].bars] == ["KERNEL", "END"]
    assert rows[4].bars[0].end == pytest.approx(12.04)


def test_the_newest_attempt_counts() -> None:
    old, new = an_attempt(key="a"), an_attempt(key="b", began=BEGAN + 100)
    sister = an_attempt("n2", 1, key="b", began=BEGAN + 99)
    stale = an_attempt("n3", 2, key="a", began=BEGAN + 1)
    found = newest(parts_of(old, stale, sister, new))
    assert [(part.node, part.key) for part in found] == [("n1", "b"), ("n2", "b")] and newest([]) == []


_TIMES = st.floats(-1e9, 1e9) | st.floats(0, 30)


@FUZZ
@given(
    moments=st.lists(
        st.tuples(st.sampled_from(["started", "booted", "ready", "kernel", "uptime", "x"]), _TIMES, _TIMES)
    ),
    stages=st.lists(
        st.tuples(st.sampled_from(["spec", "staged", "job started", "job ended", "failed", "gone"]), _TIMES)
    ),
)
def test_whatever_is_said_stays_in_the_picture(moments: list[tuple[str, float, float]], stages: list[Any]) -> None:
    guest = {"name": "v", "rank": 0, "moments": [moment(name, t, start) for name, t, start in moments]}
    guest["moments"] += [moment(name, t) for name, t, _ in moments]
    found = timeline(an_attempt(guests=[guest], stages=[moment(name, t) for name, t in stages]))
    assert found.seconds > 0
    for row in found.rows:
        for bar in row.bars:
            assert 0 <= bar.start <= bar.end <= found.seconds
        assert all(before.end <= after.start for before, after in zip(row.bars, row.bars[1:]))
        assert all(detail.start >= 0 and detail.end <= found.seconds for detail in row.details)


# as text


def test_the_bars_as_letters() -> None:
    found = timeline(*BOTH)
    lines = ["".join(cell.text for cell in cells(row, found, 60)) for row in found.rows]
    assert all(len(line) == 60 for line in lines)
    assert re.fullmatch(r" +f+k+y+u+w+J+e+ *", lines[1]) and lines[1].count("J") == pytest.approx(60 * 13 / 22.4, abs=1)
    assert re.fullmatch(r"p?s?l+ +e+ *", lines[0])
    assert axis(found, 60).startswith("|0 s") and "|10 s" in axis(found, 60)
    assert "!" in "".join(cell.text for cell in cells(timeline(*failed()).rows[0], timeline(*failed()), 60))


def test_the_headline() -> None:
    assert headline(parts_of(*BOTH))[0] == "job 12.host of alice: 4 guests of debian-12@3 (2 vCPUs, 1024 MiB)"
    assert headline(parts_of(*BOTH))[1].endswith("ended with status 0")
    assert headline(newest(parts_of(*failed())))[-1] == "n2: VT-BOOT: the guest vn2-1 was not ready"
    assert all(line.isprintable() for line in headline(parts_of(*hostile())))
    assert all(label(row).isprintable() and len(label(row)) < 60 for row in timeline(*hostile()).rows)


@given(seconds=st.floats(0.001, 1e9), room=st.integers(2, 40))
def test_an_axis_has_few_and_round_marks(seconds: float, room: int) -> None:
    marks = scale(seconds, room)
    assert marks[0] == 0 and len(marks) <= room + 1 and marks[-1] <= seconds * 1.000001
    assert all(before < after for before, after in zip(marks, marks[1:]))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (0.05, "0.05 s"), (59, "59 s"), (90, "1:30"), (3661, "1:01:01")]
)
def test_seconds_at_a_mark(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# as a page


class Read(HTMLParser):
    """What a page is made of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(*attempts: dict[str, Any], missing: Optional[dict[str, str]] = None) -> str:
    parts = newest(parts_of(*attempts))
    return draw_page(parts, plan(parts, BEGAN + 60), missing or {}, TEMPLATES)


KNOWN = {"uptime", "kernel", "started", *(stage["name"] for stage in an_attempt()["stages"])}
"""What the timeline goes by."""


def tame(attempts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with a plain letter for every text."""

    def calm(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: calm(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [calm(inner, key) for inner in value]
        known = key == "name" and value in [stage["name"] for stage in an_attempt()["stages"]] + [
            "uptime",
            "kernel",
            "started",
        ]
        return "x" if isinstance(value, str) and key not in ("key", "attempt") and not known else value

    calmed: list[dict[str, Any]] = calm(list(attempts))
    return calmed


def test_a_page_is_complete_and_needs_nothing_from_elsewhere() -> None:
    page = page_of(*BOTH, missing={"n3": "node n3 refuses the login"})
    read = Read(page)
    policy = next(value for tag, name, value in read.attributes if tag == "meta" and value.startswith("default-src"))
    style = page.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert not read.tags.keys() & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "a",
        "use",
        "foreignobject",
    }
    assert not [name for _, name, _ in read.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert "http" not in page.replace("http-equiv", "") and "@import" not in page and "url(" not in style
    for word in ("Job 12.host", "ended with status 0", "debian-12@3", "vn2-2", "node n3 refuses the login", "13.00"):
        assert word in read.text
    assert [value for tag, name, value in read.attributes if tag == "rect" and name == "class"].count("job") == 5


def test_hostile_names_are_text() -> None:
    read, plain = Read(page_of(*hostile())), Read(page_of(*tame(hostile())))
    assert read.tags == plain.tags and len(read.attributes) == len(plain.attributes)
    for name in HOSTILE:
        assert printable(name)[:20] in read.text


@settings(FUZZ, max_examples=15)
@given(texts=st.lists(st.text(min_size=1) | st.sampled_from(HOSTILE), min_size=6, max_size=6))
def test_any_names_are_text(texts: list[str]) -> None:
    node, user, image, job, reason, guest = texts
    attempt = an_attempt(
        node=node, user=user, image=image, job_id=job, code="VT-BOOT", reason=reason, guests=[a_guest(guest, 0)]
    )
    read, plain = Read(page_of(attempt)), Read(page_of(*tame([attempt])))
    assert read.tags == plain.tags and len(read.attributes) == len(plain.attributes)


# gathered


class Answer(NamedTuple):
    status: int
    out: bytes
    err: bytes


def test_what_nodes_say_is_gathered_and_who_says_nothing_is_named() -> None:
    def run(node: str, argv: Sequence[str], *, timeout_s: float) -> Answer:
        assert list(argv[1:]) == ["report", "--part", "12.host"] and timeout_s == 7
        if node == "n2":
            return Answer(0, b"Welcome to n2 {}\n" + file_of(an_attempt("n2", 1)), b"")
        if node == "n3":
            return Answer(2, b"", b"motd\nVT-ACCESS: the report of job 12.host is another user's\n")
        if node == "n4":
            return Answer(0, b"x" * (MAX_BYTES + 100), b"")
        if node == "n5":
            return Answer(127, b"", b"bash: vmgr: command not found\n")
        raise VTorqueError("node n6 cannot be reached", code=Code.CONNECT)

    found = gather("12.host", ["n2", "n3", "n4", "n5", "n6"], run, timeout_s=7)
    assert [part.node for part in found.parts] == ["n2"]
    assert found.missing["n3"] == "the report of job 12.host is another user's" and "larger" in found.missing["n4"]
    assert "command not found" in found.missing["n5"] and found.missing["n6"] == "node n6 cannot be reached"


def test_a_node_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    over = threading.Event()

    def run(node: str, argv: Sequence[str], *, timeout_s: float) -> Answer:
        over.wait(20)
        return Answer(1, b"", b"")

    try:
        found = gather("12.host", ["n2"], run, timeout_s=0.05)
    finally:
        over.set()
    assert found.missing == {"n2": "it was not heard in time"}
