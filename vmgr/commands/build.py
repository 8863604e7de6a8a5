"""`vmgr image build`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Callable, Optional

import click

from vmgr.config import load_config
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Pool
from vmgr.paths import installation


@click.command()
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

    if os.geteuid() != 0:
        raise VTorqueError(
            "vmgr image build changes the pool, which belongs to root", code=Code.ACCESS, hint="run it as root"
        )
    start = time.monotonic()
    for name in names:
        made = build_image(
            name,
            recipes=[recipes] if recipes else [installation().recipes],
            pool=Pool(pool or load_config(installation()).images.pool),
            progress=_progress(start),
            force=force,
        )
        click.echo(f"{made.name}@{made.revision}")


def _progress(start: float) -> Callable[[str], None]:
    def say(line: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {line}", file=sys.stderr, flush=True)

    return say
