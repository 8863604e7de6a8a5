"""The description of the user's terminal, taken along into a guest that does not know that kind of terminal.

Small images have no terminfo database, and none knows every terminal. ncurses takes a whole compiled description from
the variable TERMINFO (since 6.1: `hex:…`, see infocmp(1), option -Q).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

FOLDERS = ("/etc/terminfo", "/lib/terminfo", "/usr/share/terminfo")
MAX_BYTES = 32 * 1024
"""Most that a compiled description may have (term(5))."""

_TERM = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]{0,63}")


def terminfo_lines(environ: Mapping[str, str]) -> str:
    """Lines of shell that give the guest the description of TERM, where it has none; nothing where this node has none.

    One that the user chose by TERMINFO is left alone.
    """
    term = environ.get("TERM", "")
    if "TERMINFO" in environ or not _TERM.fullmatch(term):
        return ""
    names = [f"{folder}/{letter}/{term}" for folder in FOLDERS for letter in (term[0], f"{ord(term[0]):x}")]
    for name in names:
        try:
            with open(name, "rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except OSError:
            continue
        if 0 < len(data) <= MAX_BYTES:
            known = " || ".join(f"[ -e {shlex.quote(path)} ]" for path in names)
            return f"{known} || export TERMINFO=hex:{data.hex()}\n"
    return ""
