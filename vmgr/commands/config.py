"""`vmgr config`."""

from __future__ import annotations

import grp
import json
import pwd
from collections.abc import Iterator
from typing import Any, Optional

import click

from vmgr.commands.table import print_rows
from vmgr.config import compile_config, load_config, read_tree
from vmgr.errors import Code, VTorqueError
from vmgr.front import write_front
from vmgr.images.pool import Pool
from vmgr.node.abilities import Provided, beyond_nodes, without_software
from vmgr.paths import installation
from vmgr.policy import Subject


@click.group()
def config() -> None:
    """Check and show the site's configuration.

    Example: vmgr config check
    """


@config.command()
def check() -> None:
    """Check the configuration; say file, line and key of what is wrong, and what nodes cannot do yet.

    Example: vmgr config check
    """
    source = installation().config_file
    tree, _ = read_tree(source)
    provided = Provided(bridge=tree["network"]["bridge"]["name"], workspace=tree["workspace"]["folder"])
    for note in beyond_nodes(tree["policy"], tree["components"], provided):
        click.echo(f"{source}: note: {note}")
    for note in without_software(tree["guest"], Pool(tree["images"]["pool"])):
        click.echo(f"{source}: note: {note}")
    click.echo(f"{source}: ok")


@config.command("compile")
def compile_() -> None:
    """Check the configuration and leave the compiled copy beside it that submissions read.

    Example: vmgr config compile
    """
    try:
        config = compile_config(installation())
        write_front(config, installation())
        click.echo(f"{config.source}: ok, compiled")
    except OSError as err:
        raise VTorqueError(
            f"cannot write {err.filename}: {err.strerror}", code=Code.ACCESS, hint="run it as root"
        ) from err


@config.command()
@click.option("--value", "wanted", metavar="KEY", help="Only the value of this dotted key, for scripts.")
@click.option("--user", metavar="NAME", help="The policy that holds for this user.")
@click.option("--queue", metavar="NAME", help="The policy that holds in this queue.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def show(wanted: str, user: str, queue: str, as_json: bool) -> None:
    """Show every key with its value and where that comes from. Sizes are in MiB.

    With --user or --queue only the policy, as it holds there: the user's own overrides, those of the user's primary
    group, those of the queue (submit.default_queue when not given), the general values.

    Example: vmgr config show --user alice --queue long
    """
    if user or queue:
        _show_policy(user, queue, wanted, as_json)
        return
    tree, lines = read_tree(installation().config_file)
    flat = dict(_flat(tree, ""))
    if wanted:
        if wanted not in flat:
            raise VTorqueError(f"there is no key {wanted}", code=Code.KEY, hint="`vmgr config show` lists every key")
        value = flat[wanted]
        click.echo(value if isinstance(value, str) else json.dumps(value))
        return
    rows = [(key, value if as_json else _text(value), _origin(key, lines)) for key, value in flat.items()]
    print_rows(("key", "value", "origin"), rows, as_json=as_json)


def _show_policy(user: str, queue: str, wanted: str, as_json: bool) -> None:
    config = load_config(installation())
    group = primary_group(user) if user else None
    policy = config.policy_for(Subject(user or "", group, queue or config.submit.default_queue))
    rows = [(key, value if as_json else _text(value), origin) for key, value, origin in policy.rows()]
    if not wanted:
        print_rows(("key", "value", "origin"), rows, as_json=as_json)
        return
    values = {key: value for key, value, _ in policy.rows()}
    if wanted not in values:
        raise VTorqueError(f"there is no key {wanted} in the policy", code=Code.KEY, hint="leave --value out")
    click.echo(_text(values[wanted]))


def primary_group(user: str) -> Optional[str]:
    """The name of a user's primary group, None where it has none. Raises VTorqueError (VT-VALUE) for nobody known."""
    try:
        return grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name
    except KeyError:
        pass
    try:
        pwd.getpwnam(user)
    except KeyError:
        raise VTorqueError(f"--user {user}: there is no such user here", code=Code.VALUE) from None
    return None


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
