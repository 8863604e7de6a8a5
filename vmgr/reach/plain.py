"""A guest's console as plain text: whatever is printed, a terminal does nothing but show it."""

from __future__ import annotations

import codecs
import re

MAX_SEQUENCE = 4096
"""An escape sequence that is longer is none: what follows is text again."""

_WHOLE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI
    r"|\x1b[PX^_\]][^\x07\x1b]*(?:\x07|\x1b\\)"  # DCS, SOS, PM, APC, OSC
    r"|\x1b[ -/]*[0-OQ-WYZ\\`-~]"  # the short ones
)
_BEGUN = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|[PX^_\]][^\x07\x1b]*\x1b?|[ -/]*)\Z")
"""Control sequences of ECMA-48 and what a chunk may end with of one."""


class Plain:
    """Turns chunks of a console into text without control sequences; line ends are those of Unix."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._left = ""

    def text(self, data: bytes) -> str:
        """The text of the next chunk; what may go on in the one after is kept back."""
        text = self._left + self._decoder.decode(data)
        begun = _BEGUN.search(text)
        cut = len(text) if begun is None or len(text) - begun.start() > MAX_SEQUENCE else begun.start()
        if text[:cut].endswith("\r"):  # of a line end, perhaps
            cut -= 1
        self._left = text[cut:]
        lines = _WHOLE.sub("", text[:cut]).replace("\r\n", "\n").replace("\r", "\n")
        return "".join(c for c in lines if c.isprintable() or c in "\n\t")
