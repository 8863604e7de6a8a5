"""`vmgr errors`, and how the commands print tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from vmgr.errors import Code


def print_rows(headings: Sequence[str], rows: Sequence[Sequence[Any]], *, as_json: bool) -> None:
    """Print a table with aligned columns, or with `as_json` a list of objects."""
    if as_json:
        click.echo(json.dumps([dict(zip(headings, row)) for row in rows], indent=1))
        return
    texts = [[str(cell) for cell in row] for row in [[heading.upper() for heading in headings], *rows]]
    widths = [max(len(row[column]) for row in texts) for column in range(len(headings))]
    for row in texts:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


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
