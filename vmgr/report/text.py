"""The timeline as text: bars of letters, or of colours on a terminal, and the seconds of each phase."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import NamedTuple, Optional

from vmgr.errors import printable
from vmgr.report.parts import Part
from vmgr.report.timeline import Bar, Phase, Row, Timeline

NARROWEST = 20
LABEL_CHARS = 32
STEPS = (1, 2, 5)
FAILED = "!"


class Cell(NamedTuple):
    """One character of a row's bars: its phase, None for nothing there or, as FAILED, the failure."""

    text: str
    phase: Optional[Phase]


def headline(parts: Sequence[Part]) -> list[str]:
    """What job it was, and how it ended, in a few lines."""
    lead = parts[0]
    size = f"{lead.vcpus} vCPU{'s' * (lead.vcpus != 1)}, {lead.ram_mib} MiB"
    guests = sum(len(part.guests) for part in parts)
    what = f"{guests} guest{'s' * (guests != 1)} of {lead.image} ({size})" if lead.image else "no guest yet"
    when = datetime.datetime.fromtimestamp(lead.began).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    lines = [f"job {lead.job_id} of {lead.user}: {what}", f"began {when}, {outcome(parts)}"]
    lines += [f"{part.node}: {part.code}: {part.reason}" for part in parts if part.code]
    return [printable(line) for line in lines]


def outcome(parts: Sequence[Part]) -> str:
    """How the job stands, or has ended."""
    lead = parts[0]
    failed = next((part.code for part in parts if part.code), None)
    if failed:
        return f"failed ({failed})"
    if lead.job_status is not None:
        return f"ended with status {lead.job_status}"
    return lead.state if lead.alive or lead.is_over else f"{lead.state} when its agent was last heard"


def scale(seconds: float, room: int) -> list[float]:
    """Where an axis of so many seconds has its marks, `room` of them at most: every 1, 2 or 5 times 10^n s."""
    step = 10.0**-3
    while True:
        for factor in STEPS:
            if seconds / (step * factor) <= max(1, room):
                width = step * factor
                return [round(n * width, 6) for n in range(int(seconds / width + 1e-9) + 1)]
        step *= 10


def clock(seconds: float) -> str:
    """Seconds as they stand at a mark."""
    if seconds >= 3600:
        return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d}:{int(seconds) % 60:02d}"
    if seconds >= 60:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
    return f"{seconds:g} s"


def axis(timeline: Timeline, width: int) -> str:
    """The marks above the bars; the last one may stand out."""
    line = ""
    for t in scale(timeline.seconds, max(2, width // 10)):
        at = round(t / timeline.seconds * width)
        if at >= len(line) + bool(line):
            line = line.ljust(at) + f"|{clock(t)}"
    return line


def cells(row: Row, timeline: Timeline, width: int) -> list[Cell]:
    """The bars of a row, `width` characters wide; a phase that is there has one at least, unless the next covers it."""
    found = [Cell(" ", None)] * width
    for bar in row.bars:
        first, end = _columns(bar, timeline, width)
        for at in range(first, end):
            found[at] = Cell(bar.phase.letter, bar.phase)
    if row.failed is not None:
        found[min(width - 1, int(row.failed / timeline.seconds * width))] = Cell(FAILED, None)
    return found


def _columns(bar: Bar, timeline: Timeline, width: int) -> tuple[int, int]:
    first = min(width - 1, int(bar.start / timeline.seconds * width))
    return first, max(first + 1, round(bar.end / timeline.seconds * width))


def label(row: Row) -> str:
    """A row's name, cut where it is long; guests stand below their node."""
    name = printable(row.name)
    name = name if len(name) <= LABEL_CHARS else f"{name[: LABEL_CHARS - 3]}..."
    return name if row.rank is None else f"  {name} ({row.rank})"


def table(timeline: Timeline) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a table with the seconds of each phase."""
    phases = timeline.phases
    rows = []
    for row in timeline.rows:
        took = row.took
        cells = [f"{took[phase]:.2f}" if phase in took else "" for phase in phases]
        rows.append([label(row), *cells])
    return ["seconds", *(phase.word for phase in phases)], rows


def legend(timeline: Timeline) -> str:
    """What the letters mean, in a line."""
    return "  ".join(f"{phase.letter} {phase.word}" for phase in timeline.phases)
