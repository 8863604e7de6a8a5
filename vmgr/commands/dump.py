"""`vmgr dump`: a running guest's memory, for the analysis of a crash."""

from __future__ import annotations

import os
from pathlib import Path

import click

from vmgr.commands.ordering import give, show


@click.command()
@click.argument("guest", metavar="JOB[:RANK]")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    type=click.Choice(["kdump-zlib", "elf"]),
    default="kdump-zlib",
    show_default=True,
    help="kdump-zlib is compressed, for crash(8); elf is also for gdb(1).",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def dump(guest: str, file: Path, kind: str, as_json: bool) -> None:
    """Write the memory of a running guest to a new file.

    FILE (0600) is for crash(8) and gdb(1). The guest stands still until all is written, then goes on. Root's files go
    into a folder in which only root can replace them; /tmp is one.

    Example: vmgr dump 12.server guest.dump
    """
    made = give(
        guest,
        "dump",
        quiet=as_json,
        file=os.path.abspath(file),  # noqa: PTH100  # which also takes out `..`
        format=kind,
    )
    show(made, f"{made.get('file')}: {made.get('bytes')} bytes", as_json=as_json)
