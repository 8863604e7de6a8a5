"""`vmgr list` and `vmgr image`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Callable

import click

from vmgr.commands.table import print_rows
from vmgr.config import load_config
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image, Pool, describe
from vmgr.paths import installation


def _pool() -> Pool:
    return Pool(load_config(installation()).images.pool)


def _need_root(what: str) -> None:
    if os.geteuid() != 0:
        raise VTorqueError(f"{what} changes the pool, which belongs to root", code=Code.ACCESS, hint="run it as root")


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_images(as_json: bool) -> None:
    """List the guest images.

    Example: vmgr list
    """
    pool = _pool()
    rows = []
    for image in map(pool.get, pool.names()):
        size, virtual = (n if as_json else _mib(n) for n in (image.size, image.virtual_size))
        rows.append((image.name, image.revision, image.family, size, virtual, image.created, image.description))
    print_rows(("name", "revision", "family", "size", "virtual_size", "added", "description"), rows, as_json=as_json)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f}M" if size else "-"


@click.group()
def image() -> None:
    """Build, add and show guest images.

    Example: vmgr image show micro
    """


@image.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--packages", is_flag=True, help="The packages in the image instead.")
def show(name: str, as_json: bool, packages: bool) -> None:
    """Show all that is known of an image.

    Example: vmgr image show debian-12
    """
    found = _pool().get(name)
    if packages:
        click.echo(found.path("packages").read_text(), nl=False)
        return
    facts = describe(found)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for key, value in facts.items():
        if key == "files":
            for file, entry in value.items():
                click.echo(f"file: {file} {entry['size']} bytes sha256 {entry['sha256']}")
        else:
            click.echo(f"{key}: {', '.join(value) if isinstance(value, list) else value}")


@image.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Name of the image in the pool.")
@click.option("--like", required=True, help="Image in the pool whose kernel, initrd and family the disk goes with.")
@click.option("--description", default="", help="What it is for.")
def add(file: Path, name: str, like: str, description: str) -> None:
    """Add a qcow2 disk to the pool, to be booted as another image is.

    Example: vmgr image add disk.qcow2 --name my-debian --like debian-12
    """
    from vmgr.images.add import add_disk

    _need_root("vmgr image add")
    made: Image = add_disk(
        file, name, like=like, description=description, pool=_pool(), progress=_progress(time.monotonic())
    )
    click.echo(f"{made.name}@{made.revision}")


def _progress(start: float) -> Callable[[str], None]:
    def say(line: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {line}", file=sys.stderr, flush=True)

    return say
