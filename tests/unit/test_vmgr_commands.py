"""What holds for every command of `vmgr`: an example that is right, options that are explained, --json, who may."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from nodesite import REPOSITORY, make_node, short_folder

from vmgr.cli import cli
from vmgr.errors import Code

Path = tuple[str, ...]

NOTHING_TO_SHOW = {
    "ssh": "is what runs in the guest",
    "exec": "is what runs in the guest",
    "cp": "copies",
    "console": "shows what the guest prints",
    "completion": "prints a program for the shell",
    "config compile": "writes the compiled configuration",
    "metrics": "prints the format of Prometheus",
}
"""Commands without --json, and what they do instead of showing something."""

_EXAMPLE = re.compile(r"^\s*Example: vmgr (.*)$", re.MULTILINE)


def commands(group: click.Group = cli, above: Path = ()) -> Iterator[tuple[Path, click.Command]]:
    """Every group and command below `group` that people use, with the words that lead to it."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        yield (*above, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*above, name))


COMMANDS = dict(commands())
LEAVES = {
    path: command for path, command in COMMANDS.items() if not isinstance(command, click.Group) and not command.hidden
}
"""What people run; hidden commands are for vmgr itself."""
ROOTS_OWN = {path: command for path, command in LEAVES.items() if "need_root" in command.callback.__code__.co_names}  # type: ignore[union-attr]

every_command = pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
every_leaf = pytest.mark.parametrize("path", LEAVES, ids=" ".join)


def example(path: Path) -> list[str]:
    """The words after `vmgr` in a command's example, up to where the shell does something with the output."""
    found = _EXAMPLE.findall(COMMANDS[path].help or "")
    assert found, "its help has no line `Example: vmgr ...`"
    words = shlex.split(found[0])
    return words[: next((at for at, word in enumerate(words) if word in ("|", ">", "<")), len(words))]


def read(words: list[str]) -> Path:
    """Let click read a command line; gives the words that lead to its command. Raises what click raises."""
    context = click.Context(cli, info_name="vmgr", **cli.context_settings)
    command: click.Command = cli
    path: Path = ()
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert name is not None and found is not None
        path, command = (*path, name), found
        if isinstance(found, click.Group):
            context = click.Context(found, parent=context, info_name=name)
    try:
        command.make_context(path[-1], list(words), parent=context)
    except click.BadParameter as err:
        absent_file = type(err) is click.BadParameter and err.param and isinstance(err.param.type, click.Path)
        if not absent_file:  # the files of an example are the reader's
            raise
    return path


@every_command
def test_its_example_is_right(path: Path) -> None:
    shown = read(example(path))
    same = COMMANDS[shown] is COMMANDS[path]  # by another name
    assert same or shown[: len(path)] == path


@pytest.mark.parametrize("words", ["image nope", "image show --nope x", "image show", "config show --user"])
def test_a_wrong_example_is_noticed(words: str) -> None:
    with pytest.raises(click.UsageError):
        read(words.split())


@every_command
def test_it_and_its_options_are_explained(path: Path) -> None:
    command = COMMANDS[path]
    assert command.get_short_help_str().strip(), "its help has no first line"
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            assert (option.help or "").strip().endswith((".", ")")), f"{option.opts[0]} has no sentence of help"


@every_command
def test_its_line_in_the_list_of_commands_is_whole(path: Path) -> None:
    group = COMMANDS[path[:-1]] if path[:-1] else cli
    assert isinstance(group, click.Group)
    room = 80 - 2 - 6 - max(len(name) for name, command in group.commands.items() if not command.hidden)
    assert not COMMANDS[path].get_short_help_str(room).endswith("..."), "its first line is too long"


@every_command
def test_its_example_stays_on_one_line(path: Path) -> None:
    assert len("  Example: vmgr " + _EXAMPLE.findall(COMMANDS[path].help or "")[0]) <= 78


@every_leaf
def test_what_it_shows_is_there_for_programs_too(path: Path) -> None:
    options = {name for option in LEAVES[path].params for name in option.opts}
    exempt = " ".join(path) in NOTHING_TO_SHOW
    assert exempt != ("--json" in options), "give it --json, or say in NOTHING_TO_SHOW what it does instead"


def test_only_commands_that_exist_are_exempt() -> None:
    assert set(NOTHING_TO_SHOW) <= {" ".join(path) for path in LEAVES}


def test_some_commands_are_roots_own() -> None:
    assert {("node", "reap"), ("image", "build"), ("image", "add")} <= set(ROOTS_OWN)


_AS_NOBODY = f"""\
import contextlib, importlib, io, json, os, pkgutil, sys
sys.path[:0] = [{str(REPOSITORY)!r}, *sys.argv[2].split(":")]
import vmgr
from vmgr.cli import main
for module in pkgutil.walk_packages(vmgr.__path__, "vmgr."):
    importlib.import_module(module.name)  # while they can be read
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
sys.executable = sys.argv[1]
answers = []
for words in json.loads(sys.argv[3]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    answers.append([status, out.getvalue(), err.getvalue()])
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def refusals() -> dict[Path, str]:
    """The lines with which root's commands are refused to somebody who is not root, and nothing is changed."""
    wanted = {**{path: example(path) for path in ROOTS_OWN}, ("config", "compile"): ["config", "compile"]}
    with short_folder() as base:
        base.chmod(0o755)
        install = make_node(base).install
        before = sorted(base.rglob("*"))
        python, path = install.root / "venv" / "bin" / "python3", ":".join(filter(None, sys.path))
        argv = [sys.executable, "-I", "-c", _AS_NOBODY, str(python), path, json.dumps(list(wanted.values()))]
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, cwd="/", timeout=120, check=True)
        assert sorted(base.rglob("*")) == before or os.geteuid() != 0
    answers = json.loads(done.stdout)
    for words, (status, out, err) in zip(wanted.values(), answers):
        if os.geteuid() == 0 or words != ["config", "compile"]:
            assert (status, out, err.count("\n")) == (Code.ACCESS.status, "", 1), f"{words}: {err}"
    return {path: err for path, (_, _, err) in zip(wanted, answers)}


@pytest.mark.parametrize("path", ROOTS_OWN, ids=" ".join)
def test_who_is_not_root_is_told_so_in_one_line(path: Path, refusals: dict[Path, str]) -> None:
    assert refusals[path].startswith(f"VT-ACCESS: vmgr {' '.join(read(example(path)))} ")


def test_the_compiled_configuration_is_roots(refusals: dict[Path, str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user than the one whose configuration it is")
    assert re.match("VT-ACCESS: cannot write .*; run it as root", refusals["config", "compile"])
