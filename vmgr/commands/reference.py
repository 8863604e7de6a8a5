"""`vmgr show` and `vmgr delete`: the same commands, the verb first."""

from __future__ import annotations

import click

from vmgr.commands import config, imagechange, images, suspended


@click.group()
def show() -> None:
    """Show images, one image, suspended jobs, or the configuration.

    Example: vmgr show images
    """


@click.group()
def delete() -> None:
    """Delete what is no longer needed.

    Example: vmgr delete image my-debian@1
    """


show.add_command(images.list_images, "images")
show.add_command(images.show, "image")
show.add_command(suspended.show)
show.add_command(config.show, "config")
delete.add_command(imagechange.delete, "image")
delete.add_command(suspended.delete)
