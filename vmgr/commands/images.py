"""`vmgr list`, and the `vmgr image` commands that show and build; `vmgr.commands.imagechange` has the others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Optional

import click

from vmgr.commands.progress import Shown
from vmgr.commands.table import print_rows
from vmgr.config import load_config
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Pool, describe
from vmgr.paths import installation


def site_pool() -> Pool:
    """The pool of this installation."""
    return Pool(load_config(installation()).images.pool)


def need_root(what: str) -> None:
    """Refuse a command that changes the pool. Raises VTorqueError (VT-ACCESS)."""
    if os.geteuid() != 0:
        raise VTorqueError(f"{what} changes the pool, which belongs to root", code=Code.ACCESS, hint="run it as root")


@click.command("list")
@click.option("--all", "everything", is_flag=True, help="All revisions, not only the newest of each image.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_images(everything: bool, as_json: bool) -> None:
    """List the guest images.

    Example: vmgr list --all
    """
    pool = site_pool()
    rows = []
    listed = pool.all if everything else pool.newest
    for image in listed(broken=lambda problem: click.echo(str(problem), err=True)):
        size, virtual = (n if as_json else _mib(n) for n in (image.size, image.virtual_size))
        rows.append((image.name, image.revision, image.family, size, virtual, image.created, image.description))
    print_rows(("name", "revision", "family", "size", "virtual_size", "added", "description"), rows, as_json=as_json)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f}M" if size else "-"


@click.group()
def image() -> None:
    """Build, add, show, change and delete guest images.

    Where an image is named, debian-12 is its newest revision and debian-12@3 its third.

    Example: vmgr image show micro
    """


@image.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--packages", is_flag=True, help="The packages in the image instead.")
def show(name: str, as_json: bool, packages: bool) -> None:
    """Show all that is known of an image, NAME or NAME@REVISION.

    Example: vmgr image show debian-12
    """
    found = site_pool().get(name)
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
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Build a new revision even when nothing has changed.")
@click.option(
    "--recipes", type=click.Path(path_type=Path), help="Folder of recipes (default: those that came with vTorque)."
)
@click.option("--pool", type=click.Path(path_type=Path), help="Folder of images (default: the site's pool).")
def build(names: tuple[str, ...], force: bool, recipes: Optional[Path], pool: Optional[Path]) -> None:
    """Build images from their recipes into the pool.

    Example: vmgr image build micro
    """
    from vmgr.images.build import build as build_image

    need_root("vmgr image build")
    shown = Shown()
    for name in names:
        made = build_image(
            name,
            recipes=recipes or installation().recipes,
            pool=Pool(pool) if pool else site_pool(),
            progress=shown.line,
            force=force,
        )
        click.echo(f"{made.name}@{made.revision}")
