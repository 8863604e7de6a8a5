"""Words of bash, read and never run: what an assignment's value is where that can be told from the text alone.

The rules are those of bash(1), "QUOTING" and "EXPANSION". What needs a command, a pattern or another variable to be
known is not worked out but named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, Optional, Union

MAX_VALUE = 4096
"""Longest value: `A="$A$A"` over and over would double one without end."""

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_END = frozenset(" \t\n;&|<>()")
_LITERAL = re.compile(r"[^\s;&|<>()\\'\"$`~*?\[\]{}:#]+")

Value = Union[str, tuple[str, ...]]


class Lost(Exception):
    """The text cannot be followed from a place on: `at` is its position."""

    def __init__(self, at: int, reason: str) -> None:
        super().__init__(reason)
        self.at = at
        self.reason = reason


class Word(NamedTuple):
    """A word of the text: `start` to `end`; its `value`, or the `reason` why that cannot be told."""

    start: int
    end: int
    value: Optional[Value]
    reason: str = ""


class Reader:
    """Reads words of `text`. `values` are the variables that `$NAME` may refer to."""

    def __init__(self, text: str, values: Mapping[str, Value]) -> None:
        self.text = text
        self.values = values

    def word(self, start: int, *, after: Optional[int] = None, element: bool = False) -> Word:
        """The word at `start`; with `after`, its value is only what stands from there on, as of an assignment.

        In an `element` of an array more is expanded than in an assignment. Raises Lost.
        """
        text, at = self.text, start if after is None else after
        parts: list[str] = []
        reason = ""
        begins = True
        while at < len(text) and text[at] not in _END:
            char, why, part = text[at], "", ""
            if char == "\\":
                part, at = "" if text[at + 1 : at + 2] == "\n" else text[at + 1 : at + 2], at + 2
            elif char == "'":
                part, at = self._single(at)
            elif char == '"':
                part, why, at = self._double(at)
            elif char in "$`":
                part, why, at = self._expansion(at, quoted=False)
                if element and not why:
                    why = "an expansion without quotes"
            else:
                found = _LITERAL.match(text, at)
                part, at = found[0] if found else char, found.end() if found else at + 1
                if char == "~" and begins:
                    why = "a home directory (~)"
                elif element and char in "*?[]{}":
                    why = "a pattern"
            begins = char == ":"
            reason = reason or why
            parts.append(part)
        value = "".join(parts)
        if not reason and len(value) > MAX_VALUE:
            reason = f"more than {MAX_VALUE} characters"
        return Word(start, min(at, len(text)), None if reason else value, reason)

    def array(self, start: int, opening: int) -> Word:
        """The word at `start` that gives a variable the array whose parenthesis is at `opening`. Raises Lost."""
        at, reason = opening + 1, ""
        elements: list[str] = []
        while True:
            at = self.blanks(at, lines=True)
            char = self.text[at : at + 1]
            if char == ")":
                return Word(start, at + 1, None if reason else tuple(elements), reason)
            if not char or char in _END:
                raise Lost(opening, "an array that does not end")
            word = self.word(at, element=True)
            reason = reason or word.reason
            if len(elements) >= MAX_VALUE:
                reason = reason or f"more than {MAX_VALUE} elements"
            elif isinstance(word.value, str):
                elements.append(word.value)
            at = word.end

    def blanks(self, at: int, *, lines: bool = False) -> int:
        """Where the next thing stands that is neither blank nor comment; with `lines` on this line or a later one."""
        text = self.text
        while at < len(text):
            if text[at] in " \t" or (lines and text[at] == "\n"):
                at += 1
            elif text.startswith("\\\n", at):
                at += 2
            elif text[at] == "#":
                end = text.find("\n", at)
                at = len(text) if end < 0 else end
            else:
                break
        return at

    def _single(self, at: int) -> tuple[str, int]:
        end = self.text.find("'", at + 1)
        if end < 0:
            raise Lost(at, "a quote that does not end")
        return self.text[at + 1 : end], end + 1

    def _double(self, opening: int) -> tuple[str, str, int]:
        text, at, reason = self.text, opening + 1, ""
        parts: list[str] = []
        while at < len(text):
            char = text[at]
            if char == '"':
                return "".join(parts), reason, at + 1
            if char == "\\" and text[at + 1 : at + 2] in ("$", "`", '"', "\\", "\n"):
                parts.append("" if text[at + 1] == "\n" else text[at + 1])
                at += 2
            elif char in "$`":
                part, why, at = self._expansion(at, quoted=True)
                reason = reason or why
                parts.append(part)
            else:
                parts.append(char)
                at += 1
        raise Lost(opening, "a quote that does not end")

    def _expansion(self, at: int, *, quoted: bool) -> tuple[str, str, int]:
        """What stands for the expansion at `at`, or why that cannot be told; and where it ends."""
        text = self.text
        if text[at] == "`":
            end = re.compile(r"(?:[^`\\]|\\.)*`", re.DOTALL).match(text, at + 1)
            if not end:
                raise Lost(at, "a quote that does not end")
            return "", "the output of a command", end.end()
        following = text[at + 1 : at + 2]
        if following == "(":
            return "", "the output of a command", self._closed(at, ")")
        if following == "{":
            simple = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}").match(text, at + 1)
            if simple:
                return (*self._variable(simple[1]), simple.end())
            return "", "an expansion", self._closed(at, "}")
        if following == "'" and not quoted:
            raise Lost(at, "a quote of the form $'…'")
        if following == '"' and not quoted:
            raise Lost(at, 'a quote of the form $"…"')
        if following == "[":
            raise Lost(at, "arithmetic of the form $[…]")
        name = NAME.match(text, at + 1)
        if name:
            return (*self._variable(name[0]), name.end())
        if following and following in "0123456789@*#?$!-":
            return "", f"${following}", at + 2
        return "$", "", at + 1

    def _variable(self, name: str) -> tuple[str, str]:
        value = self.values.get(name)
        if isinstance(value, str):
            return value, ""
        return "", f"${name}, which this file does not set" if value is None else f"${name}, which is an array"

    def _closed(self, start: int, closing: str) -> int:
        """The end of `$(…)` or `${…}` at `start`, over what is nested in it. Raises Lost."""
        text, at = self.text, start + 2
        stack = [closing]
        while at < len(text):
            char, inside = text[at], stack[-1]
            at += 1
            if char == "\\":
                at += 1
            elif char == inside:
                stack.pop()
                if not stack:
                    return at
            elif char == "`" or (char == "<" and text.startswith("<", at)):
                raise Lost(start, "an expansion too deep to be followed")
            elif text.startswith(("$(", "${"), at - 1):
                stack.append({"(": ")", "{": "}"}[text[at]])
                at += 1
            elif char == '"':
                stack.append('"')
            elif inside == '"':
                continue
            elif char == "'":
                if '"' in stack or inside == "}":
                    raise Lost(start, "an expansion too deep to be followed")
                at = self._single(at - 1)[1]
            elif inside == ")":
                if char == "(":
                    stack.append(")")
                elif char == "#" and text[at - 2] in " \t\n;(":
                    at = len(text) if text.find("\n", at) < 0 else text.find("\n", at)
                elif char == "c" and re.compile(r"(?<![\w-])case(?![\w-])").match(text, at - 1):
                    raise Lost(start, "an expansion too deep to be followed")
        raise Lost(start, "an expansion that does not end")
