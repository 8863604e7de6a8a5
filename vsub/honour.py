"""What `qsub` can do and a guest job cannot (yet): refused by name, never dropped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

from vmgr.errors import Code, VTorqueError
from vmgr.units import parse_count
from vsub.options import Option

_NOT_YET = {
    "I": "interactive jobs do not run in guests yet",
    "x": "interactive jobs do not run in guests yet",
    "X": "X11 is not forwarded from guests",
    "t": "job arrays do not run in guests yet",
    "T": "vTorque's own hooks must run",
    "F": "arguments do not reach a script in a guest yet",
    "P": "a guest job is submitted by its own user",
    "J": "a guest job is submitted by its own user",
    "D": "the root folder of a guest is its own",
}
_ATTRIBUTES = {
    "interactive": "I",
    "job_array_request": "t",
    "jobtype": "T",
    "job_arguments": "F",
    "proxy_user": "P",
    "init_work_dir": "w",
}
"""Attributes of `-W` that are another way to write an option."""

_HOOKS = ("prologue", "epilogue")


def check_options(options: tuple[Option, ...], user: str) -> None:
    """Refuse what a guest job of `user` cannot honour. `options` are in qsub's order: the last one wins.

    Raises VTorqueError (VT-OPTION).
    """
    last = {option.letter: option for option in options}
    for option in options:
        if option.letter in _NOT_YET:
            raise _refused(option, _NOT_YET[option.letter])
        if option.letter == "W":
            _check_attributes(option)
    if "u" in last:
        _check_users(last["u"], user)
    if "c" in last and (last["c"].value or "").strip() not in ("n", "none"):
        raise _refused(last["c"], "a guest is not checkpointed by the batch system")
    _check_resources(options)


def job_shell(option: Optional[Option]) -> Optional[str]:
    """The interpreter in `-S path[@host][,…]`; None when none is asked for."""
    if option is None or option.value is None:
        return None
    entries = [entry.partition("@") for entry in option.value.split(",")]
    path = next((path for path, at, _ in entries if not at), entries[0][0])
    if not path.startswith("/"):
        raise VTorqueError(f"{option} ({option.source}) names no absolute path", code=Code.VALUE)
    return path


def _check_attributes(option: Option) -> None:
    for item in (option.value or "").split(","):
        key = item.partition("=")[0].strip()
        if "=" in item and key in _ATTRIBUTES:
            letter = _ATTRIBUTES[key]
            raise _refused(option, _NOT_YET.get(letter, f"write it as -{letter}"))


def _check_users(option: Option, user: str) -> None:
    names = [entry.partition("@")[0].strip() for entry in (option.value or "").split(",")]
    if any(name != user for name in names):
        raise _refused(option, f"a guest job runs as the user who submits it, {user}")


def _check_resources(options: tuple[Option, ...]) -> None:
    """Hold the resources that count, the last of each name, against what one node's guests can give."""
    wanted: dict[str, tuple[str, Option]] = {}
    for option in options:
        if option.letter == "L" and _tasks(option.value or "") != 1:
            raise _refused(option, "guests run on one node yet")
        if option.letter == "l":
            for name, value in split_resources(option.value or ""):
                wanted[name] = (value, option)
    for name, (value, option) in wanted.items():
        if name in _HOOKS:
            raise _refused(option, f"the job's {name} is taken by vTorque; -vm vm_{name}=FILE runs one in the guest")
        if (name in ("nodes", "neednodes") and not _one_node(value)) or (
            name in ("procs", "size") and parse_count(value) not in (0, 1)
        ):
            raise _refused(option, "guests run on one node yet")


def split_resources(text: str) -> Iterator[tuple[str, str]]:
    """The resources in the value of `-l`: `name=value` separated by commas that stand outside of quotes."""
    start, quote = 0, ""
    for at, char in enumerate(text + ","):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        if char == "," and (not quote or at == len(text)):
            name, _, value = text[start:at].partition("=")
            yield name.strip(), value.strip().strip("\"'")
            start = at + 1


def _one_node(value: str) -> bool:
    """Whether a `nodes=` value is one node: `1`, `1:ppn=4`, `host:ppn=2`."""
    first = value.partition("#")[0].partition(":")[0].strip()
    count = parse_count(first)
    return "+" not in value and (count == 1 or (count is None and not first[:1].isdigit()))


def _tasks(value: str) -> Optional[int]:
    """The number of tasks in a value of `-L`, such as `tasks=1:lprocs=4`."""
    name, _, count = value.partition(":")[0].partition("=")
    return parse_count(count) if name.strip() == "tasks" else 1


def _refused(option: Option, reason: str) -> VTorqueError:
    return VTorqueError(
        f"{option} ({option.source}) cannot be honoured in a guest: {reason}",
        code=Code.OPTION,
        hint="leave it out, or add -vm off",
    )
