"""The directives in a job script (`#PBS -l nodes=1`), read as TORQUE's `qsub` reads them.

Facts from `get_script`, `ispbsdir`, `isexecutable` and `make_argv` in TORQUE 6.1
(src/cmds/qsub_functions.c): blanks may stand before the prefix; nothing need stand after it; a backslash at
the end of a line joins the next one; directives end at the first line that is neither blank nor a comment
nor starts with a colon; quotes group, and a backslash outside of quotes takes the next character as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from vmgr.errors import Code, VTorqueError
from vsub.options import Line, parse_line

PREFIX = "#PBS"
_BLANKS = b" \t\n\v\f\r"
_QUOTES = "\"'"


def read_directives(script: bytes, prefix: str, name: str) -> Line:
    """Everything that the directives of a script say, as if it stood on one command line.

    `name` is the script's, for messages. Words that are no options are ignored, as qsub does.
    Raises VTorqueError (VT-USAGE) for a directive that cannot be taken apart.
    """
    lines: list[Line] = []
    for number, text in directive_lines(script, prefix):
        source = f"{name} line {number}"
        lines.append(parse_line(split_words(text, source), source, own_words=False))
    return Line(
        options=tuple(option for line in lines for option in line.options),
        operands=(),
        vm=tuple(vm for line in lines for vm in line.vm),
        own=frozenset(),
        rest=(),
        problem=next((line.problem for line in lines if line.problem), None),
    )


def directive_lines(script: bytes, prefix: str) -> Iterator[tuple[int, str]]:
    """Each directive's line number (from 1) and its text after the prefix, continuation lines joined.

    Stops at the first executable line, so that a long script costs no more than its head. An empty prefix
    means that there are no directives.
    """
    if not prefix:
        return
    mark = os.fsencode(prefix)
    lines = _lines(script)
    for number, line in lines:
        text = line.lstrip(_BLANKS)
        if text.startswith(mark):
            joined = text[len(mark) :]
            while joined.endswith(b"\\"):
                following = next(lines, None)
                joined = joined[:-1] + (following[1] if following else b"")
            yield number, os.fsdecode(joined)
        elif text and not text.startswith(b"#") and not line.startswith(b":"):
            return


def _lines(script: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, without line ends of either kind, one at a time."""
    number, start = 0, 0
    while start < len(script):
        end = script.find(b"\n", start)
        stop = len(script) if end < 0 else end
        number += 1
        line = script[start:stop]
        yield number, line[:-1] if line.endswith(b"\r") else line
        start = stop + 1


def split_words(text: str, source: str) -> list[str]:
    """The words of a directive. Raises VTorqueError (VT-USAGE) for a quote that is not closed."""
    words: list[str] = []
    word: list[str] = []
    inside, at = False, 0
    while at < len(text):
        char = text[at]
        at += 1
        if char in _QUOTES:
            end = text.find(char, at)
            if end < 0:
                raise VTorqueError(f"unmatched {char} in {source}", code=Code.USAGE, hint="close the quotation")
            word.append(text[at:end])
            inside, at = True, end + 1
        elif char == "\\":
            word.append(text[at : at + 1])
            inside, at = True, at + 1
        elif char in " \t\n\v\f\r":
            if inside:
                words.append("".join(word))
            word, inside = [], False
        else:
            word.append(char)
            inside = True
    if inside:
        words.append("".join(word))
    return words
