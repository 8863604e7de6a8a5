"""`vmgr errors`, and how the commands print tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmgr.errors import Code, VTorqueError, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STATES = {
    "failed": "red",
    "ready": "green",
    "running": "green",
    "starting": "yellow",
    "staging": "yellow",
    "booting": "yellow",
    "suspended": "yellow",
    "returning": "yellow",
    "ending": "yellow",
}
"""Colours of what stands in a column `state`."""
_WORD_WIDTH = 24
"""Columns of cells that are wider than this hold text, which may go on in the next line."""
_TEXT_WIDTH = 10
"""So narrow may a column of text become."""


def print_rows(headings: Sequence[str], rows: Sequence[Sequence[Any]], *, as_json: bool) -> None:
    """Print a table, or with `as_json` a list of objects.

    On a terminal columns of text share its width, and go on in the next line; all others are as wide as their cells, so
    that names, numbers and addresses stay in one piece, and a last column without a word is left out. Colours are left
    out where NO_COLOR or TERM=dumb says so. Elsewhere columns are aligned, one line a row, however long. Cells come
    from users, guests and images: control characters are escaped, and nothing in them is taken for markup.
    """
    if as_json:
        click.echo(json.dumps([dict(zip(headings, row)) for row in rows], indent=1))
    elif sys.stdout.isatty():
        table = rows_table(headings, rows)
        terminal(least_width=_least_width(table)).print(table)
    else:
        texts = [[heading.upper() for heading in headings], *([printable(str(cell)) for cell in row] for row in rows)]
        widths = [max(len(row[column]) for row in texts) for column in range(len(headings))]
        for row in texts:
            echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def rows_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """The table that `print_rows` prints on a terminal."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    if rows and all(row[-1] == "" for row in rows):
        headings = headings[:-1]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column, heading in enumerate(headings):
        numbers = bool(rows) and all(isinstance(row[column], (int, float)) for row in rows)
        widest = max(cell_len(encodable(printable(str(cell)))) for cell in (heading, *(row[column] for row in rows)))
        table.add_column(
            Text(heading.upper()), justify="right" if numbers else "left", overflow="fold",
            min_width=min(widest, _TEXT_WIDTH) if widest > _WORD_WIDTH else widest,
        )  # fmt: skip
    for row in rows:
        cells = []
        for heading, cell in zip(headings, row):
            style = _STATES.get(str(cell), "") if heading == "state" else ""
            cells.append(Text(encodable(printable(str(cell))), style=style))
        table.add_row(*cells)
    return table


def _least_width(table: Table) -> int:
    """The columns that a table takes at least, with the space between its columns."""
    return sum(column.min_width or 1 for column in table.columns) + 2 * len(table.columns)


def terminal(*, stderr: bool = False, least_width: int = 0) -> Console:
    """The terminal at standard output or error, for what rich draws there; nothing printed is taken for markup.

    One of fewer columns than `least_width` breaks lines where they reach its end.
    """
    from rich.console import Console

    found = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    found.width = max(found.width, least_width)
    return found


def echo(text: str) -> None:
    """Print `text`; what standard output's encoding does not know is escaped."""
    click.echo(encodable(text))


def encodable(text: str) -> str:
    """`text` with what standard output's encoding does not know as escape sequences."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--markdown", is_flag=True, help="As the table in the documentation.")
def errors(as_json: bool, markdown: bool) -> None:
    """List every VT- code with its exit status and what to do.

    Example: vmgr errors
    """
    rows = [tuple(code.value) for code in Code]
    if not markdown:
        print_rows(("code", "status", "meaning", "remedy"), rows, as_json=as_json)
        return
    click.echo("| Code | Exit status | What happened | What to do |\n| --- | --- | --- | --- |")
    for name, status, meaning, remedy in rows:
        click.echo(f"| `{name}` | {status} | {meaning} | {remedy} |")


def write_text(file: str, text: str) -> None:
    """Write `text` to a file that the caller names. Raises VTorqueError (VT-VALUE)."""
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as err:
        raise VTorqueError(f"{file} cannot be written: {err.strerror}", code=Code.VALUE, hint="name another") from err
