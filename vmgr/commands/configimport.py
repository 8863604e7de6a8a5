"""`vmgr config import`."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import click

from vmgr.commands.table import echo
from vmgr.config import MAX_CONFIG_BYTES
from vmgr.errors import Code, VTorqueError, printable

if TYPE_CHECKING:
    from vmgr.migration.convert import Converted
    from vmgr.migration.shellfile import Unread


@click.command("import")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--output", "-o", metavar="NEW", type=click.Path(path_type=Path), help="Write the configuration there, a new file."
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def import_(file: Path, output: Optional[Path], as_json: bool) -> None:
    """Turn a file of the bash vTorque of 2018 into a configuration.

    FILE is its common/config.sh. It is read, never run. What comes out is a whole configuration, checked, with a
    comment for each parameter that was dropped, and why: for parts that only running the file would tell, too. Without
    -o it goes to standard output, and nothing is changed.

    Example: vmgr config import vTorque/common/config.sh -o vtorque.yaml
    """
    from vmgr.migration.convert import convert
    from vmgr.newfile import new_file

    converted = convert(_read(file))
    text = "".join(f"{line}\n" for line in _lines(file, converted))
    if output is not None:
        if os.path.lexists(output):
            raise _is_there(output)
        try:
            with new_file(output, 0o644) as fd, open(fd, "w", encoding="utf-8", closefd=False) as stream:
                stream.write(text)
        except FileExistsError:
            raise _is_there(output) from None
        except OSError as err:
            raise VTorqueError(f"cannot write {output}: {err.strerror}", code=Code.VALUE) from err
    if as_json:
        click.echo(json.dumps(_plain(file, output, converted), indent=1))
    elif output is None:
        click.echo(text, nl=False)
    else:
        for line in _comments(converted):
            echo(line)
        echo(f"{output}: written, {len(converted.carried)} parameters carried over, {len(converted.dropped)} dropped")


def _is_there(output: Path) -> VTorqueError:
    return VTorqueError(f"{output} is there already", code=Code.VALUE, hint="nothing was written; name a new file")


def _read(file: Path) -> str:
    """The text of the old file. Raises VTorqueError (VT-VALUE) for one that cannot be a configuration."""
    try:
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise VTorqueError(f"{file} is no regular file", code=Code.VALUE, hint="name a common/config.sh")
            data = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as err:
        raise VTorqueError(f"cannot read {file}: {err.strerror}", code=Code.VALUE) from err
    if len(data) > MAX_CONFIG_BYTES:
        raise VTorqueError(f"{file} is larger than {MAX_CONFIG_BYTES} bytes", code=Code.VALUE)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        raise VTorqueError(f"{file} line {line}: not UTF-8", code=Code.VALUE, hint="convert it with iconv") from err
    for sign, what, hint in (("\0", "a NUL character", None), ("\r", "a carriage return", "sed -i 's/\\r$//' FILE")):
        if sign in text:
            line = text.count("\n", 0, text.index(sign)) + 1
            raise VTorqueError(f"{file} line {line}: {what}, which bash would not take", code=Code.VALUE, hint=hint)
    return text


def _lines(file: Path, converted: Converted) -> Iterator[str]:
    """The new file: our configuration, and as comments what became of the old one."""
    import yaml

    yield f"# made by `vmgr config import` from {printable(str(file))}"
    if converted.tree:
        yield from yaml.safe_dump(converted.tree, sort_keys=False, default_flow_style=False).splitlines()
    else:
        yield "{}"
    yield from (f"# {line}" for line in _comments(converted))


def _comments(converted: Converted) -> Iterator[str]:
    for note in _notes(converted):
        yield f"note: {printable(note)}"
    for item in converted.dropped:
        yield printable(f"dropped: {item.parameter} (line {item.line}): {item.reason}")
    for part in converted.unread:
        yield printable(f"not read: {_where(part)}: {part.reason}")


def _where(part: Unread) -> str:
    return f"lines {part.first} to {part.last}" if part.last > part.first else f"line {part.first}"


def _notes(converted: Converted) -> Iterator[str]:
    """What to see to with the values that were carried over, and which of them nodes will refuse."""
    from vmgr.node.abilities import beyond_nodes, provided_by
    from vmgr.schema import check_config

    yield from dict.fromkeys(converted.notes)
    tree = check_config(converted.tree)
    yield from beyond_nodes(tree["policy"], tree["components"], provided_by(tree))


def _plain(file: Path, output: Optional[Path], converted: Converted) -> dict[str, Any]:
    return {
        "file": str(file),
        "output": None if output is None else str(output),
        "configuration": converted.tree,
        "carried": [item._asdict() for item in converted.carried],
        "dropped": [item._asdict() for item in converted.dropped],
        "unread": [part._asdict() for part in converted.unread],
        "notes": list(_notes(converted)),
    }
