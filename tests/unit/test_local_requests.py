"""The embedded batch system's arrays, dependencies, dates and terminals, as values."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsub.engines.local import arrays, attributes, dates, depend, job, options, protocol, submission
from vsub.engines.local.arrays import Array, Range
from vsub.engines.local.depend import Outcome
from vsub.engines.local.interactive import Escapes
from vsub.engines.local.job import Phase
from vsub.engines.local.options import UsageError
from vsub.engines.local.process import Mark

# --- arrays


@pytest.mark.parametrize(
    ("text", "indices", "limit"),
    [
        ("5", (5,), None),
        ("1-4%2", (1, 2, 3, 4), 2),
        ("0,3,7-9", (0, 3, 7, 8, 9), None),
        ("7-8,2,8", (7, 8, 2), None),
        (" 1 , 2", (1, 2), None),
        ("1,,2,", (1, 2), None),
        ("99999", (99999,), None),
    ],
)
def test_ranges(text: str, indices: tuple[int, ...], limit: object) -> None:
    assert Range.parse(text) == (indices, limit)


@given(st.text(alphabet="0123456789-,% \u0663x", max_size=40))
def test_no_range_surprises(text: str) -> None:
    try:
        found = Range.parse(text)
    except ValueError:
        return
    assert found.indices and len(found.indices) == len(set(found.indices)) <= arrays.MAX_INDEX + 1
    assert min(found.indices) >= 0 and max(found.indices) <= arrays.MAX_INDEX


def made(**more: object) -> submission.Submission:
    asked = submission.Submission(
        "n", "", "batch", (("nodes", "1"),), {"A": "\udc80"}, "/", None, "/o/", "/e", "n", "n", None, 0o77, ""
    )
    return dataclasses.replace(asked, **more)  # type: ignore[arg-type]


OWNER = submission.Account("u", 5, 6, "g", (6, 7), "/h", "/bin/sh")
TERMINAL = submission.Terminal("vt100", (1, 2, 3, 4), (3, 28, 127, 21, 4, 26))


def array_of(text: str) -> Array:
    return Array.make(3, "h.org", OWNER, made(array=text), 1.5, (("afterok", "1.h.org"),))


def test_members_of_an_array() -> None:
    array = array_of("2,5%1")
    second = array.members[1]
    assert (array.id, second.id, second.array_id) == ("3[].h.org", "3[5].h.org", array.id)
    assert (second.name, second.prefix, second.output_name("o")) == ("n-5", "3-5.h.org", "n.o3-5")
    assert (second.variables["PBS_ARRAYID"], second.depends) == ("5", array.depends)
    assert job.Job("3.h.org", 3, OWNER, made(), 1.5).prefix == "3.h.org"


@pytest.mark.parametrize(
    ("statuses", "letter", "exit_status"),
    [
        ((None, None, None), "Q", None),
        ((0, None, None), "Q", None),
        ((0, 0, 0), "C", 0),
        ((4, 0, 0), "C", 4),
        ((4, 271, 0), "C", 271),
        ((0, -4, 7), "C", 7),
    ],
)
def test_an_array_is_what_its_members_are(statuses: tuple[object, ...], letter: str, exit_status: object) -> None:
    array = array_of("1-3")
    for member, status in zip(array.members, statuses):
        member.depends = ()
        if isinstance(status, int):
            member.phase, member.exit_status, member.completed = Phase.COMPLETE, status, float(member.index or 0)
            member.reason = f"because of {status}"
    assert (array.letter, array.exit_status) == (letter, exit_status)
    assert array.reason == (f"because of {exit_status}" if exit_status else "")
    array.members[2].phase = Phase.RUNNING
    assert array.letter == "R"


def test_arrays_and_members_are_stored_whole() -> None:
    array = array_of("1-3")
    assert Array.from_json(json.loads(json.dumps(array.to_json()))) == array
    member = array.members[1]
    stored = json.dumps(dataclasses.replace(member, held=True, marks=[Mark(1, 2, "b", 3)]).to_json())
    assert "variables" not in stored
    assert job.Job.from_json(json.loads(stored), member).held
    alone = job.Job(
        "4.h", 4, OWNER, made(terminal=TERMINAL, depend=(("after", "1"),)), 1.5, depends=(("after", "1.h"),)
    )
    assert job.Job.from_json(json.loads(json.dumps(alone.to_json()))) == alone


def test_records_of_an_earlier_release_are_read() -> None:
    stored = job.Job("4.h", 4, OWNER, made(), 1.5).to_json()
    for name in ("held", "depends", "index"):
        del stored[name]
    for name in ("priority", "rerunnable", "held", "execute_at", "job_type", "depend", "array", "terminal", "command"):
        del stored["asked"][name]
    assert job.Job.from_json(json.loads(json.dumps(stored))) == job.Job("4.h", 4, OWNER, made(), 1.5)


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("5[3]", "5[3].h.org"),
        ("5[]", "5[].h.org"),
        ("05[03].h", "5[3].h.org"),
        ("5[].h.org", "5[].h.org"),
        ("5[3].x", "5[3].x"),
        ("5[", None),
        ("5[x]", None),
        ("5[1][2]", None),
        ("5[-1]", None),
        ("[1]", None),
    ],
)
def test_ids_of_arrays(text: str, full: object) -> None:
    assert attributes.full_id(text, "h.org") == full


# --- dependencies


def test_dependencies() -> None:
    found = depend.parse("afterok:1:2.h.org , afterany:3[4].h,after:1,afterok:1")
    assert found == (("afterok", "1"), ("afterok", "2.h.org"), ("afterany", "3[4].h"), ("after", "1"))
    assert depend.shown(found) == "afterok:1:2.h.org,afterany:3[4].h,after:1"
    assert depend.shown(()) == ""


@pytest.mark.parametrize(
    "text", ["", "afterok", "afterok:", "afterok:x", "afterok:1,", ":1", "sometimes:1", "afterok:1@", "beforeok:1"]
)
def test_no_dependencies(text: str) -> None:
    with pytest.raises(ValueError):
        depend.parse(text)


@given(st.text(alphabet="afterokny:,0123456789[].h ", max_size=60))
def test_no_dependency_surprises(text: str) -> None:
    try:
        found = depend.parse(text)
    except ValueError:
        return
    assert found and depend.parse(depend.shown(found)) == tuple(sorted(found, key=lambda pair: _first(found, pair[0])))


def _first(found: tuple[tuple[str, str], ...], kind: str) -> int:
    return [name for name, _ in found].index(kind)


@pytest.mark.parametrize(
    ("kind", "outcomes"),
    [
        ("after", [Outcome.OPEN, Outcome.MET, Outcome.NEVER, Outcome.MET, Outcome.MET]),
        ("afterok", [Outcome.OPEN, Outcome.OPEN, Outcome.NEVER, Outcome.MET, Outcome.NEVER]),
        ("afternotok", [Outcome.OPEN, Outcome.OPEN, Outcome.MET, Outcome.NEVER, Outcome.MET]),
        ("afterany", [Outcome.OPEN, Outcome.OPEN, Outcome.MET, Outcome.MET, Outcome.MET]),
    ],
)
def test_outcomes(kind: str, outcomes: list[Outcome]) -> None:
    """Of a job that is queued, runs, was deleted before its start, ended well, ended badly."""
    stages = [(False, None), (True, None), (False, 271), (True, 0), (True, 3)]
    assert [depend.outcome(kind, started=started, exit_status=status) for started, status in stages] == outcomes


# --- dates

NOW = time.struct_time((2026, 12, 20, 15, 30, 10, 6, 354, -1))


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("1531", (2026, 12, 20, 15, 31, 0)),
        ("1530", (2026, 12, 21, 15, 30, 0)),
        ("0000.59", (2026, 12, 21, 0, 0, 59)),
        ("201000", (2026, 12, 20, 10, 0, 0)),
        ("191000", (2027, 1, 19, 10, 0, 0)),
        ("11191000", (2027, 11, 19, 10, 0, 0)),
        ("12191000", (2026, 12, 19, 10, 0, 0)),
        ("6812191000", (2068, 12, 19, 10, 0, 0)),
        ("7012191000", (1970, 12, 19, 10, 0, 0)),
        ("203102301000.01", (2031, 3, 2, 10, 0, 1)),
    ],
)
def test_dates(text: str, when: tuple[int, ...]) -> None:
    assert dates.epoch(text, NOW) == int(time.mktime((*when, 0, 0, -1)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "1", "123", "2400", "0060", "1200.60", "13011200", "001200", "1200.5", "+100", "\u0660" * 4]
)
def test_no_dates(text: str) -> None:
    with pytest.raises(ValueError):
        dates.epoch(text, NOW)


@given(st.text(alphabet="0123456789.", max_size=16))
def test_no_date_surprises(text: str) -> None:
    try:
        assert dates.epoch(text, NOW) >= 0
    except ValueError:
        pass


# --- interactive


def test_x_needs_an_i_before_it() -> None:
    assert options.parse(["-I", "-x", "s"])[0].execute
    assert options.parse_script("#PBS -I\n#PBS -x\n").execute
    with pytest.raises(UsageError, match="line 1: #PBS -x -I: '-x' invalid on non-interactive job"):
        options.parse_script("#PBS -x -I\n")
    given_first = options.parse(["-x"])[0]
    with pytest.raises(UsageError):
        options.after_interactive(given_first, options.Options())
    assert options.after_interactive(given_first, options.parse_script("#PBS -I\n")) is given_first


@pytest.mark.parametrize(
    ("typed", "sent", "ended"),
    [
        (b"ls\r", b"ls\r", False),
        (b"~.", b"", True),
        (b"a~.\r", b"a~.\r", False),
        (b"a\r~.lost", b"a\r", True),
        (b"a\n~~.", b"a\n~~.", False),
        (b"a\x03~.", b"a\x03", True),
        (b"~\x1a~.", b"", True),
        (b"~x~.", b"~x~.", False),
        (b"\r~", b"\r", False),
    ],
)
def test_escapes(typed: bytes, sent: bytes, ended: bool) -> None:
    for step in (len(typed), 1):
        escapes = Escapes(b"\x15", b"\x03", b"\x1a")
        out = b"".join(escapes.feed(typed[at : at + step]) for at in range(0, len(typed), step) if not escapes.ended)
        assert (out, escapes.ended) == (sent, ended)


@given(st.binary(max_size=200))
def test_escapes_lose_nothing_else(data: bytes) -> None:
    if b"~" not in data:
        assert Escapes().feed(data) == data


@given(st.lists(st.binary(min_size=1, max_size=100), max_size=10), st.integers(1, 50))
def test_frames_come_back(parts: list[bytes], step: int) -> None:
    data = b"".join(map(protocol.frame, [*parts, b""]))
    buffer, found = bytearray(), []
    for at in range(0, len(data), step):
        buffer += data[at : at + step]
        found.extend(protocol.take_frames(buffer))
    assert (found, buffer) == ([*parts, b""], b"")


@given(
    st.dictionaries(
        st.sampled_from(["term", "size", "controls"]),
        st.none() | st.text() | st.integers() | st.lists(st.integers(-1, 70000), max_size=7),
    )
)
def test_no_terminal_surprises(value: dict[str, object]) -> None:
    try:
        found = submission.Terminal.read(value)
    except protocol.Refused:
        return
    assert all(0 <= number <= 0xFFFF for number in found.size) and len(found.controls) == 6
