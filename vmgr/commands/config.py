"""`vmgr config`."""

from __future__ import annotations

import grp
import json
import pwd
from collections.abc import Mapping
from typing import Any, Optional

import click

from vmgr.commands.table import print_rows
from vmgr.config import Config, compile_config, load_config, read_tree
from vmgr.errors import Code, VTorqueError
from vmgr.front import write_front
from vmgr.images.pool import Pool
from vmgr.node.abilities import beyond_nodes, provided_by, without_software
from vmgr.origins import flat
from vmgr.paths import installation
from vmgr.policy import Subject


@click.group()
def config() -> None:
    """Check and show the site's configuration.

    Example: vmgr config check
    """


@config.command()
@click.option("--user", metavar="NAME", help="Also the policy that holds for this user.")
@click.option("--queue", metavar="NAME", help="Also the policy that holds in this queue.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_context
def check(context: click.Context, user: Optional[str], queue: Optional[str], as_json: bool) -> None:
    """Check the configuration.

    It says file, line and key of what is wrong. Notes tell what is legal and perhaps not meant: what nodes refuse,
    overrides that exclude each other for some users and queues. With --user or --queue it is an error when nothing is
    left of a key there, and defaults that overrides have moved are noted. Ends with 0, or with 2 when something is
    wrong.

    Example: vmgr config check --user alice --queue long
    """
    source = installation().config_file
    error: Optional[VTorqueError] = None
    notes: list[str] = []
    try:
        notes = _notes(source, user, queue)
    except VTorqueError as err:
        if not as_json:
            raise
        error = err
    if as_json:
        failure = None if error is None else {"code": error.code.text, "text": error.detail}
        click.echo(json.dumps({"file": source, "ok": error is None, "error": failure, "notes": notes}, indent=1))
        context.exit(0 if error is None else error.code.status)
    for note in notes:
        click.echo(f"{source}: note: {note}")
    click.echo(f"{source}: ok")


def _notes(source: str, user: Optional[str], queue: Optional[str]) -> list[str]:
    from vmgr.consistency import contradictions, examine

    tree, lines = read_tree(source)
    config = Config(source, tree, lines)
    provided = provided_by(tree)
    notes = beyond_nodes(tree["policy"], tree["components"], provided)
    notes += without_software(tree["guest"], Pool(tree["images"]["pool"]))
    notes += contradictions(tree["policy"], config.policy_for, _group_or_none)
    if user or queue:
        notes += examine(config.policy_for(_subject(config, user, queue)))
    return notes


def _subject(config: Config, user: Optional[str], queue: Optional[str]) -> Subject:
    return Subject(user or "", primary_group(user) if user else None, queue or config.submit.default_queue)


def _group_or_none(user: str) -> Optional[str]:
    """The same for a user whom this machine need not know."""
    try:
        return primary_group(user)
    except VTorqueError:
        return None


@config.command("compile")
def compile_() -> None:
    """Check the configuration and leave a compiled copy beside it.

    Submissions read that copy. Run it after every change.

    Example: vmgr config compile
    """
    try:
        config = compile_config(installation())
        write_front(config, installation())
        click.echo(f"{config.source}: ok, compiled")
    except OSError as err:
        raise VTorqueError(
            f"cannot write beside {installation().config_file}: {err.strerror}", code=Code.ACCESS, hint="run it as root"
        ) from err


@config.command()
@click.option("--value", "wanted", metavar="KEY", help="Only the value of this dotted key, for scripts.")
@click.option("--user", metavar="NAME", help="The policy that holds for this user.")
@click.option("--queue", metavar="NAME", help="The policy that holds in this queue.")
@click.option("--origin", is_flag=True, help="Also what each value has overridden, and where that stands.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def show(wanted: str, user: str, queue: str, origin: bool, as_json: bool) -> None:
    """Show every key with its value and where that comes from. Sizes are in MiB.

    With --user or --queue only the policy, as it holds there: the user's own overrides, those of the user's primary
    group, those of the queue (submit.default_queue when not given), the general values.

    With --origin each key has its layer (default, file, or an override such as users.alice), the line, and the values
    that this one has overridden, each with its place.

    Example: vmgr config show --user alice --queue long --origin
    """
    if origin:
        _show_origins(user, queue, wanted, as_json)
        return
    if user or queue:
        _show_policy(user, queue, wanted, as_json)
        return
    tree, lines = read_tree(installation().config_file)
    values = dict(flat(tree))
    if wanted:
        value = values[_known(wanted, values)]
        click.echo(value if isinstance(value, str) else json.dumps(value))
        return
    rows = [(key, value if as_json else _text(value), _origin(key, lines)) for key, value in values.items()]
    print_rows(("key", "value", "origin"), rows, as_json=as_json)


def _show_origins(user: str, queue: str, wanted: str, as_json: bool) -> None:
    from vmgr.origins import policy_sources, sources

    tree, lines = read_tree(installation().config_file)
    config = Config(installation().config_file, tree, lines)
    if user or queue:
        subject = _subject(config, user, queue)
        found = policy_sources(tree, lines, subject)
        values = {key: value for key, value, _ in config.policy_for(subject).rows()}
    else:
        found, values = sources(tree, lines), dict(flat(tree))
    rows = []
    for key in [_known(wanted, values)] if wanted else values:
        (_, layer, line), *over = found[key]
        others: Any = [source._asdict() for source in over]
        if not as_json:
            others = ", ".join(f"{_text(source.value)} ({source.text})" for source in over) or "-"
        rows.append(
            (key, values[key] if as_json else _text(values[key]), layer, line if as_json else line or "-", others)
        )
    print_rows(("key", "value", "layer", "line", "overrides"), rows, as_json=as_json)


def _known(key: str, values: Mapping[str, Any]) -> str:
    if key not in values:
        raise VTorqueError(f"there is no key {key}", code=Code.KEY, hint="`vmgr config show` lists every key")
    return key


def _show_policy(user: str, queue: str, wanted: str, as_json: bool) -> None:
    config = load_config(installation())
    policy = config.policy_for(_subject(config, user, queue))
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


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _origin(key: str, lines: dict[str, int]) -> str:
    return f"line {lines[key]}" if key in lines else "default"
