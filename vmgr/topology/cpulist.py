"""Sets of CPUs (or NUMA nodes) as text: lists such as `0-3,8`, which kernel and users write, and the kernel's masks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Optional

MAX_NUMBER = (1 << 14) - 1
"""The highest CPU or node number that is believed; the kernel's own limit (`NR_CPUS`) is 8192."""

_MAX_TEXT = 1 << 16
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", re.ASCII)
_MASK = re.compile(r"[0-9a-fA-F]{1,8}(?:,[0-9a-fA-F]{8})*", re.ASCII)


def parse_cpus(text: str) -> Optional[frozenset[int]]:
    """The numbers in a list like `0-3,8`, nothing around it; empty for an empty text.

    None for a text that is no such list, has a range that runs backwards, or a number above MAX_NUMBER.
    """
    if not text:
        return frozenset()
    numbers: set[int] = set()
    for part in text.split(",") if len(text) <= _MAX_TEXT else [""]:
        match = _RANGE.fullmatch(part)
        if match is None:
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last <= MAX_NUMBER:
            return None
        numbers.update(range(first, last + 1))
    return frozenset(numbers)


def parse_mask(text: str) -> Optional[frozenset[int]]:
    """The numbers in a mask of the kernel, hexadecimal words of 32 bits like `0000,00000011`; None for no such mask."""
    if len(text) > _MAX_TEXT or _MASK.fullmatch(text) is None:
        return None
    bits = int(text.replace(",", ""), 16)
    if bits.bit_length() > MAX_NUMBER + 1:
        return None
    return frozenset(number for number in range(bits.bit_length()) if bits >> number & 1)


def show_cpus(cpus: Iterable[int]) -> str:
    """CPUs as a list of ranges: `0-3,8`; `none` for none."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges) or "none"
