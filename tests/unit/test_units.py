"""Sizes and counts as people write them."""

from __future__ import annotations

from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgr.units import format_size_mib, parse_count, parse_size_mib


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("512", 512),
        ("2048M", 2048),
        ("2048MB", 2048),
        ("1GiB", 1024),
        ("1.5G", 1536),
        ("1.5g", 1536),
        ("2T", 2 * 2**20),
        ("1024K", 1),
        ("0", 0),
        ("1000K", None),
        ("1.3M", None),
        ("", None),
        ("G", None),
        ("-1", None),
        ("+1", None),
        (" 1", None),
        ("1 G", None),
        ("1e3", None),
        ("1_000", None),
        (".5G", None),
        ("٣", None),
        ("1" * 40, None),
    ],
)
def test_sizes(text: str, mib: Optional[int]) -> None:
    assert parse_size_mib(text) == mib


@given(st.integers(0, 2**40))
def test_sizes_round_trip(mib: int) -> None:
    assert parse_size_mib(format_size_mib(mib)) == mib


@pytest.mark.parametrize(
    ("text", "count"), [("0", 0), ("12", 12), ("", None), ("-1", None), ("1.0", None), ("²", None), ("1" * 10, None)]
)
def test_counts(text: str, count: Optional[int]) -> None:
    assert parse_count(text) == count


@given(st.text())
def test_any_text_is_a_number_or_none(text: str) -> None:
    assert parse_size_mib(text) is None or text.isascii()
    assert parse_count(text) is None or text.isascii()
