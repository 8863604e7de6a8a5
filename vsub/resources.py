"""The resource list of `qsub -l`, taken apart and written back as TORQUE reads it.

Facts from `add_verify_resources` of TORQUE 6.1 (src/lib/Libcmds/add_verify_resources.c): items are separated by
commas; a value in which a quote stands before the first comma begins after that quote and ends at the next one of
either kind; in a value without quotes `[…]` protects commas; every item has a value; the last item of a name counts.
"""

from __future__ import annotations

from typing import NamedTuple

from vmgr.errors import Code, VTorqueError
from vsub.options import Option

_BLANKS = " \t\n\v\f\r"
_QUOTES = "'\""


class Resource(NamedTuple):
    """One item of a list, and the option that it stands in."""

    name: str
    value: str
    option: Option


def read_resources(options: tuple[Option, ...]) -> list[Resource]:
    """The items of every `-l`, in order. Raises VTorqueError (VT-USAGE)."""
    return [item for option in options if option.letter == "l" for item in parse_list(option)]


def parse_list(option: Option) -> list[Resource]:
    """The items of one `-l`. Raises VTorqueError (VT-USAGE) for what qsub would refuse."""
    text, at, items = option.value or "", 0, []
    while at < len(text):
        at = _skip_blanks(text, at)
        stop = next((i for i in range(at, len(text)) if text[i] in "=,"), len(text))
        if stop == at:
            raise _illegal(option, "an item has no name")
        if stop == len(text) or text[stop] == ",":
            raise _illegal(option, f"{text[at:stop]!r} has no value")
        name = text[at : next((i for i in range(at, stop) if text[i] in _BLANKS), stop)]
        value, at = _value(text, stop + 1)
        items.append(Resource(name, value, option))
        if text[at : at + 1] == ",":
            at += 1
            if at == len(text):
                raise _illegal(option, "it ends with a comma")
    return items


def _skip_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in _BLANKS:
        at += 1
    return at


def _value(text: str, at: int) -> tuple[str, int]:
    """The value that begins at `at`, and where the text goes on behind it."""
    at = _skip_blanks(text, at)
    comma = text.find(",", at)
    head = text[at : comma if comma >= 0 else len(text)]
    # a single quote goes first, wherever a double one stands
    quote = head.find("'") if "'" in head else head.find('"')
    if quote >= 0:
        at += quote + 1
        end = next((i for i in range(at, len(text)) if text[i] in _QUOTES), len(text))
        after = end
        while text[after : after + 1] and text[after] in _QUOTES:
            after += 1
        return text[at:end], after
    inside, end = False, at
    while end < len(text) and (inside or text[end] != ","):
        inside = text[end] == "[" or (inside and text[end] != "]")
        end += 1
    return text[at:end], end


def write_list(items: list[Resource]) -> str:
    """The text of a `-l` that holds exactly `items`. Raises ValueError for a value that no text stands for."""
    return ",".join(f"{item.name}={_written(item.value)}" for item in items)


def _written(value: str) -> str:
    plain = not any(char in value for char in ",['\"") and value == value.lstrip(_BLANKS)
    if plain:
        return value
    if any(quote in value for quote in _QUOTES):
        raise ValueError(value)
    return f'"{value}"'


def last_of(items: list[Resource]) -> dict[str, Resource]:
    """The item of each name that counts."""
    return {item.name: item for item in items}


def replace_items(options: tuple[Option, ...], dropped: frozenset[str]) -> tuple[Option, ...]:
    """The options without the resources in `dropped`; a `-l` that names none of them stays as it is written."""
    kept: list[Option] = []
    for option in options:
        if option.letter != "l":
            kept.append(option)
            continue
        items = parse_list(option)
        left = [item for item in items if item.name not in dropped]
        if len(left) == len(items):
            kept.append(option)
        elif left:
            kept.append(option._replace(value=_rewritten(left, option)))
    return tuple(kept)


def _rewritten(items: list[Resource], option: Option) -> str:
    try:
        return write_list(items)
    except ValueError as err:
        raise _illegal(option, f"{str(err)!r} can only stand in a -l of its own") from None


def _illegal(option: Option, reason: str) -> VTorqueError:
    return VTorqueError(
        f"illegal -l value {option.value!r} ({option.source}): {reason}",
        code=Code.USAGE,
        hint="write -l name=value[,name=value…]",
    )
