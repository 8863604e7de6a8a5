"""`vmgr report`: what each node and guest of a job did when."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, Optional

import click

from vmgr.commands.table import echo, encodable, print_rows, terminal, write_text
from vmgr.config import Config, load_config
from vmgr.errors import Code, VTorqueError
from vmgr.paths import installation
from vmgr.reach.target import parse_target

if TYPE_CHECKING:
    from vmgr.report.gather import Gathered
    from vmgr.report.timeline import Phase, Timeline

PIPE_COLUMNS = 110
_COLOURS = {
    "PREPARE": "bright_black",
    "STAGE": "blue",
    "LAUNCH": "magenta",
    "FIRMWARE": "bright_yellow",
    "KERNEL": "yellow",
    "SYSTEM": "red",
    "SETUP": "cyan",
    "WAIT": "white",
    "JOB": "green",
    "END": "bright_black",
}
"""Of the phases, on a terminal; letters tell them apart without."""


@click.command()
@click.argument("job", metavar="JOB")
@click.option("--node", metavar="NODE", help="A node that the job had, where the batch system knows it no more.")
@click.option("--here", is_flag=True, help="Only what this node knows.")
@click.option("--part", is_flag=True, hidden=True, help="This node's part, as other nodes take it.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--html", metavar="FILE", help="Write a page with the chart, for a browser; - is standard output.")
def report(job: str, node: Optional[str], here: bool, part: bool, as_json: bool, html: Optional[str]) -> None:
    """Show what each node and guest of a job did when.

    It is there during the job and after it. Each node keeps its own part, beside the job's log; what the others say is
    asked for over your own SSH, and nodes that do not answer are named. A job that was queued again is shown as it ran
    last.

    Example: vmgr report 12.server --html report.html
    """
    from vmgr.report.gather import read_here, understood

    if here and node:
        raise VTorqueError("--here and --node contradict each other", code=Code.USAGE, hint="leave one out")
    if as_json and html == "-":
        raise VTorqueError("--json and --html - both write to standard output", code=Code.USAGE, hint="give a file")
    target = parse_target(job)
    if target.rank is not None:
        raise VTorqueError(f"{job} is one guest of a job", code=Code.VALUE, hint="a report is of a whole job")
    config = load_config(installation())
    if part:
        from vmgr.report.find import whole

        data = read_here(config, whole(config, job))
        understood(data, "this node")
        click.echo(data.decode())
        return
    gathered = _gathered(config, job, node, here)
    if as_json:
        click.echo(json.dumps(_plain(gathered), indent=1))
    if html is not None:
        _write(html, gathered)
    elif not as_json:
        _show(gathered)


def _gathered(config: Config, job: str, node: Optional[str], here: bool) -> Gathered:
    """The parts of the job's newest attempt, of all nodes that can be found. Raises VTorqueError when none knows it."""
    from vmgr.report.find import HINT, Found, find, whole
    from vmgr.report.gather import Gathered, read_here, understood
    from vmgr.report.timeline import newest

    if here:
        job_id = whole(config, job)
        found = Found(job_id, (), understood(read_here(config, job_id), "this node"))
    else:
        found = find(config, job, node)
        found = found.with_parts_of(found.nodes, config)
    parts = newest(found.parts)
    if not parts:
        why = f": {next(iter(found.missing.values()))}" if found.missing else ""
        raise VTorqueError(f"no node tells of job {found.job_id}{why}", code=Code.VALUE, hint=HINT)
    return Gathered(parts, found.missing)


def _plain(gathered: Gathered) -> dict[str, Any]:
    """What was gathered, for programs."""
    parts = []
    for part in gathered.parts:
        tree = part._asdict()
        tree["stages"] = [stage._asdict() for stage in part.stages]
        tree["guests"] = [
            {**guest._asdict(), "moments": [moment._asdict() for moment in guest.moments]} for guest in part.guests
        ]
        parts.append(tree)
    return {"job_id": gathered.parts[0].job_id, "parts": parts, "missing": dict(gathered.missing)}


def _write(file: str, gathered: Gathered) -> None:
    from vmgr.report.page import draw_page
    from vmgr.report.timeline import plan

    page = draw_page(gathered.parts, plan(gathered.parts, time.time()), gathered.missing, installation().templates)
    if file == "-":
        click.echo(page)
        return
    write_text(file, page)


def _show(gathered: Gathered) -> None:
    from vmgr.report.text import headline, table
    from vmgr.report.timeline import plan

    timeline = plan(gathered.parts, time.time())
    for line in headline(gathered.parts):
        echo(line)
    for node, why in gathered.missing.items():
        echo(f"{node} is missing here: {why}")
    echo("")
    if sys.stdout.isatty():
        _draw_coloured(timeline)
    else:
        _draw_letters(timeline)
    echo("")
    headings, rows = table(timeline)
    print_rows(headings, rows, as_json=False)


def _draw_letters(timeline: Timeline) -> None:
    from vmgr.report.text import axis, cells, label, legend

    labels = [label(row) for row in timeline.rows]
    margin = max(map(len, labels)) + 2
    width = max(20, PIPE_COLUMNS - margin)
    echo(" " * margin + axis(timeline, width))
    for name, row in zip(labels, timeline.rows):
        echo((name.ljust(margin) + "".join(cell.text for cell in cells(row, timeline, width))).rstrip())
    echo("")
    echo(legend(timeline))


def _draw_coloured(timeline: Timeline) -> None:
    from rich.text import Text

    from vmgr.report.text import FAILED, NARROWEST, axis, cells, label, legend

    console = terminal()
    names = [label(row) for row in timeline.rows]
    margin = min(max(map(len, names)) + 2, max(console.width - NARROWEST, 4))
    width = max(NARROWEST, console.width - margin - 8)

    def style(phase: Optional[Phase]) -> str:
        return _COLOURS[phase.name] if phase else "bold red"

    lines: list[Text] = [Text(" " * margin + axis(timeline, width), style="dim")]
    for name, row in zip(names, timeline.rows):
        line = Text(encodable(name[: margin - 1].ljust(margin)), style="bold" if row.rank is None else "")
        for cell in cells(row, timeline, width):
            block = cell.text if cell.phase is None or console.color_system is None else _block(cell.text)
            line.append(block, style=style(cell.phase) if cell.text == FAILED or cell.phase else "")
        lines.append(line)
    for line in lines:
        line.no_wrap, line.overflow = True, "crop"
        console.print(line)
    console.print()
    if console.color_system is None:
        console.print(legend(timeline))
    else:
        marks = [((_block(phase.letter), style(phase)), f" {phase.word}  ") for phase in timeline.phases]
        console.print(Text.assemble(*(part for mark in marks for part in mark)))


def _block(letter: str) -> str:
    """A full block where the terminal knows it."""
    return "\u2588" if encodable("\u2588") == "\u2588" else letter
