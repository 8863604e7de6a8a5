"""`vmgr image build`."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import click

from vmgr.commands.access import need_root
from vmgr.commands.images import recipe_folders
from vmgr.commands.progress import Shown
from vmgr.config import load_config
from vmgr.images.pool import Image, Pool
from vmgr.paths import installation
from vmgr.signals import ENDING


class _Ended(BaseException):
    """A signal that asks us to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@click.command()
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Build a new revision even when nothing has changed.")
@click.option(
    "--recipes",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder of recipes (default: the site's, images.recipes, then those that came with vTorque).",
)
@click.option("--pool", type=click.Path(path_type=Path), help="Folder of images (default: the site's pool).")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def build(recipes: tuple[str, ...], force: bool, folder: Optional[Path], pool: Optional[Path], as_json: bool) -> int:
    """Build images from their recipes into the pool.

    RECIPE is a name, or the path of a recipe's file or folder. What was built from the same recipe, files and packages
    before is not built again.

    Example: vmgr image build micro
    """
    from vmgr.images.build import build as build_image

    need_root("vmgr image build changes the pool, which belongs to root")
    shown = Shown()
    images_made: list[dict[str, str]] = []
    places, images = ([folder] if folder else recipe_folders()), Pool(pool or load_config(installation()).images.pool)

    def made(image: Image) -> None:
        images_made.append({"image": image.reference, "directory": image.folder})
        if not as_json:
            click.echo(image.reference)

    try:
        with _ended_by_signals():
            for recipe in recipes:
                build_image(recipe, recipes=places, pool=images, progress=shown.line, force=force, made=made)
    except _Ended as end:
        name, done = signal.Signals(end.number).name, len(images_made)
        what = f"; nothing stays of the build of {recipes[done]}" if done < len(recipes) else ""
        click.echo(f"vmgr: ended by {name}{what}", err=True)
        return 128 + end.number
    finally:  # also of what went well before a failure
        if as_json:
            click.echo(json.dumps({"images": images_made}, indent=1))
    return 0


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turn signals that ask us to end into an exception, the first of them alone, so that what was begun is undone."""

    def end(number: int, _frame: Any) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)
        raise _Ended(number)

    before = {each: signal.signal(each, end) for each in ENDING}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
