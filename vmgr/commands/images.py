"""`vmgr list`, and the `vmgr image` commands that show and build; `vmgr.commands.imagechange` has the others."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vmgr.commands.table import print_rows
from vmgr.config import load_config
from vmgr.images.pool import Image, Pool, describe
from vmgr.paths import installation


def site_pool() -> Pool:
    """The pool of this installation."""
    return Pool(load_config(installation()).images.pool)


def recipe_folders() -> list[Path]:
    """The folders in which names of recipes are looked up: the site's own before those that came with vTorque."""
    own = load_config(installation()).images.recipes
    return [*([own] if own else []), installation().recipes]


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
    if not rows and not as_json:
        click.echo(f"there are no images in {pool.path}; `vmgr image build` makes some", err=True)
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
@click.argument("name", metavar="IMAGE[@REVISION]")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--packages", is_flag=True, help="The packages in the image instead.")
def show(name: str, as_json: bool, packages: bool) -> None:
    """Show all that is known of an image, NAME or NAME@REVISION.

    Example: vmgr image show debian-12
    """
    found = site_pool().get(name)
    if packages:
        _show_packages(found, as_json)
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
            shown = ", ".join(value) if isinstance(value, list) else value
            click.echo(f"{key}: {'-' if shown in (None, '') else shown}")


def _show_packages(image: Image, as_json: bool) -> None:
    text = image.path("packages").read_text()
    if not as_json:
        click.echo(text, nl=False)
        return
    names = ("name", "version", "architecture")
    click.echo(json.dumps([dict(zip(names, line.split())) for line in text.splitlines()], indent=1))
