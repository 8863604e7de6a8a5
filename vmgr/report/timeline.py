"""What the nodes have said, as one timeline: a row for each node and guest, with what took it when. Pure functions."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Optional

from vmgr.report.parts import GuestPart, Part


class Phase(enum.Enum):
    """What takes a node or a guest its time, in order: a word, a letter for it, and what it is."""

    PREPARE = ("prepare", "p", "from the prologue hook to the checked specification")
    STAGE = ("stage", "s", "disks, network and seeds are made ready")
    LAUNCH = ("launch", "l", "QEMU and the file servers start, and are pinned")
    FIRMWARE = ("firmware", "f", "from the guest's first instruction to its kernel")
    KERNEL = ("kernel", "k", "the kernel, until its first process")
    SYSTEM = ("system", "y", "the guest's system, until vTorque's program runs in it")
    SETUP = ("set up", "u", "shares, network, VM prologue, SSH")
    WAIT = ("wait", "w", "the guest is ready; the others, or the job, are not")
    JOB = ("job", "J", "the job's script runs")
    END = ("end", "e", "VM epilogue, shutting down, cleaning up")

    @property
    def word(self) -> str:
        return self.value[0]

    @property
    def letter(self) -> str:
        return self.value[1]

    @property
    def meaning(self) -> str:
        return self.value[2]


class Bar(NamedTuple):
    """A phase, from `start` to `end` in seconds since the beginning; `open` when it goes on."""

    phase: Phase
    start: float
    end: float
    open: bool = False


class Detail(NamedTuple):
    """Something that a guest itself says took it so long."""

    name: str
    start: float
    end: float


class Row(NamedTuple):
    """A node, or one of its guests (`rank` is None for a node). `failed` is when the node failed."""

    name: str
    rank: Optional[int]
    bars: tuple[Bar, ...]
    details: tuple[Detail, ...] = ()
    failed: Optional[float] = None

    @property
    def took(self) -> Mapping[Phase, float]:
        """Seconds of each phase."""
        return {bar.phase: bar.end - bar.start for bar in self.bars}


class Timeline(NamedTuple):
    """The rows, and how many seconds they span; `began` is their beginning in seconds since 1970."""

    rows: tuple[Row, ...]
    seconds: float
    began: float

    @property
    def phases(self) -> list[Phase]:
        """Those that occur, in order."""
        used = {bar.phase for row in self.rows for bar in row.bars}
        return [phase for phase in Phase if phase in used]


def newest(parts: Sequence[Part]) -> list[Part]:
    """The parts of the newest attempt, one a node, the mother superior's first."""
    if not parts:
        return []
    last = max(parts, key=lambda part: part.began)
    found: dict[str, Part] = {}
    for part in sorted(parts, key=lambda part: part.began):
        if part is last or (part.key and part.key == last.key):
            found[part.node] = part
    return sorted(found.values(), key=lambda part: part.node_index)


JOB_ENDS = ("job ended", "suspended")
"""The stages after which an attempt only comes to its end."""


def plan(parts: Sequence[Part], now: float) -> Timeline:
    """The timeline of one attempt, of which `parts` has at least one; `now` is in seconds since 1970.

    Nodes are put beside each other by their own clocks.
    """
    origin = min(part.began for part in parts)
    lead = min(parts, key=lambda part: part.node_index)
    job = _Job(*(None if t is None else t + lead.began for t in (_at(lead, "job started"), _at(lead, *JOB_ENDS))))
    rows = [row for part in parts for row in _rows(part, job, origin, now)]
    ends = [bar.end for row in rows for bar in row.bars] + [row.failed for row in rows if row.failed is not None]
    return Timeline(tuple(rows), max([*ends, 0.001]), origin)


class _Job(NamedTuple):
    """When the job's script started and ended, in seconds since 1970."""

    started: Optional[float]
    ended: Optional[float]


def _at(part: Part, *names: str) -> Optional[float]:
    """When the first of these stages was reached."""
    return next((stage.t for name in names for stage in part.stages if stage.name == name), None)


def _rows(part: Part, job: _Job, origin: float, now: float) -> Iterator[Row]:
    shift = part.began - origin
    over = _at(part, "gone")
    failed = _at(part, "failed")
    last = max([stage.t for stage in part.stages], default=0.0)
    goes_on = over is None and part.alive
    end = max(0.0, over if over is not None else max(last, now - part.began) if goes_on else last)
    ending = _at(part, *JOB_ENDS)
    if ending is None and failed is not None:
        ending = failed
    marks = [
        (Phase.PREPARE, 0.0), (Phase.STAGE, _at(part, "spec")), (Phase.LAUNCH, _at(part, "staged")),
        (None, _at(part, "pinned and running")), (Phase.END, ending),
    ]  # fmt: skip
    yield Row(part.node, None, _bars(marks, end, shift, goes_on), (), None if failed is None else failed + shift)
    for guest in part.guests:
        if guest.moments:
            yield _guest(guest, part, job, end, shift, goes_on, ending)


def _guest(
    guest: GuestPart, part: Part, job: _Job, end: float, shift: float, goes_on: bool, ending: Optional[float]
) -> Row:
    reached = {moment.name: moment.t for moment in reversed(guest.moments) if moment.start is None}
    said = {moment.name: moment for moment in reversed(guest.moments) if moment.start is not None}
    started = reached.get("started", reached.get("launched", 0.0))
    booted, ready = reached.get("booted"), reached.get("ready")
    if "resumed" in reached:  # it has only got its memory and its shares back
        booted, ready = started, reached["resumed"]
    kernel, first_process = started, None
    if booted is not None and "uptime" in said:
        kernel = _within(said["uptime"].start or 0.0, started, booted)
    if booted is not None and "kernel" in said:
        first_process = _within(said["kernel"].t, kernel, booted)
    job_started = None if job.started is None or ready is None else max(ready, job.started - part.began)
    job_ended = None if job_started is None or job.ended is None else max(job_started, job.ended - part.began)
    boots = [
        (Phase.FIRMWARE, started if kernel > started else None), (Phase.KERNEL, kernel), (Phase.SYSTEM, first_process),
    ]  # fmt: skip
    marks = [
        *([] if "resumed" in reached else boots), (Phase.SETUP, booted), (Phase.WAIT, ready), (Phase.JOB, job_started),
        (Phase.END, job_ended if ending is None else max(ending, job_ended or 0.0)),
    ]  # fmt: skip
    low = _within(started, 0.0, end)
    details = [
        Detail(moment.name, _within(moment.start or 0.0, low, end) + shift, _within(moment.t, low, end) + shift)
        for moment in said.values()
        if moment.name not in ("uptime", "kernel")  # they are in the bars
    ]
    details.sort(key=lambda detail: detail.start)
    return Row(guest.name, guest.rank, _bars(marks, end, shift, goes_on), tuple(details))


def _bars(
    marks: Iterable[tuple[Optional[Phase], Optional[float]]], end: float, shift: float, goes_on: bool
) -> tuple[Bar, ...]:
    """Bars from one mark that was reached to the next; a mark without a phase ends the bar before it."""
    known = [(phase, t) for phase, t in marks if t is not None]
    ends = [t for _, t in known[1:]] + [end]
    bars = []
    floor = 0.0
    for at, ((phase, t), until) in enumerate(zip(known, ends)):
        start = _within(t, floor, end)
        floor = _within(until, start, end)
        if phase is not None:
            bars.append(Bar(phase, start + shift, floor + shift, goes_on and at == len(known) - 1))
    return tuple(bars)


def _within(t: float, low: float, high: float) -> float:
    return max(low, min(t, max(low, high)))
