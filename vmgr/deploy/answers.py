"""Answers from a file: a YAML mapping of plain values, one a line, read without a YAML library.

An installation reads it before there are any libraries. What is taken means the same in YAML; everything else is an
error that names the line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vmgr.errors import Code, VTorqueError

MAX_BYTES = 1 << 16
_LINE = re.compile(
    r"(?P<key>[a-z][a-z_-]*):(?:[ ]+(?P<value>\"[^\"\\]*\"|'[^']*'|[A-Za-z0-9/._][A-Za-z0-9/._+,@\[\]-]*))?"
    r"[ ]*(?:[ ]#.*)?"
)
_NOTHING = re.compile(r"[ ]*(?:#.*)?")
_AMBIGUOUS = re.compile(r"(?:~|null|[-+]?[0-9._]+(?:[eE][-+]?[0-9]+)?|0[xob][0-9a-fA-F_]+|\.inf|\.nan)", re.IGNORECASE)


def parse(text: str, source: str, known: Mapping[str, type]) -> dict[str, object]:
    """The answers in a text: `known` has the keys, and whether each is a text, a number or yes or no.

    Raises VTorqueError: VT-KEY for a key that is unknown or there twice, VT-VALUE for a value or line that is none.
    """
    found: dict[str, object] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if _NOTHING.fullmatch(line) or (number == 1 and line == "---"):
            continue
        where = f"{source} line {number}"
        match = _LINE.fullmatch(line)
        if match is None or not line.isprintable():
            raise VTorqueError(
                f"{where}: {line!r} is no answer", code=Code.VALUE, hint="`key: value` is needed; quote what is unusual"
            )
        key, value = match["key"], match["value"]
        if key not in known or key in found:
            why = "twice" if key in found else "unknown"
            raise VTorqueError(f"{where}: {key}: {why}", code=Code.KEY, hint=f"there are: {', '.join(known)}")
        if value is None:
            raise VTorqueError(f"{where}: {key} has no value", code=Code.VALUE, hint="leave the line out")
        found[key] = _value(value, known[key], f"{where}: {key}: {value}")
    return found


def _value(text: str, kind: type, where: str) -> object:
    quoted = text[0] in "\"'"
    plain = text[1:-1] if quoted else text
    if kind is bool:
        if quoted or plain not in ("true", "false"):
            raise VTorqueError(where, code=Code.VALUE, hint="true or false is needed")
        return plain == "true"
    if kind is int:
        if quoted or not re.fullmatch(r"0|[1-9][0-9]{0,8}", plain):
            raise VTorqueError(where, code=Code.VALUE, hint="a whole number is needed")
        return int(plain)
    if not quoted and (_AMBIGUOUS.fullmatch(plain) or plain.lower() in ("true", "false", "yes", "no", "on", "off")):
        raise VTorqueError(where, code=Code.VALUE, hint="a text is needed: put it in quotes")
    return plain
