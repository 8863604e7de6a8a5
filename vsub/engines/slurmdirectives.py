"""The `#SBATCH` lines of a job script, read as Slurm's `sbatch` reads them.

Seen on Slurm 22.05 to 26.05: the line begins with `#SBATCH` and nothing need stand after it; they end at the first line
that is neither blank nor a comment; quotes of both kinds group, a backslash takes the next character as it is, `#`
outside of quotes begins a comment, a word that quotes make empty ends the line. Outside of quotes a backslash takes no
tab, and a blank only since 24.05.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Callable

from vmgr.errors import Code, VTorqueError
from vsub.engines.slurmoptions import Parsed, parse_sbatch

PREFIX = b"#SBATCH"
_SPACE = " \t\n\v\f\r"
_APART = ("hetjob", "packjob")
"""Words that part a job into several, each with nodes of its own kind."""


def read_sbatch_lines(script: bytes, name: str, takes_blanks: Callable[[], bool]) -> Parsed:
    """Everything that the lines say; `name` is the script's, for messages.

    `takes_blanks` tells whether a backslash takes a blank; it is asked where that matters.

    Raises VTorqueError: VT-USAGE for a line that sbatch would not read, VT-OPTION for a job of several kinds of nodes.
    """
    lines = []
    for number, text in sbatch_lines(script):
        source = f"{name} line {number}"
        words = split_words(text, source, takes_blanks)
        if words and words[0] in _APART:
            raise _apart(words[0], source)
        line = parse_sbatch(words, source, own_words=False)
        if line.operands:
            line = line._replace(problem=line.problem or f"{line.operands[0]!r} is no option of sbatch ({source})")
        lines.append(line)
    return Parsed(
        options=tuple(option for line in lines for option in line.options),
        operands=(),
        vm=tuple(vm for line in lines for vm in line.vm),
        own=frozenset(),
        rest=tuple(word for line in lines for word in line.rest),
        problem=next((line.problem for line in lines if line.problem), None),
    )


def sbatch_lines(script: bytes) -> Iterator[tuple[int, str]]:
    """Each line's number (from 1) and its text after the prefix."""
    number, start = 0, 0
    while start < len(script):
        number += 1
        end = script.find(b"\n", start)
        line = script[start : end if end >= 0 else len(script)]
        start = end + 1 if end >= 0 else len(script)
        if line.startswith(PREFIX):
            yield number, os.fsdecode(line[len(PREFIX) :])
        elif line.strip() and not line.lstrip(_SPACE.encode()).startswith(b"#"):
            return


def split_words(text: str, source: str, takes_blanks: Callable[[], bool]) -> list[str]:
    """The words of a line. Raises VTorqueError: VT-USAGE for a quote that is not closed, VT-OPTION as above."""
    words: list[str] = []
    at = 0
    while True:
        while at < len(text) and text[at] in _SPACE:
            at += 1
        if text[at : at + 1] == ":":
            raise _apart(":", source)
        word, at = _word(text, at, source, takes_blanks)
        if not word:
            return words
        words.append(word)


def _word(text: str, at: int, source: str, takes_blanks: Callable[[], bool]) -> tuple[str, int]:
    """The word that begins at `at`, empty where there is none, and where the text goes on behind it."""
    word, quote, escaped = "", "", False
    while at < len(text) and (quote or text[at] not in _SPACE):
        char = text[at]
        if escaped:
            word, escaped = word + char, False
        elif char == "\\" and not quote and text[at + 1 : at + 2] == " " and takes_blanks():
            word, at = word + " ", at + 1
        elif char == "\\":
            escaped = True
        elif quote:
            word, quote = (word, "") if char == quote else (word + char, quote)
        elif char in "\"'":
            quote = char
        elif char == "#":
            break
        else:
            word += char
        at += 1
    if quote:
        raise VTorqueError(f"unmatched {quote} in {source}", code=Code.USAGE, hint="close the quotation")
    return word, at


def _apart(word: str, source: str) -> VTorqueError:
    return VTorqueError(
        f"{word} ({source}) cannot be honoured in a guest job: guests are on nodes of one kind",
        code=Code.OPTION,
        hint="submit several jobs, or add -vm off",
    )
