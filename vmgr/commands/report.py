"""`vmgr report`: what each node and guest of a job did when."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import click

from vmgr.commands.table import echo, encodable, print_rows, terminal
from vmgr.config import Config, load_config
from vmgr.errors import Code, VTorqueError
from vmgr.paths import installation

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
@click.option("--here", is_flag=True, help="Only what this node knows.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--html", metavar="FILE", help="Write a page with the chart, for a browser; - is standard output.")
def report(job: str, here: bool, as_json: bool, html: Optional[str]) -> None:
    """Show what each node and guest of a job did when, during the job and after it.

    Each node keeps its own part, beside the job's log. What the others say is asked for over your own SSH; nodes that
    do not answer are named. A job that was queued again is shown as it ran last.

    Example: vmgr report 12.server --html report.html
    """
    from vmgr.report.gather import read_here, understood

    if as_json and html == "-":
        raise VTorqueError("--json and --html - both write to standard output", code=Code.USAGE, hint="give a file")
    config = load_config(installation())
    if here and as_json:
        data = read_here(config, job)
        understood(data, "this node")
        click.echo(data)
        return
    gathered = _gathered(config, job, here)
    if as_json:
        click.echo(json.dumps(_plain(gathered), indent=1))
    if html is not None:
        _write(html, gathered)
    elif not as_json:
        _show(gathered)


def _gathered(config: Config, job_id: str, here: bool) -> Gathered:
    """The parts of the job's newest attempt. Raises VTorqueError when no node knows of it."""
    from vmgr.report.gather import Gathered, read_here, understood
    from vmgr.report.timeline import newest

    parts = understood(read_here(config, job_id), "this node")
    found = newest(parts)
    if not found:
        raise VTorqueError(f"the report of job {job_id} is empty", code=Code.AGENT, hint="its agent has just begun")
    return Gathered(found, {} if here else dict.fromkeys(found[0].nodes[1:], "not asked"))


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
        click.echo(page.encode())
        return
    try:
        Path(file).write_text(page, encoding="utf-8")
    except OSError as err:
        raise VTorqueError(f"{file} cannot be written: {err.strerror}", code=Code.VALUE, hint="name another") from err


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
    for _, text in legend(timeline):
        echo(text)


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
    lines.append(Text())
    for phase, text in legend(timeline):
        lines.append(Text.assemble((_block(phase.letter), style(phase)), " ", text))
    for line in lines:
        line.no_wrap, line.overflow = True, "crop"
        console.print(line)


def _block(letter: str) -> str:
    """A full block where the terminal knows it."""
    return "\u2588" if encodable("\u2588") == "\u2588" else letter
