"""The assignments of a bash file, read without running anything.

What is set at the file's outer level is read; what stands in a condition, a loop or a function, and every command, is
not, because only running it would tell what it does. All of that is named with its lines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from vmgr.migration.shellstatement import ASSIGNMENT, DECLARES, read_statement
from vmgr.migration.shellwords import NAME, Lost, Reader, Value, Word

_FLAGS = re.compile(r"-[arxg]+")
_SHELLS_OWN = re.compile(
    r"BASH.*|COMP_.*|EPOCH.*|DIRSTACK|FUNCNAME|GROUPS|HISTCMD|IFS|LINENO|OPT.*|PIPESTATUS|POSIXLY_CORRECT|RANDOM"
    r"|SECONDS|SRANDOM|_"
)
_FIXED = re.compile(r"BASHOPTS|BASH_VERSINFO|EUID|PPID|SHELLOPTS|UID")


class Assigned(NamedTuple):
    """A value that the file gives a variable, and the line (from 1) where it does."""

    value: Value
    line: int


class Unread(NamedTuple):
    """Lines that were not read, why, and the variables that are set in them."""

    first: int
    last: int
    reason: str
    names: tuple[str, ...]


class ShellFile(NamedTuple):
    """What a file sets, by name, and what of it was not read. A variable is in `values` only if all of it was."""

    values: dict[str, Assigned]
    unread: list[Unread]


def read_shell(text: str, known: Mapping[str, str]) -> ShellFile:
    """The assignments in `text`; `known` are variables that others have set before."""
    return _File(text, known).read()


class _File:
    def __init__(self, text: str, known: Mapping[str, str]) -> None:
        self._text = text
        self._values: dict[str, Value] = dict(known)
        self._lines: dict[str, int] = {}
        self._fixed: set[str] = set()
        self._elsewhere: set[str] = set()
        self._unread: list[Unread] = []
        self._reader = Reader(text, self._values)
        self._counted = (0, 1)

    def read(self) -> ShellFile:
        at = self._reader.blanks(0, lines=True)
        while at < len(self._text):
            try:
                statement = read_statement(self._reader, at)
                read = not statement.reason and self._assign(statement.words)
            except Lost as lost:
                self._give_up(at, f"{lost.reason}: from here on nothing was read")
                break
            if not read:
                command = self._text[at : statement.end]
                first = command.split(None, 1)[0].rstrip(";")[:40]
                self._skip(at, statement.end, statement.reason or f"the command {first}", statement.names)
                if statement.is_function or any(word.value in DECLARES for word in statement.words):
                    self._elsewhere.update(statement.names)
                if re.fullmatch(r"(?:exit|return)(?:[ \t]+[0-9]{1,3})?[ \t]*;?", command):
                    self._give_up(statement.end, "after the end that this command makes", reached=False)
                    break
                if self._is_end(statement.words) or any(map(self._is_fixed, statement.names)):
                    self._give_up(statement.end, "perhaps after the end that a command makes")
                    break
            at = self._reader.blanks(statement.end, lines=True)
        values = {name: Assigned(self._values[name], line) for name, line in self._lines.items()}
        return ShellFile(values, self._unread)

    def _is_end(self, words: list[Word]) -> bool:
        """Whether the first of the words that is no assignment ends the shell; what a condition may end goes on."""
        raws = (self._text[word.start : word.end] for word in words)
        return next((raw for raw in raws if not ASSIGNMENT.match(raw)), "") in ("exit", "return", "exec")

    def _is_fixed(self, name: str) -> bool:
        """Whether bash gives up where this variable is set."""
        return name in self._fixed or _FIXED.fullmatch(name) is not None

    def _line(self, at: int) -> int:
        """The line of a position; positions are asked for in their order."""
        before, line = self._counted
        if at < before:
            return self._text.count("\n", 0, at) + 1
        self._counted = (at, line + self._text.count("\n", before, at))
        return self._counted[1]

    def _give_up(self, at: int, reason: str, *, reached: bool = True) -> None:
        """Leave the rest unread. Unless it is not `reached`, it may set anew what was read before."""
        at = self._reader.blanks(at, lines=True)
        if at >= len(self._text):
            return
        names = []
        for found in re.finditer(r"(?<![\w$])([A-Za-z_][A-Za-z0-9_]*)(\+?=)?", self._text[at:]):
            if (found[2] and found[1] not in self._values) or (reached and found[1] in self._values):
                names.append(found[1])
        self._skip(at, len(self._text), reason, names)

    def _skip(self, at: int, end: int, reason: str, names: list[str]) -> None:
        first = self._line(at)
        last = first + self._text[at:end].rstrip().count("\n")
        self._unread.append(Unread(first, last, reason, tuple(dict.fromkeys(names))))
        for name in names:
            self._values.pop(name, None)
            self._lines.pop(name, None)

    def _assign(self, words: list[Word]) -> bool:
        """Carry out a statement of assignments only; False when it is none, or cannot be read, which is noted."""
        declared = self._text[words[0].start : words[0].end] in DECLARES
        fixed = declared and words[0].value == "readonly"
        found: list[tuple[str, Word]] = []
        for word in words[1:] if declared else words:
            raw = self._text[word.start : word.end]
            match = ASSIGNMENT.match(raw)
            if match is not None:
                found.append((match[1], word))
            elif not declared:
                return False
            elif _FLAGS.fullmatch(raw):
                fixed = fixed or "r" in raw
            elif not NAME.fullmatch(raw):
                return False
        if not found:
            return declared and len(words) > 1 and not any(w.value == "-A" for w in words) and not fixed
        names = [name for name, _ in found]
        for name, word in found:
            if self._is_fixed(name) or (fixed and names.count(name) > 1):
                raise Lost(word.start, f"{name} is read-only")
        reason = next((why for name, word in found if (why := self._refusal(name, word))), "")
        if reason:
            self._skip(words[0].start, words[-1].end, reason, names)
            self._elsewhere.update(names if fixed else ())
            return True
        for name, word in found:
            assert word.value is not None
            self._values[name] = word.value
            self._lines[name] = self._line(words[0].start)
        if fixed:
            self._fixed.update(names)
        return True

    def _refusal(self, name: str, word: Word) -> str:
        match = ASSIGNMENT.match(self._text, word.start)
        assert match is not None
        if match[2]:
            return f"one element of {name}"
        if match[3]:
            return f"{name} is added to"
        if name in self._elsewhere:
            return f"{name} is set in a function or declared too"
        if isinstance(self._values.get(name), tuple) and isinstance(word.value, str):
            return f"{name} is an array before"
        if _SHELLS_OWN.fullmatch(name):
            return f"{name} is a variable of the shell's own"
        return f"the value of {name} is {word.reason}" if word.value is None else ""
