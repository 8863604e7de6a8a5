"""Memory sizes and counts as people write them."""

from __future__ import annotations

import re
from typing import Optional

_SIZE = r"([0-9]{1,15})(?:\.([0-9]{1,6}))?([KMGT]?)(?:i?B)?"
_COUNT_DIGITS = 9
_BYTES = {"K": 2**10, "": 2**20, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size_mib(text: str) -> Optional[int]:
    """The whole MiB in a size like `512`, `2048M`, `1.5G`; None when it is none.

    Units are binary, in either case, with or without `B`; a bare number is MiB. A size that is not a whole number
    of MiB gives None too: what a user asks for is met exactly or not at all.
    """
    match = re.fullmatch(_SIZE, text, re.IGNORECASE)
    if match is None:
        return None
    whole, fraction, unit = match.group(1), match.group(2) or "", match.group(3).upper()
    scaled = int(whole + fraction) * _BYTES[unit]
    divisor = 10 ** len(fraction) * 2**20
    return scaled // divisor if scaled % divisor == 0 else None


def format_size_mib(mib: int) -> str:
    """A size in MiB as people write it, exactly: `512M`, `2G`, `1536M`."""
    for unit, factor in (("T", 2**20), ("G", 2**10)):
        if mib and mib % factor == 0:
            return f"{mib // factor}{unit}"
    return f"{mib}M"


def parse_count(text: str) -> Optional[int]:
    """A whole number, 0 or more, in up to nine plain ASCII digits; None when it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _COUNT_DIGITS else None
