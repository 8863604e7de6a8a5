"""The command line of the embedded qsub and the `#PBS` lines of a script, read into one value."""

from __future__ import annotations

import getopt
import re
import shlex
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from vsub.engines.local import dates, depend, resources
from vsub.engines.local.depend import Dependency
from vsub.engines.local.resources import Item

LETTERS = "a:A:b:c:C:d:D:e:EfF:hi:Ij:J:k:K:l:L:m:M:nN:o:p:P:q:r:S:t:T:u:v:Vw:W:Xxz"
"""Every letter of TORQUE's qsub, so that values are told from operands."""
UNSUPPORTED = frozenset("bDEfiJKLMnPuX")

_NAME = re.compile(r"[A-Za-z0-9][!-.0-~]{0,255}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VARIABLE = re.compile(r"[A-Za-z_][^=\s]{0,1023}")


class UsageError(Exception):
    """A command line or directive that cannot be honoured; one line without the command's name."""


class Options(NamedTuple):
    """What was asked for: None and empty where nothing was."""

    name: Optional[str] = None
    account: Optional[str] = None
    prefix: Optional[str] = None
    queue: Optional[str] = None
    arguments: Optional[str] = None
    init_dir: Optional[str] = None
    work_dir: Optional[str] = None
    output: Optional[str] = None
    error: Optional[str] = None
    join: Optional[str] = None
    keep: Optional[str] = None
    shells: Optional[tuple[str, ...]] = None
    umask: Optional[int] = None
    all_variables: Optional[bool] = None
    silent: Optional[bool] = None
    variables: Optional[tuple[tuple[str, Optional[str]], ...]] = None
    hold: Optional[bool] = None
    interactive: Optional[bool] = None
    execute: Optional[bool] = None
    execute_early: Optional[bool] = None
    """Whether an -x stood before any -I of its own command line."""
    priority: Optional[int] = None
    rerunnable: Optional[bool] = None
    execute_at: Optional[int] = None
    array: Optional[str] = None
    job_type: Optional[str] = None
    depend: Optional[tuple[Dependency, ...]] = None
    resources: tuple[Item, ...] = ()


def valid_name(name: str) -> bool:
    """Whether this can be a job's name: printable, no blank, no slash, begins with a letter or digit."""
    return _NAME.fullmatch(name) is not None


def valid_word(word: str) -> bool:
    """Whether this can be the name of a queue or an account."""
    return _WORD.fullmatch(word) is not None


def valid_variable(name: str) -> bool:
    """Whether this can be the name of an environment variable."""
    return _VARIABLE.fullmatch(name) is not None


def _umask(value: str) -> int:
    if not re.fullmatch(r"[0-7]{1,4}", value, re.ASCII) or int(value, 8) > 0o777:
        raise UsageError(f"illegal -W value: umask={value} is not an octal number up to 777")
    return int(value, 8)


def _extended(fields: dict[str, Any], value: str) -> None:
    """One attribute, `NAME=VALUE`: all that follows the first `=` is its value, commas included."""
    name, _, text = value.partition("=")
    name, text = name.strip(), re.sub("[\"']", "", text).strip()
    if name == "umask":
        fields["umask"] = _umask(text)
    elif name == "depend":
        try:
            fields["depend"] = depend.parse(text)
        except ValueError as error:
            raise UsageError(f"illegal -W dependency value: {text!r} {error}".rstrip()) from error
    else:
        raise UsageError(f"-W {name} is not supported by the embedded batch system, only umask=OCT and depend=LIST")


def _variables(value: str) -> list[tuple[str, Optional[str]]]:
    found: list[tuple[str, Optional[str]]] = []
    for part in resources.split_list(value):
        name, equals, text = part.strip().partition("=")
        if not valid_variable(name):
            raise UsageError(f"illegal -v value: {part!r} does not begin with a variable's name")
        found.append((name, text if equals else None))
    return found


def _choice(letter: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise UsageError(f"illegal -{letter} value: {value!r} is none of {', '.join(allowed)}")
    return value


def _checked(letter: str, value: str, good: bool, what: str) -> str:
    if not good:
        raise UsageError(f"illegal -{letter} value: {value!r} is not {what}")
    return value


def _shells(value: str) -> tuple[str, ...]:
    shells = tuple(part.strip() for part in resources.split_list(value))
    if not all(shell.startswith("/") for shell in shells):
        raise UsageError(f"illegal -S value: {value!r} is not a list of absolute paths, each with @host or without")
    return shells


def _priority(value: str) -> int:
    if not re.fullmatch(r"\s*[-+]?\d{1,6}", value, re.ASCII) or not -1024 <= int(value) <= 1023:
        raise UsageError(f"illegal -p value: {value!r} is not a number from -1024 to 1023")
    return int(value)


def _set_job(fields: dict[str, Any], letter: str, value: str) -> None:
    """As `_set`, for when and how a job runs."""
    if letter == "a":
        fields["execute_at"] = dates.epoch(value.strip(), time.localtime())
    elif letter == "c":
        _choice("c", value, ("n", "none"))
    elif letter == "h":
        fields["hold"] = True
    elif letter == "I":
        fields["interactive"] = True
    elif letter == "m":
        if value.strip() != "n":
            raise UsageError(f"option -m {value} is not supported by the embedded batch system, only -m n")
    elif letter == "p":
        fields["priority"] = _priority(value)
    elif letter == "r":
        fields["rerunnable"] = _choice("r", value, ("y", "n")) == "y"
    elif letter == "t":
        fields["array"] = _checked("t", value, bool(value), "a range")
    elif letter == "T":
        fields["job_type"] = _checked("T", value, valid_word(value), "the end of a hook's name")
    elif letter == "x":
        fields["execute"], fields["execute_early"] = True, not fields.get("interactive")


def _set(fields: dict[str, Any], letter: str, value: str) -> None:
    """Put the meaning of one option into `fields`."""
    if letter == "A":
        fields["account"] = _checked("A", value, valid_word(value), "an account")
    elif letter == "C":
        fields["prefix"] = _checked("C", value, not any(c.isspace() for c in value), "a prefix without blanks")
    elif letter == "d":
        fields["init_dir"] = _checked("d", value, bool(value), "a directory")
    elif letter == "w":
        fields["work_dir"] = _checked("w", value, bool(value), "a directory")
    elif letter in "oe":
        fields["output" if letter == "o" else "error"] = _checked(letter, value, bool(value), "a path")
    elif letter == "F":
        fields["arguments"] = _checked("F", value, "\n" not in value, "one line of arguments")
    elif letter == "j":
        fields["join"] = _choice("j", value, ("oe", "eo", "n"))
    elif letter == "k":
        fields["keep"] = _choice("k", value, ("o", "e", "oe", "eo", "n"))
    elif letter == "N":
        fields["name"] = _checked("N", value, valid_name(value), "a job name")
    elif letter == "q":
        fields["queue"] = _checked("q", value, valid_word(value.partition("@")[0] or "batch"), "a queue")
    elif letter == "S":
        fields["shells"] = _shells(value)
    elif letter == "V":
        fields["all_variables"] = True
    elif letter == "z":
        fields["silent"] = True
    elif letter == "v":
        fields["variables"] = tuple(_variables(value))
    elif letter == "W":
        _extended(fields, value)
    else:
        _set_job(fields, letter, value)


def _unsupported(option: str) -> UsageError:
    dashes = "--" if len(option) > 1 else "-"
    return UsageError(f"option {dashes}{option} is not supported by the embedded batch system")


def parse(arguments: list[str]) -> tuple[Options, list[str]]:
    """Read options as qsub does: (options, operands). Raises UsageError."""
    try:
        pairs, operands = getopt.gnu_getopt(arguments, LETTERS)
    except getopt.GetoptError as error:
        if "requires argument" in error.msg:
            raise UsageError(f"option -{error.opt} needs a value") from error
        raise _unsupported(error.opt) from error
    fields: dict[str, Any] = {}
    items: dict[str, str] = {}
    for option, value in pairs:
        letter = option[1:]
        try:
            if letter in UNSUPPORTED:
                raise _unsupported(letter)
            if letter == "l":
                items.update(resources.parse_list(value))
            else:
                _set(fields, letter, value)
        except ValueError as error:
            raise UsageError(f"illegal -{letter} value: {error}") from error
    return Options(resources=tuple(items.items()), **fields), operands


def directives(script: str, prefix: str = "#PBS") -> list[tuple[int, str]]:
    """The lines with `prefix` before the first executable line: (line number, what follows the prefix).

    An empty prefix means that the script is not looked at (`qsub -C ''`).
    """
    found: list[tuple[int, str]] = []
    if not prefix:
        return found
    for number, line in enumerate(script.split("\n"), 1):
        if line.startswith(prefix) and (len(line) == len(prefix) or line[len(prefix)].isspace()):
            found.append((number, line[len(prefix) :].strip()))
        elif line.strip() and not line.lstrip().startswith("#") and not (number == 1 and line.startswith(":")):
            break
    return found


def parse_script(script: str, prefix: str = "#PBS") -> Options:
    """The options in a script's directives; of two that disagree the later one counts. Raises UsageError."""
    options = Options()
    for number, text in directives(script, prefix):
        try:
            words = shlex.split(text, comments=True)
            options = _later(options, after_interactive(parse(words)[0], options))
        except (UsageError, ValueError) as error:
            raise UsageError(f"directive error: line {number}: {prefix} {text}: {error}") from error
    return options


def after_interactive(new: Options, earlier: Options) -> Options:
    """`new`, with which qsub goes on after `earlier`. Raises UsageError for an -x that no -I came before."""
    if new.execute_early and not earlier.interactive:
        raise UsageError("'-x' invalid on non-interactive job")
    return new


def _later(old: Options, new: Options) -> Options:
    """Both directives, `new` counting where they disagree; resources keep their first place."""
    merged = merge(new, old)
    return merged._replace(resources=tuple({**dict(old.resources), **dict(new.resources)}.items()))


def merge(first: Options, second: Options) -> Options:
    """`first` where it says something, else `second`. Resources are joined, with the names in `first` winning."""
    fields: dict[str, Any] = {
        name: mine if mine is not None else theirs
        for name, mine, theirs in zip(Options._fields, first, second)
        if name != "resources"
    }
    return Options(resources=tuple(resources.merge(first.resources, second.resources)), **fields)


def script_variables(options: Options, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that travel with the job: all with -V, those of the last -v, with values where they have none."""
    variables: dict[str, str] = {}
    if options.all_variables:
        variables.update((name, value) for name, value in environment.items() if valid_variable(name))
    for name, value in options.variables or ():
        variables[name] = environment.get(name, "") if value is None else value
    return variables
