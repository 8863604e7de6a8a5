"""The timeline as one HTML page that needs nothing from elsewhere: inline SVG, no script, readable in light and dark.

Names come from users and guests: the template escapes all of them, and a content security policy forbids the page
whatever it does not have, so that nothing of theirs could do anything even if it got in.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vmgr.errors import printable
from vmgr.report.parts import Part
from vmgr.report.text import clock, outcome, scale
from vmgr.report.timeline import Bar, Row, Timeline
from vmgr.trust import check_trusted

PAGE, STYLE = "report.html", "report.css"

_WIDTH, _LABELS, _RIGHT = 1120.0, 200.0, 26.0
_TOP, _NODE, _GUEST = 34.0, 26.0, 34.0
_CHAR = 6.6
"""About the width of a letter of 12 pixels."""
_LABEL_CHARS = 24
_THINNEST = 1.5


class _Shape(NamedTuple):
    """A rectangle; `text` stands in it where it has room, `title` when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    text: str
    title: str


class _Line(NamedTuple):
    """A row of the chart; `failed` is where its node failed."""

    y: float
    height: float
    label: str
    title: str
    is_node: bool
    bars: list[_Shape]
    details: list[_Shape]
    failed: Optional[float]


class _Mark(NamedTuple):
    x: float
    text: str


class _Event(NamedTuple):
    t: str
    where: str
    what: str


def draw_page(parts: Sequence[Part], timeline: Timeline, missing: Mapping[str, str], templates: Path) -> str:
    """The page. `missing` are nodes of which nothing is known, and why; `templates` the installation's templates."""
    for name in (PAGE, STYLE):
        check_trusted(templates / name)
    style = (templates / STYLE).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=FileSystemLoader(os.fspath(templates)), trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    lines = list(_lines(timeline))
    lead = parts[0]
    height = _TOP + sum(line.height for line in lines) + 8
    page = environment.get_template(PAGE).render(
        style=Markup(style),  # the installation's own file
        style_digest=digest,
        job=printable(lead.job_id),
        facts=[(name, printable(value)) for name, value in _facts(parts, timeline)],
        outcome=printable(outcome(parts)),
        mood=_mood(parts),
        problems=[(printable(part.node), printable(f"{part.code}: {part.reason}")) for part in parts if part.code],
        missing=[(printable(node), printable(why)) for node, why in missing.items()],
        legend=[(phase.name.lower(), phase.word, phase.meaning) for phase in timeline.phases],
        phases=[phase.word for phase in timeline.phases],
        durations=list(_durations(timeline)),
        events=list(_events(parts, timeline)),
        width=_show(_WIDTH),
        height=_show(height),
        left=_LABELS,
        right=_WIDTH - _RIGHT,
        top=_TOP,
        marks=[_Mark(_at(t, timeline), clock(t)) for t in scale(timeline.seconds, 9)],
        lines=lines,
        show=_show,
    )
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")  # the same in every encoding


def _facts(parts: Sequence[Part], timeline: Timeline) -> Iterator[tuple[str, str]]:
    lead = parts[0]
    yield "user", lead.user
    if lead.image:
        yield "image", lead.image
        yield "guest", f"{lead.vcpus} vCPU{'s' * (lead.vcpus != 1)}, {lead.ram_mib} MiB"
    yield "nodes", str(len(parts))
    yield "guests", str(sum(len(part.guests) for part in parts))
    yield "began", datetime.datetime.fromtimestamp(timeline.began).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    yield "took", clock(round(timeline.seconds, 2))


def _mood(parts: Sequence[Part]) -> str:
    if any(part.code for part in parts):
        return "bad"
    lead = parts[0]
    if lead.job_status is None and lead.alive:
        return "going"
    return "good" if lead.job_status == 0 else "odd"


def _at(t: float, timeline: Timeline) -> float:
    return _LABELS + t / timeline.seconds * (_WIDTH - _LABELS - _RIGHT)


def _lines(timeline: Timeline) -> Iterator[_Line]:
    y = _TOP
    failed: Optional[float] = None
    for row in timeline.rows:
        is_node = row.rank is None
        if is_node:
            failed = None if row.failed is None else _at(row.failed, timeline)
        height = _NODE if is_node else _GUEST
        name = printable(row.name)
        yield _Line(
            y=y,
            height=height,
            label=name if len(name) <= _LABEL_CHARS else name[: _LABEL_CHARS - 1] + "…",
            title=name if row.rank is None else f"{name}, rank {row.rank}",
            is_node=is_node,
            bars=[_bar(row, bar, timeline, y) for bar in row.bars],
            details=list(_details(row, timeline, y)),
            failed=failed,
        )
        y += height


def _bar(row: Row, bar: Bar, timeline: Timeline, y: float) -> _Shape:
    x, end = _at(bar.start, timeline), _at(bar.end, timeline)
    took = bar.end - bar.start
    text = f"{took:.2f} s" if took < 10 else f"{took:.1f} s" if took < 100 else clock(took)
    named = f"{bar.phase.word} {text}"
    width = max(end - x, _THINNEST)
    shown = next((words for words in (named, text) if len(words) * _CHAR + 10 <= width), "")
    span = f"{bar.start:.2f} s to {'now' if bar.open else f'{bar.end:.2f} s'}"
    height = 12.0 if row.rank is None else 19.0
    return _Shape(
        x, y + (7 if row.rank is None else 4), width, height, bar.phase.name.lower() + (" open" if bar.open else ""),
        "" if row.rank is None else shown, f"{printable(row.name)}: {bar.phase.word}, {text} ({span})",
    )  # fmt: skip


def _details(row: Row, timeline: Timeline, y: float) -> Iterator[_Shape]:
    for detail in row.details:
        x, end = _at(detail.start, timeline), _at(detail.end, timeline)
        title = f"{detail.name}, {detail.end - detail.start:.2f} s ({detail.start:.2f} s to {detail.end:.2f} s)"
        yield _Shape(
            x, y + 25, max(end - x, _THINNEST), 3.5, "detail", "", f"{printable(row.name)}: {printable(title)}"
        )


def _durations(timeline: Timeline) -> Iterator[tuple[str, bool, list[str]]]:
    for row in timeline.rows:
        took = row.took
        yield (
            printable(row.name),
            row.rank is None,
            [f"{took[phase]:.2f}" if phase in took else "" for phase in timeline.phases],
        )


def _events(parts: Sequence[Part], timeline: Timeline) -> Iterator[_Event]:
    """Everything that was told, in the order of time."""
    found = []
    for part in parts:
        shift = part.began - timeline.began
        found += [(stage.t + shift, part.node, stage.name) for stage in part.stages]
        for guest in part.guests:
            for moment in guest.moments:
                took = "" if moment.start is None else f" (took {moment.t - moment.start:.2f} s)"
                if moment.name != "uptime":
                    found.append((moment.t + shift, guest.name, moment.name + took))
    for t, where, what in sorted(found):
        yield _Event(f"{t:.3f}", printable(where), printable(what))


def _show(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")
