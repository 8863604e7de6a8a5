"""The assignments of a bash file, read without running anything.

What is set at the file's outer level is read; what stands in a condition, a loop or a function, and every command, is
not, because only running it would tell what it does. All of that is named with its lines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, Optional

from vmgr.migration.shellwords import NAME, Lost, Reader, Value, Word

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\[[^\]\n]*\])?(\+?)=")
_NAMED = re.compile(rf"({NAME.pattern})(?:\[.*\])?", re.DOTALL)
_SETTING = re.compile(rf"\$\{{({NAME.pattern})(?:\[[^\]]*\])?:?=")
_DECLARES = frozenset(("export", "readonly", "declare", "typeset"))
_FLAGS = re.compile(r"-[arxg]+")
_OPENS = {
    "if": "fi", "case": "esac", "for": "done", "while": "done", "until": "done", "select": "done", "{": "}",
}  # fmt: skip
_CLOSES = frozenset((*_OPENS.values(), "then", "do", "else", "elif", "in"))
_BEFORE_COMMAND = frozenset(("if", "then", "elif", "else", "while", "until", "do", "{", "!", "time"))
_OPERATOR = re.compile(r"&&|\|\||;;&|;;|;&|\|&|<<<|<<-?|&>>?|[<>]&|>>|>\||<>|[;&|<>()\n]")
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


class _Statement(NamedTuple):
    """A statement: its words while it is simple, the names set anywhere in it, where it ends, and why it is no
    assignment, if that is known already."""

    words: list[Word]
    names: list[str]
    end: int
    reason: str


def read_shell(text: str, known: Mapping[str, str]) -> ShellFile:
    """The assignments in `text`; `known` are variables that others have set before."""
    return _File(text, known).read()


class _File:
    def __init__(self, text: str, known: Mapping[str, str]) -> None:
        self._text = text
        self._values: dict[str, Value] = dict(known)
        self._lines: dict[str, int] = {}
        self._fixed: set[str] = set()
        self._unread: list[Unread] = []
        self._reader = Reader(text, self._values)
        self._counted = (0, 1)

    def read(self) -> ShellFile:
        at = self._reader.blanks(0, lines=True)
        while at < len(self._text):
            try:
                statement = self._statement(at)
                read = not statement.reason and self._assign(statement.words)
            except Lost as lost:
                self._give_up(at, f"{lost.reason}: from here on nothing was read")
                break
            if not read:
                command = self._text[at : statement.end]
                first = command.split(None, 1)[0].rstrip(";")[:40]
                self._skip(at, statement.end, statement.reason or f"the command {first}", statement.names)
                if re.fullmatch(r"(?:exit|return)(?:[ \t]+[0-9]{1,3})?[ \t]*;?", command):
                    self._give_up(statement.end, "after the end that this command makes", reached=False)
                    break
                if self._is_end(statement.words):
                    self._give_up(statement.end, "perhaps after the end that a command makes")
                    break
            at = self._reader.blanks(statement.end, lines=True)
        values = {name: Assigned(self._values[name], line) for name, line in self._lines.items()}
        return ShellFile(values, self._unread)

    def _is_end(self, words: list[Word]) -> bool:
        """Whether the first of the words that is no assignment ends the shell; what a condition may end goes on."""
        raws = (self._text[word.start : word.end] for word in words)
        return next((raw for raw in raws if not _ASSIGNMENT.match(raw)), "") in ("exit", "return", "exec")

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
        declared = self._text[words[0].start : words[0].end] in _DECLARES
        fixed = declared and words[0].value == "readonly"
        found: list[tuple[str, Word]] = []
        for word in words[1:] if declared else words:
            raw = self._text[word.start : word.end]
            match = _ASSIGNMENT.match(raw)
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
        for name, word in found:
            if name in self._fixed or _FIXED.fullmatch(name):
                raise Lost(word.start, f"{name} is read-only")
        reason = next((why for name, word in found if (why := self._refusal(name, word))), "")
        if reason:
            self._skip(words[0].start, words[-1].end, reason, [name for name, _ in found])
            return True
        for name, word in found:
            assert word.value is not None
            self._values[name] = word.value
            self._lines[name] = self._line(words[0].start)
        if fixed:
            self._fixed.update(name for name, _ in found)
        return True

    def _refusal(self, name: str, word: Word) -> str:
        match = _ASSIGNMENT.match(self._text, word.start)
        assert match is not None
        if match[2]:
            return f"one element of {name}"
        if match[3]:
            return f"{name} is added to"
        if isinstance(self._values.get(name), tuple) and isinstance(word.value, str):
            return f"{name} is an array before"
        if _SHELLS_OWN.fullmatch(name):
            return f"{name} is a variable of the shell's own"
        return f"the value of {name} is {word.reason}" if word.value is None else ""

    def _statement(self, start: int) -> _Statement:
        """The statement at `start`, whole with all that is nested in it. Raises Lost."""
        text, reader = self._text, self._reader
        words: list[Word] = []
        names: list[str] = []
        stack: list[str] = []
        documents: list[tuple[str, bool]] = []
        reason, at, command, goes_on = "", start, True, False
        while True:
            at = reader.blanks(at)
            operator = _OPERATOR.match(text, at)
            if at >= len(text):
                if stack or documents:
                    raise Lost(start, f"`{stack[-1] if stack else documents[0][0]}` is missing")
                return _Statement(words, names, at, reason)
            if operator is None:
                word = self._next_word(at, declared=bool(words) and words[0].value in _DECLARES)
                raw = text[word.start : word.end]
                goes_on = False
                names += self._set_by(word)
                if command and raw == "[[":
                    reason, at, command = reason or "a command", self._test(word.end), False
                    continue
                if command or (stack and raw in ("in", "do") and not words):
                    reason, command, goes_on = self._keyword(raw, stack, reason, start)
                    command = command or _ASSIGNMENT.match(raw) is not None
                words.append(word)
                at = word.end
                continue
            sign, at = operator[0], operator.end()
            if sign == "\n":
                at = self._documents(at, documents, start)
                if not stack and not goes_on:
                    return _Statement(words, names, operator.start() if not documents else at, reason)
                documents.clear()
                command = True
            elif sign in ("<<", "<<-"):
                reason = reason or "a command"
                word = reader.word(reader.blanks(at))
                if not isinstance(word.value, str) or not word.value:
                    raise Lost(start, "a here-document that cannot be followed")
                documents.append((word.value, sign == "<<-"))
                at = word.end
            elif sign == "(":
                at, goes_on, inside = self._parenthesis(at, stack, words, start)
                names += inside
                reason, command = reason or "a command", True
            elif sign == ")":
                if stack and stack[-1] == ")":
                    stack.pop()
                elif not (stack and stack[-1] == "esac"):
                    raise Lost(start, "a `)` that closes nothing")
                command = bool(stack) and stack[-1] == "esac"
            elif sign == ";" and not stack:
                if goes_on or not words:
                    raise Lost(start, "a `;` that ends nothing")
                if documents:
                    raise Lost(start, "a here-document that cannot be followed")
                return _Statement(words, names, at, reason)
            else:
                reason = reason or "a command"
                goes_on = sign in ("&&", "||", "|", "|&")
                if sign == "&" and not stack:
                    return _Statement(words, names, at, reason)
                if sign[0] in "<>" or sign.startswith("&>"):
                    at = reader.word(reader.blanks(at)).end
                else:
                    command = True

    def _next_word(self, at: int, *, declared: bool) -> Word:
        match = _ASSIGNMENT.match(self._text, at)
        if match is None:
            return self._reader.word(at)
        if self._text.startswith("(", match.end()):
            return self._reader.array(at, match.end())
        return self._reader.word(at, after=match.end(), element=declared)

    def _set_by(self, word: Word) -> list[str]:
        """The variables that a command might set which has this word: by an assignment, by their name, by `${A:=…}`."""
        raw = self._text[word.start : word.end]
        plain = word.value if isinstance(word.value, str) and not _ASSIGNMENT.match(raw) else raw
        match = _ASSIGNMENT.match(raw) or _ASSIGNMENT.match(plain)
        if match is None:
            match = _NAMED.fullmatch(plain)
            match = match if match and match[1] in self._values else None
        return ([match[1]] if match else []) + _SETTING.findall(raw)

    def _keyword(self, raw: str, stack: list[str], reason: str, start: int) -> tuple[str, bool, bool]:
        """Follow a word where a command may stand: the reason, whether a command may follow, whether one must."""
        if raw in _OPENS:
            stack.append(_OPENS[raw])
            return reason or f"set only as `{raw}` goes", raw in _BEFORE_COMMAND, False
        if stack and raw == stack[-1]:
            stack.pop()
            return reason, False, False
        if raw in _CLOSES and not (stack and raw not in _OPENS.values()):
            raise Lost(start, f"`{raw}` without its beginning")
        if raw in ("function", "coproc", "time", "!"):
            return reason or "a command", raw in ("time", "!"), raw == "function"
        if raw in _BEFORE_COMMAND or (raw == "in" and bool(stack)):
            return reason, True, False
        return reason, False, False

    def _parenthesis(self, at: int, stack: list[str], words: list[Word], start: int) -> tuple[int, bool, list[str]]:
        """Go into a subshell, past `((…))`, or past the `()` of a function, whose body must follow.

        Gives where it goes on, whether it must, and the names in `((…))`.
        """
        text = self._text
        if text.startswith("(", at):
            end = re.compile(r"[^\n'\"\\`#]*?\)\)").match(text, at + 1)
            if end is None:
                raise Lost(start, "a `((` that cannot be followed")
            return end.end(), False, NAME.findall(end[0])
        empty = re.compile(r"[ \t]*\)").match(text, at)
        if empty is not None and words:
            return empty.end(), True, []
        stack.append(")")
        return at, False, []

    def _test(self, at: int) -> int:
        """The end of `[[ … ]]`."""
        begun = at
        while True:
            at = self._reader.blanks(at, lines=True)
            if at >= len(self._text):
                raise Lost(begun, "`]]` is missing")
            word = self._reader.word(at)
            if self._text[at : word.end] == "]]":
                return word.end
            at = max(word.end, at + 1)

    def _documents(self, at: int, documents: list[tuple[str, bool]], start: int) -> int:
        """The end of the here-documents whose bodies begin at `at`."""
        for ending, tabs in documents:
            while True:
                if at >= len(self._text):
                    raise Lost(start, "a here-document that does not end")
                end = self._text.find("\n", at)
                end = len(self._text) if end < 0 else end
                line = self._text[at:end]
                at = min(end + 1, len(self._text))
                if (line.lstrip("\t") if tabs else line) == ending:
                    break
        return at


def unread_name(file: ShellFile, name: str) -> Optional[Unread]:
    """Where a variable is set that was not read for it."""
    return next((part for part in reversed(file.unread) if name in part.names), None)
