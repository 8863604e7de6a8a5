"""`vmgr node`: what is left on this node of guests that have gone."""

from __future__ import annotations

import json

import click

from vmgr.commands.access import need_root
from vmgr.commands.table import echo
from vmgr.config import load_config
from vmgr.errors import printable
from vmgr.paths import installation


@click.group()
def node() -> None:
    """Look after this node.

    Example: vmgr node reap --dry-run
    """


@node.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def reap(dry_run: bool, as_json: bool) -> None:
    """End and remove what no live guest job owns; needs root.

    Says each thing, and below an attempt what it has left. What could not be removed begins with `left:`.

    Example: vmgr node reap --dry-run
    """
    need_root("vmgr node reap removes root's files")
    from vmgr.node.reap import find, remove_all  # its libraries take their time

    config = load_config(installation())
    things, unseen = find(config)
    none: list[str] = []
    rows = []
    for thing, failures in ((thing, none) for thing in things) if dry_run else remove_all(config, things):
        rows.append({"kind": thing.kind, "what": thing.what, "holds": list(thing.holds), "left": failures})
        if not as_json:
            for line in [thing.line, *(f"  {held}" for held in thing.holds), *(f"left: {each}" for each in failures)]:
                echo(printable(line))
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, "things": rows, "left": unseen}, indent=1))
    else:
        for line in unseen:
            echo(printable(line))
