"""The man pages of vmgr and vsub, made from what their --help is made of. docs/generate writes them into man/."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from vmgr import __version__, cli
from vmgr.errors import Code
from vsub.help import help_text

_EXAMPLE = re.compile(r"Example: (.*)")
_ROW = re.compile(r"^  (-\S.*?)(?:(?:  +|\n +)(\S.*))?$", re.MULTILINE)
_SIGNS = {"\\": r"\e", "-": r"\-", "^": r"\(ha", "~": r"\(ti", "`": r"\(ga", "'": r"\(aq", '"': r"\(dq"}


def escape(text: str) -> str:
    """`text` as it is to be read, in the language of man(7); line breaks stay."""
    signs = "".join(_SIGNS.get(c, c if c.isascii() else f"\\[u{ord(c):04X}]") for c in text)
    return re.sub(r"^(?=[.])", r"\\&", signs, flags=re.MULTILINE)


def bold(text: str) -> str:
    return f"\\fB{escape(text)}\\fR"


def vmgr_page() -> str:
    """The page of vmgr with all its commands, each with its options and its example."""
    root = click.Context(cli.cli, info_name="vmgr", **cli.cli.context_settings)
    lines = [*_head("vmgr", "look after images, guests and nodes of vTorque")]
    lines += [".SH SYNOPSIS", f"{bold('vmgr')} {escape('[--debug] COMMAND [ARGUMENT...]')}"]
    lines += [".SH DESCRIPTION", *_paragraphs(cli.cli)]
    lines += [".SH OPTIONS", *_options(root)]
    lines.append(".SH COMMANDS")
    for context in _commands(root):
        lines.append(f'.SS "{escape(context.command_path)}"')
        usage = [piece for piece in context.command.collect_usage_pieces(context) if piece != "[OPTIONS]"]
        words = ["[OPTION...]"] if _shown(context.command) else []
        lines.append(f"{bold(context.command_path)} {escape(' '.join([*words, *usage]))}".rstrip())
        lines += [".PP", *_paragraphs(context.command), *_options(context)]
    return "\n".join([*lines, *_foot("vsub")]) + "\n"


def _commands(above: click.Context) -> Iterator[click.Context]:
    """Every command below a group, in the order of --help; groups themselves are only the way there."""
    assert isinstance(above.command, click.Group)
    for name in above.command.list_commands(above):
        command = above.command.get_command(above, name)
        if command is None or command.hidden:
            continue
        context = click.Context(command, info_name=name, parent=above)
        if isinstance(command, click.Group):
            yield from _commands(context)
        else:
            yield context


def _shown(command: click.Command) -> list[click.Option]:
    return [option for option in command.params if isinstance(option, click.Option) and not option.hidden]


def _options(context: click.Context) -> list[str]:
    lines = []
    for option in _shown(context.command):
        record = option.get_help_record(context)
        assert record is not None
        lines += [".TP", bold(record[0]), escape(record[1])]
    return lines


def _paragraphs(command: click.Command) -> list[str]:
    r"""The command's help. A paragraph after a line with \b alone keeps its lines, as in --help."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(command.help or "").split("\f")[0].strip().split("\n\n"):
        example = _EXAMPLE.fullmatch(paragraph)
        if lines:
            lines.append(".PP")
        if example:
            lines += ["Example:", ".PP", ".RS 4", ".nf", bold(example[1]), ".fi", ".RE"]
        elif paragraph.startswith("\b\n"):
            lines += [".nf", escape(paragraph[2:]), ".fi"]
        else:
            lines.append(escape(" ".join(paragraph.split())))
    return lines


def vsub_page() -> str:
    """The page of vsub: the text of its --help, taken apart."""
    usage, about, rows, last = help_text().strip().split("\n\n")
    lines = [*_head("vsub", "submit a batch job that runs inside virtual machines"), ".SH SYNOPSIS", ".nf"]
    lines += [bold(re.sub(r"^(usage:|      )", "", line).strip()) for line in usage.splitlines()]
    lines += [".fi", ".SH DESCRIPTION", escape(" ".join(about.split())), ".PP", escape(" ".join(last.split()))]
    lines.append(".SH OPTIONS")
    for words, meaning in _ROW.findall(rows):
        lines += [".TP", bold(words), escape(meaning or "Print that, and submit nothing.")]
    return "\n".join([*lines, *_foot("vmgr", "qsub")]) + "\n"


def _head(program: str, about: str) -> list[str]:
    title = f'.TH {program.upper()} 1 "" "vTorque {escape(__version__)}" "User Commands"'
    return [title, ".SH NAME", f"{program} \\- {escape(about)}"]


def _foot(*others: str) -> list[str]:
    """What an exit status means, files, and other pages."""
    lines = [
        ".SH EXIT STATUS",
        ".TP",
        "0",
        "Done.",
        ".TP",
        "2",
        "Refused, with one line that says why; nothing was done.",
    ]
    for code in Code:
        if code.status != 2:
            lines += [".TP", str(code.status), escape(f"{code.text}: {code.value.meaning}; {code.value.remedy}")]
    lines += [".SH FILES", ".TP", ".I PREFIX/etc/vtorque/vtorque.yaml", "The site\\(aqs configuration."]
    return [*lines, ".SH SEE ALSO", *(f".BR {other} (1)" + (" ," if other != others[-1] else "") for other in others)]


def pages() -> dict[str, str]:
    """Every page by the name of its file."""
    return {"vmgr.1": vmgr_page(), "vsub.1": vsub_page()}
