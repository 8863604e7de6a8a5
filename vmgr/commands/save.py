"""`vmgr image save`: a running guest's disk as an image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

import click

from vmgr.commands.ordering import give, show
from vmgr.errors import Code, VTorqueError


@click.command()
@click.argument("guest", metavar="JOB[:RANK]")
@click.argument("name", required=False)
@click.option("--to", "file", type=click.Path(path_type=Path), help="A new file of your own instead of the pool.")
@click.option(
    "--flat/--layer",
    "flat",
    default=True,
    help="A disk that stands alone (the default), or only what differs from the guest's image, as a layer on that.",
)
@click.option("--description", default="", help="What the image is for.")
@click.option("--no-freeze", is_flag=True, help="Take the disk as it is, as after a power failure: the guest is stuck.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def save(
    guest: str,
    name: Optional[str],
    file: Optional[Path],
    flat: bool,
    description: str,
    no_freeze: bool,
    as_json: bool,
) -> None:
    """Make an image from the disk of a running guest.

    NAME is a new image, or gets a new revision. The guest goes on meanwhile; it is asked to write out its file system
    first. Root saves into the pool, a job's owner to a file (qcow2). Shares and persistent disks are not part of it.

    Example: vmgr image save 12.server my-debian --layer
    """
    if (name is None) == (file is None):
        raise click.UsageError("either the NAME of an image or --to FILE is needed")
    if file is not None and (not flat or description):
        raise click.UsageError("--layer and --description go with an image in the pool, not with --to")
    if name is not None and os.geteuid() != 0:
        raise VTorqueError(
            "the pool belongs to root", code=Code.ACCESS, hint="save the disk to a file of your own: --to FILE"
        )
    made = give(
        guest,
        "save",
        quiet=as_json,
        name=name,
        file=None if file is None else os.path.abspath(file),  # noqa: PTH100  # which also takes out `..`
        layer=not flat,
        description=description,
        freeze=not no_freeze,
    )
    show(made, str(made.get("image") or made.get("file")), as_json=as_json)
