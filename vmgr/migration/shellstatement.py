"""One statement of a bash file, with all that is nested in it: where it ends, and which variables it may set.

Of what is not an assignment only the extent is followed: compound commands, lists, redirections, here-documents
(bash(1), "SHELL GRAMMAR"). Nothing is run.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from vmgr.migration.shellwords import NAME, Lost, Reader, Word

ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\[[^\]\n]*\])?(\+?)=")
DECLARES = frozenset(("export", "readonly", "declare", "typeset"))
COMMAND = "a command"

_NAMED = re.compile(rf"({NAME.pattern})(?:\[.*\])?", re.DOTALL)
_SETTING = re.compile(rf"\$\{{({NAME.pattern})(?:\[[^\]]*\])?:?=")
_OPENS = {
    "if": "fi", "case": "esac", "for": "done", "while": "done", "until": "done", "select": "done", "{": "}",
}  # fmt: skip
_CLOSES = frozenset((*_OPENS.values(), "then", "do", "else", "elif", "in"))
_BEFORE_COMMAND = frozenset(("if", "then", "elif", "else", "while", "until", "do", "{", "!", "time"))
_OPERATOR = re.compile(r"&&|\|\||;;&|;;|;&|\|&|<<<|<<-?|&>>?|[<>]&|>>|>\||<>|[;&|<>()\n]")
_ARITHMETIC = re.compile(r"[^\n'\"\\`#]*?\)\)")
_NO_ARGUMENTS = re.compile(r"[ \t]*\)")


class Statement(NamedTuple):
    """A statement up to `end`: its words, and the names of variables that stand in it as ones to be set.

    `reason` says why it is no assignment, if its shape tells that already; `is_function`: it defines one.
    """

    words: list[Word]
    names: list[str]
    end: int
    reason: str
    is_function: bool


def read_statement(reader: Reader, start: int) -> Statement:
    """The statement at `start`. Raises Lost for one whose end cannot be told."""
    scan = _Scan(reader, start)
    while not scan.step():
        pass
    return Statement(scan.words, scan.names, scan.at, scan.reason, scan.is_function)


class _Scan:
    """Follows a statement, one word or operator a step.

    `_stack` holds what closes the compound commands that are open; `_command` tells that a command may stand next,
    `_goes_on` that one must; `_documents` are here-documents whose bodies follow the line.
    """

    def __init__(self, reader: Reader, start: int) -> None:
        self._text = reader.text
        self._reader = reader
        self._start = start
        self.at = start
        self.words: list[Word] = []
        self.names: list[str] = []
        self.reason = ""
        self.is_function = False
        self._stack: list[str] = []
        self._documents: list[tuple[str, bool]] = []
        self._command = True
        self._goes_on = False
        self._names_function = False

    def step(self) -> bool:
        """Go one word or operator on; true at the end of the statement."""
        self.at = self._reader.blanks(self.at)
        if self.at >= len(self._text):
            if self._stack or self._documents:
                raise self._lost(f"`{self._stack[-1] if self._stack else self._documents[0][0]}` is missing")
            return True
        operator = _OPERATOR.match(self._text, self.at)
        if operator is None:
            self._word()
            return False
        sign = operator[0]
        if sign == "\n" and not (self._stack or self._goes_on or self._documents):
            return True
        self.at = operator.end()
        return self._operator(sign)

    def _lost(self, reason: str) -> Lost:
        return Lost(self._start, reason)

    # words

    def _word(self) -> None:
        word = self._next_word()
        raw = self._text[word.start : word.end]
        self._goes_on = False
        self.names += self._set_by(word, raw)
        self.at = word.end
        if self._names_function:
            self._names_function, self._command, self._goes_on = False, True, True
            return
        if self._command and raw == "[[":
            self.reason = self.reason or COMMAND
            self._command = False
            self._skip_test()
            return
        if self._command or (raw in ("in", "do") and self._stack and not self.words):
            self._keyword(raw)
            self._command = self._command or ASSIGNMENT.match(raw) is not None
        self.words.append(word)

    def _next_word(self) -> Word:
        match = ASSIGNMENT.match(self._text, self.at)
        if match is None:
            return self._reader.word(self.at)
        if self._text.startswith("(", match.end()):
            return self._reader.array(self.at, match.end())
        declared = bool(self.words) and self.words[0].value in DECLARES
        return self._reader.word(self.at, after=match.end(), element=declared)

    def _set_by(self, word: Word, raw: str) -> list[str]:
        """The variables that a command with this word may set: by an assignment, by their name, by `${A:=…}`."""
        plain = word.value if isinstance(word.value, str) and not ASSIGNMENT.match(raw) else raw
        match = ASSIGNMENT.match(raw) or ASSIGNMENT.match(plain)
        if match is None:
            match = _NAMED.fullmatch(plain)
            match = match if match and match[1] in self._reader.values else None
        return ([match[1]] if match else []) + _SETTING.findall(raw)

    def _keyword(self, raw: str) -> None:
        """Follow a word where a command may stand."""
        self._command = False
        if raw in _OPENS:
            self._stack.append(_OPENS[raw])
            self.reason = self.reason or f"set only as `{raw}` goes"
            self._command = raw in _BEFORE_COMMAND
        elif self._stack and raw == self._stack[-1]:
            self._stack.pop()
        elif raw in _CLOSES and not (self._stack and raw not in _OPENS.values()):
            raise self._lost(f"`{raw}` without its beginning")
        elif raw in ("function", "coproc", "time", "!"):
            self.reason = self.reason or COMMAND
            self._command = raw in ("time", "!")
            self._names_function = raw == "function"
            self.is_function = self.is_function or raw == "function"
        elif raw in _BEFORE_COMMAND or (raw == "in" and self._stack):
            self._command = True

    def _skip_test(self) -> None:
        """Go past `[[ … ]]`."""
        while True:
            self.at = self._reader.blanks(self.at, lines=True)
            if self.at >= len(self._text):
                raise self._lost("`]]` is missing")
            word = self._reader.word(self.at)
            closes = self._text[self.at : word.end] == "]]"
            self.at = max(word.end, self.at + 1)
            if closes:
                return

    # operators

    def _operator(self, sign: str) -> bool:
        """Follow an operator; true when the statement ends with it."""
        if sign == "\n":
            return self._line_end()
        if sign == ";" and not self._stack:
            if self._goes_on or not self.words:
                raise self._lost("a `;` that ends nothing")
            if self._documents:
                raise self._lost("a here-document that cannot be followed")
            return True
        if sign == "(":
            self._open()
        elif sign == ")":
            self._close()
        elif sign in ("<<", "<<-"):
            self._document(tabs=sign == "<<-")
        elif sign[0] in "<>" or sign.startswith("&>"):
            self._redirection()
        else:
            self.reason = self.reason or COMMAND
            self._goes_on = sign in ("&&", "||", "|", "|&")
            self._command = True
            return sign == "&" and not self._stack
        return False

    def _line_end(self) -> bool:
        for ending, tabs in self._documents:
            self._skip_document(ending, tabs)
        self._documents.clear()
        self._command = True
        return not self._stack and not self._goes_on

    def _open(self) -> None:
        """Go into a subshell, past `((…))`, or past the `()` of a function, whose body must follow."""
        self.reason, self._command, self._goes_on = self.reason or COMMAND, True, False
        if self._text.startswith("(", self.at):
            end = _ARITHMETIC.match(self._text, self.at + 1)
            if end is None:
                raise self._lost("a `((` that cannot be followed")
            self.names += NAME.findall(end[0])
            self.at = end.end()
            return
        empty = _NO_ARGUMENTS.match(self._text, self.at)
        if empty is not None and self.words:
            self.at, self._goes_on, self.is_function = empty.end(), True, True
            return
        self._stack.append(")")

    def _close(self) -> None:
        if self._stack and self._stack[-1] == ")":
            self._stack.pop()
        elif not (self._stack and self._stack[-1] == "esac"):
            raise self._lost("a `)` that closes nothing")
        self._command = bool(self._stack) and self._stack[-1] == "esac"

    def _redirection(self) -> None:
        self.reason = self.reason or COMMAND
        self._goes_on = False
        self.at = self._reader.word(self._reader.blanks(self.at)).end

    def _document(self, *, tabs: bool) -> None:
        self.reason = self.reason or COMMAND
        word = self._reader.word(self._reader.blanks(self.at))
        if not isinstance(word.value, str) or not word.value:
            raise self._lost("a here-document that cannot be followed")
        self._documents.append((word.value, tabs))
        self.at = word.end

    def _skip_document(self, ending: str, tabs: bool) -> None:
        while self.at < len(self._text):
            end = self._text.find("\n", self.at)
            end = len(self._text) if end < 0 else end
            line = self._text[self.at : end]
            self.at = min(end + 1, len(self._text))
            if (line.lstrip("\t") if tabs else line) == ending:
                return
        raise self._lost("a here-document that does not end")
