"""The directives in a job script (`#PBS -l nodes=1`), read as TORQUE's `qsub` reads them.

Facts from `get_script`, `ispbsdir`, `isexecutable` and `make_argv` in TORQUE 6.1
(src/cmds/qsub_functions.c): blanks may stand before the prefix; nothing need stand after it; a backslash at
the end of a line joins the next one; directives end at the first line that is neither blank nor a comment
nor starts with a colon; quotes group, and a backslash outside of quotes takes the next character as it is. Lines
are read in pieces of up to 32,767 bytes, each of which counts as a line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Optional

from vmgr.errors import Code, VTorqueError
from vsub.options import Line, parse_line

PREFIX = "#PBS"
_BLANKS = b" \t\n\v\f\r"
_QUOTES = "\"'"
_MAX_LINE = 32767
"""Bytes that qsub reads at a time (MAX_LINE_LEN of src/include/cmds.h, less the NUL)."""


def read_directives(script: bytes, prefix: str, name: str) -> Line:
    """Everything that the directives of a script say, as if it stood on one command line.

    `name` is the script's, for messages. Words that are no options are ignored, as qsub does.
    Raises VTorqueError (VT-USAGE) for a directive that cannot be taken apart.
    """
    lines: list[Line] = []
    for number, text in directive_lines(script, prefix):
        if text is None:
            raise VTorqueError(
                f"{name} line {number}: a directive goes on (\\) where the file ends", code=Code.USAGE,
                hint="take the backslash out",
            )  # fmt: skip
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


def directive_lines(script: bytes, prefix: str) -> Iterator[tuple[int, Optional[str]]]:
    """Each directive's line number (from 1) and its text after the prefix, continuation lines joined.

    The text is None when the file ends where a continuation is due. Stops at the first executable line, so that a
    long script costs no more than its head. An empty prefix means that there are no directives.
    """
    if not prefix:
        return
    mark = os.fsencode(prefix)
    lines = _lines(script)
    for number, line in lines:
        text = line.lstrip(_BLANKS)
        if text.startswith(mark):
            joined = text[len(mark) :]
            while joined.endswith(b"\\\n"):
                following = next(lines, None)
                if following is None:
                    yield number, None
                    return
                joined = joined[:-2] + following[1]
            yield number, os.fsdecode(joined.removesuffix(b"\n"))
        elif text and not text.startswith(b"#") and not line.startswith(b":"):
            return


def _lines(script: bytes) -> Iterator[tuple[int, bytes]]:
    """What qsub reads as lines, with their numbers: DOS line ends turned, a long line in pieces."""
    number, start = 1, 0
    while start < len(script):
        end = script.find(b"\n", start, start + _MAX_LINE)
        stop = min(len(script), start + _MAX_LINE) if end < 0 else end + 1
        line = script[start:stop]
        yield number, line[:-2] + b"\n" if line.endswith(b"\r\n") else line
        number += line.endswith(b"\n")
        start = stop


def split_words(text: str, source: str) -> list[str]:
    """The words of a directive. Raises VTorqueError (VT-USAGE) for a quote that is not closed."""
    words: list[str] = []
    word: list[str] = []
    inside, at = False, 0
    while at < len(text):
        char = text[at]
        at += 1
        if char == "\0":  # to qsub a string ends here
            break
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
