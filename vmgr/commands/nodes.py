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
    """End and remove what no live guest job owns.

    Example: vmgr node reap
    """
    need_root("vmgr node reap removes root's files")
    from vmgr.node.reap import reap as reap_node  # its libraries take their time

    said = reap_node(load_config(installation()), dry_run=dry_run)
    if as_json:
        click.echo(json.dumps(said, indent=1))
        return
    for line in said:
        echo(printable(line))
