"""`vmgr config`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from vmgr.commands.table import print_rows
from vmgr.config import compile_config, read_tree
from vmgr.errors import Code, VTorqueError
from vmgr.paths import installation


@click.group()
def config() -> None:
    """Check and show the site's configuration.

    Example: vmgr config check
    """


@config.command()
def check() -> None:
    """Check the configuration; say file, line and key of what is wrong.

    Example: vmgr config check
    """
    source = installation().config
    read_tree(source)
    click.echo(f"{source}: ok")


@config.command("compile")
def compile_() -> None:
    """Check the configuration and leave the compiled copy beside it that submissions read.

    Example: vmgr config compile
    """
    try:
        click.echo(f"{compile_config(installation()).source}: ok, compiled")
    except OSError as err:
        raise VTorqueError(
            f"cannot write {err.filename}: {err.strerror}", code=Code.ACCESS, hint="run it as root"
        ) from err


@config.command()
@click.option("--value", "wanted", metavar="KEY", help="Only the value of this dotted key, for scripts.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def show(wanted: str, as_json: bool) -> None:
    """Show every key with its value and where that comes from. Sizes are in MiB.

    Example: vmgr config show --value policy.vcpus.max
    """
    tree, lines = read_tree(installation().config)
    flat = dict(_flat(tree, ""))
    if wanted:
        if wanted not in flat:
            raise VTorqueError(f"there is no key {wanted}", code=Code.KEY, hint="`vmgr config show` lists every key")
        value = flat[wanted]
        click.echo(value if isinstance(value, str) else json.dumps(value))
        return
    rows = [(key, value if as_json else _text(value), _origin(key, lines)) for key, value in flat.items()]
    print_rows(("key", "value", "origin"), rows, as_json=as_json)


def _flat(tree: Any, at: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{at}.{key}" if at else key)
    elif isinstance(tree, list) and tree and isinstance(tree[0], dict):
        for index, value in enumerate(tree):
            yield from _flat(value, f"{at}[{index}]")
    else:
        yield at, tree


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _origin(key: str, lines: dict[str, int]) -> str:
    return f"line {lines[key]}" if key in lines else "default"
