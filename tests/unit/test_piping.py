"""What comes through a pipe is written down, and summed up on the way."""

from __future__ import annotations

import os
import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.node.piping import Sum, copy_pipe, sum_file

BLOCKS = st.lists(
    st.one_of(st.binary(max_size=300), st.integers(0, 1 << 18).map(bytes), st.just(b"x" * 70_000)), max_size=8
)


def through_a_pipe(data: bytes, path: Path, most: int) -> tuple[int, int]:
    source, inlet = os.pipe()

    def write() -> None:
        with os.fdopen(inlet, "wb") as stream:
            try:
                stream.write(data)
            except BrokenPipeError:
                pass

    writer = threading.Thread(target=write)
    writer.start()
    target, found = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), Sum()
    try:
        return copy_pipe(source, target, most, lambda _: None, found.add), found.value
    finally:
        os.close(source)
        os.close(target)
        writer.join()


@FUZZ
@given(BLOCKS)
def test_the_sum_is_that_of_what_lies_there(tmp_path: Path, blocks: list[bytes]) -> None:
    data, path, told = b"".join(blocks), tmp_path / "state", list[int]()
    assert through_a_pipe(data, path, len(data)) == (len(data), zlib.crc32(data))
    assert path.read_bytes() == data
    fd = os.open(path, os.O_RDONLY)
    try:
        assert sum_file(fd, len(data), told.append) == zlib.crc32(data)
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0, "QEMU reads by the same descriptor"
        assert told == sorted(told) and told[-1:] == [len(data)] * bool(data)
        assert sum_file(fd, len(data) + 7, told.append) == zlib.crc32(data), "a file that was cut off meanwhile"
    finally:
        os.close(fd)


@FUZZ
@given(st.binary(min_size=1, max_size=2000), st.integers(0, 10**6), st.integers(0, 7))
def test_one_bit_makes_another_sum(data: bytes, at: int, bit: int) -> None:
    damaged = bytearray(data)
    damaged[at % len(data)] ^= 1 << bit
    first, second = Sum(), Sum()
    first.add(data)
    second.add(bytes(damaged))
    assert first.value != second.value


def test_more_than_may_come_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="QEMU sends more than 99 bytes"):
        through_a_pipe(b"x" * 100, tmp_path / "state", 99)
