"""`vmgr node`: what is left on this node of guests that have gone."""

from __future__ import annotations

import os

import click

from vmgr.config import load_config
from vmgr.errors import Code, VTorqueError
from vmgr.paths import installation


@click.group()
def node() -> None:
    """Look after this node.

    Example: vmgr node reap --dry-run
    """


@node.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def reap(dry_run: bool) -> None:
    """End and remove what no live guest job owns.

    Example: vmgr node reap
    """
    from vmgr.node.reap import reap as reap_node

    if os.geteuid() != 0:
        raise VTorqueError("vmgr node reap removes root's files", code=Code.ACCESS, hint="run it as root")
    for line in reap_node(load_config(installation()), dry_run=dry_run):
        click.echo(line)
