"""`vmgr completion`, and what shells may complete: images, recipes, the caller's jobs on this node.

An argument or option is completed by what it is called: one whose metavar starts with IMAGE (`IMAGE[@REVISION]`),
RECIPE, JOB (`JOB[:RANK]`), FILE or DIR, or that is named so, takes those.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import click

from vmgr.config import load_config
from vmgr.errors import VTorqueError
from vmgr.node.client import state_of
from vmgr.paths import installation

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

PROGRAM = "vmgr"
VARIABLE = "_VMGR_COMPLETE"
"""Set by the shell's function when it asks for completions."""
SHELLS = ("bash", "zsh", "fish")
ANSWER_SECONDS = 1.0

_SAFE = re.compile(r"[A-Za-z0-9._@:+\[\]-]+")
"""What a shell's function can be given: it splits answers at blanks and commas, and expands patterns."""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what makes a shell complete the commands of vmgr.

    `install.sh` puts it where the shells look for it, below the installation's share/. Elsewhere: source it from
    ~/.bashrc or ~/.zshrc (after compinit), or write it to ~/.config/fish/completions/vmgr.fish.

    Example: vmgr completion bash
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(click.Group(), {}, PROGRAM, VARIABLE).source().strip("\n"))


def complete_names(group: click.Group) -> None:
    """Let every argument and option below `group` be completed by what it is called; only a shell needs it."""
    for command in group.commands.values():
        if isinstance(command, click.Group):
            complete_names(command)
        for parameter in command.params:
            kind = _kind(parameter)
            if kind:
                parameter.shell_complete = _completer(kind)  # type: ignore[method-assign, assignment]


def _kind(parameter: click.Parameter) -> str:
    """IMAGE, JOB and so on, by the parameter's metavar, else its name; empty for none of them."""
    named = parameter.metavar or ""
    names = [
        "GUEST" if named.startswith("JOB[:RANK]") else named,
        *(name.lstrip("-").upper() for name in parameter.opts),
    ]
    known = {*_SOURCES, *_PATHS}
    return next((found[0] for name in names if (found := re.match("[A-Z]+", name)) and found[0] in known), "")


def _completer(kind: str) -> Callable[[click.Context, str], list[CompletionItem]]:
    from click.shell_completion import CompletionItem

    def complete(context: click.Context, incomplete: str) -> list[CompletionItem]:
        if kind in _PATHS:
            return [CompletionItem(incomplete, type=_PATHS[kind])]  # the shell knows better
        try:
            names = sorted(set(_SOURCES[kind](incomplete)))
        except (OSError, VTorqueError):  # the next command says what is wrong; here it would garble the line
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete) and _SAFE.fullmatch(name)]

    return complete


def _images(incomplete: str) -> Iterator[str]:
    """Names, and the revisions of one that is named."""
    from vmgr.images.pool import Pool

    pool = Pool(load_config(installation()).images.pool)
    name, at, _ = incomplete.partition("@")
    yield from (f"{name}@{revision}" for revision in pool.revisions(name)) if at else pool.names()


def _recipes(_: str) -> Iterator[str]:
    from vmgr.commands.images import recipe_folders
    from vmgr.images.recipe import known_recipes

    yield from known_recipes(recipe_folders())


def _running(_: str) -> Iterator[str]:
    """The jobs with guests on this node that the caller may look at."""
    sockets = sorted((load_config(installation()).paths.run / "jobs").glob("*/*.sock"))
    for answer in asyncio.run(_ask_all(sockets)):
        yield str(answer.get("job_id", ""))


def _jobs(incomplete: str) -> Iterator[str]:
    """The same, and those with a log here."""
    yield from _running(incomplete)
    config = load_config(installation())
    if config.logging.file:
        for log in (Path(config.logging.file).parent / "jobs").glob("*.log"):
            if os.access(log, os.R_OK):
                yield log.name[: -len(".log")]


async def _ask_all(sockets: list[Path]) -> list[dict[str, Any]]:
    answers = await asyncio.gather(*(state_of(socket, ANSWER_SECONDS) for socket in sockets))
    return [answer for answer in answers if answer]


_SOURCES = {"IMAGE": _images, "RECIPE": _recipes, "JOB": _jobs, "GUEST": _running}
_PATHS = {"FILE": "file", "DIR": "dir"}
"""What the shell itself completes."""
