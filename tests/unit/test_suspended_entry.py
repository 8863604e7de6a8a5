"""What is stored of a suspended job: written and read exactly, whatever stands in the files."""

from __future__ import annotations

import json
import re
from typing import Any, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.errors import Code, VTorqueError
from vmgr.suspended import entry as stored
from vmgr.suspended.entry import Entry, NodePart, SavedGuest, dump_entry, dump_part, parse_entry, parse_part
from vmgr.suspended.files import framed, unframed
from vmgr.topology.model import Cell, Layout

ENTRY = Entry("12.server", "carol", "a" * 64, "micro@3", "0123abcd", 1, 2, 1_700_000_000, 60)
HOST_KEY = "ssh-ed25519 " + "A" * 68
GUEST = SavedGuest(0, "vn1-1", "02:00:00:00:00:01", None, Layout.flat(2, 512), 1000, 2000)
PART = NodePart(0, HOST_KEY, "kvm", "7.2.0 (Debian)", (GUEST, GUEST._replace(rank=1, name="vn1-2")))


def patterns(text: str) -> st.SearchStrategy[str]:
    return st.from_regex(re.compile(rf"\A(?:{text})\Z", re.ASCII))


entries = st.builds(
    Entry,
    patterns(stored._JOB_ID), patterns(stored.USER), patterns(stored._SHA256), patterns(stored._IMAGE),
    patterns(stored._KEY), st.integers(1, stored.MAX_NODES), st.integers(1, 256),
    st.integers(0, stored.MAX_SECONDS), st.integers(0, stored.MAX_SECONDS),
)  # fmt: skip


@st.composite
def layouts(draw: Callable[..., Any]) -> Layout:
    shape = [draw(st.integers(1, 4)) for _ in range(3)]
    vcpus = draw(st.permutations(range(shape[0] * shape[1] * shape[2])))
    cuts = sorted(draw(st.lists(st.integers(0, len(vcpus)), max_size=3)))
    shares = [tuple(vcpus[low:high]) for low, high in zip([0, *cuts], [*cuts, len(vcpus)])]
    cells = tuple(Cell(share, draw(st.integers(1, 1 << 20)), None) for share in shares)
    row = st.lists(st.integers(0, 255), min_size=len(cells), max_size=len(cells)).map(tuple)
    return Layout(*shape, cells, tuple(draw(row) for _ in cells))


guests = st.builds(
    SavedGuest,
    st.integers(0, stored.MAX_NODES * 256 - 1), patterns(stored._NAME), patterns(stored._MAC),
    st.none() | patterns(stored._ADDRESS), layouts(), st.integers(1, stored.MAX_BYTES),
    st.none() | st.integers(1, stored.MAX_BYTES), st.none() | st.integers(0, (1 << 32) - 1),
)  # fmt: skip
parts = st.builds(
    NodePart,
    st.integers(0, stored.MAX_NODES - 1), patterns(stored._HOST_KEY), st.sampled_from(["kvm", "tcg"]),
    patterns(stored._WORDS), st.lists(guests, max_size=3).map(tuple),
)  # fmt: skip


@given(entries)
def test_an_entry_is_read_as_it_was_written(entry: Entry) -> None:
    assert parse_entry(dump_entry(entry), "job.json") == entry


@given(parts)
def test_a_part_is_read_as_it_was_written(part: NodePart) -> None:
    assert parse_part(dump_part(part), "node.0.json") == part


def test_a_layout_is_stored_without_the_hosts_nodes() -> None:
    bound = Layout(1, 2, 1, (Cell((0,), 256, 1), Cell((1,), 256, 0)), ((10, 20), (20, 10)))
    (read,) = parse_part(dump_part(PART._replace(guests=(GUEST._replace(layout=bound),))), "part").guests
    assert read.layout == bound._replace(cells=(Cell((0,), 256, None), Cell((1,), 256, None)))


def refused(parse: Callable[[bytes, str], object], data: bytes) -> str:
    """Why a text is refused: in one line, which names the file, and says nothing that moves a cursor."""
    with pytest.raises(VTorqueError) as caught:
        parse(data, "the file")
    assert caught.value.code is Code.SUSPEND
    said = caught.value.message
    assert said.startswith("the file: ") and len(said) < 400 and said.isprintable()
    said.encode()
    return said


def changed(plain: bytes, path: tuple[object, ...], value: object) -> bytes:
    tree = json.loads(plain)
    inner: Any = tree
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return json.dumps(tree).encode()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 2), ("version", True), ("version", None),
        ("job_id", "12.server\n"), ("job_id", "../12"), ("job_id", ""), ("job_id", 12), ("job_id", "x" * 400),
        ("user", "root/../carol"), ("user", "-x"), ("user", "ca rol"),
        ("spec_sha256", "A" * 64), ("spec_sha256", "a" * 63),
        ("image", "micro"), ("image", "micro@0"), ("image", "/etc/passwd@1"), ("image", "micro@1,readonly=off"),
        ("key", "a/b"), ("key", ""), ("key", "a" * 65),
        ("nodes", 0), ("nodes", 65537), ("nodes", True), ("nodes", 1.0), ("nodes", "1"), ("nodes", None),
        ("per_node", 0), ("per_node", 257), ("when", -1), ("when", 10**40), ("walltime_s", [1]), ("walltime_s", {}),
        ("when", "\ud800\x1b[2J"), ("user", "\ud800\x1b[2J"),
    ],
)  # fmt: skip
def test_what_is_no_entry(name: str, value: object) -> None:
    assert f"the file: {name}: " in refused(parse_entry, changed(dump_entry(ENTRY), (name,), value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("node",), -1), (("node",), 65536), (("host_key",), f"{HOST_KEY}\nssh-rsa x"),
        (("host_key",), "* " + HOST_KEY),
        (("accelerator",), "xen"), (("qemu",), "7.2\n"), (("qemu",), ""), (("guests",), {}), (("guests",), [1]),
        (("guests",), [{}] * 257), (("guests", 0, "rank"), -1), (("guests", 0, "rank"), "0"),
        (("guests", 0, "name"), "vn1_1"), (("guests", 0, "name"), "-x"), (("guests", 0, "name"), "a,b"),
        (("guests", 0, "mac"), "02:00:00:00:00:0G"), (("guests", 0, "mac"), "02:00:00:00:00:01,id=x"),
        (("guests", 0, "address"), "10.0.0.1/8"), (("guests", 0, "address"), 7), (("guests", 0, "state_bytes"), 0),
        (("guests", 0, "state_bytes"), 1 << 51), (("guests", 0, "overlay_bytes"), -5), (("guests", 1, "layout"), None),
        (("guests", 1, "layout", "sockets"), 0), (("guests", 1, "layout", "threads"), 4097),
        (("guests", 1, "layout", "cores"), 3), (("guests", 1, "layout", "cells"), []),
        (("guests", 1, "layout", "cells"), [{}] * 129), (("guests", 1, "layout", "cells", 0, "vcpus"), [0, 0]),
        (("guests", 1, "layout", "cells", 0, "vcpus"), [0, 1, 2]), (("guests", 1, "layout", "cells", 0, "vcpus"), "01"),
        (("guests", 1, "layout", "cells", 0, "ram_mib"), 0), (("guests", 1, "layout", "distances"), [[10, 20]]),
        (("guests", 1, "layout", "distances"), [[256]]), (("guests", 1, "layout", "distances"), []),
        (("guests", 1, "layout", "distances"), [[[]]]),
    ],
)  # fmt: skip
def test_what_is_no_part(path: tuple[object, ...], value: object) -> None:
    said = refused(parse_part, changed(dump_part(PART), path, value))
    assert f"the file: {path[0]}" in said


def test_it_says_where_a_wrong_value_stands() -> None:
    path = ("guests", 1, "layout", "cells", 0, "ram_mib")
    said = refused(parse_part, changed(dump_part(PART), path, -1))
    assert said == f"the file: guests.1.layout.cells.0.ram_mib: -1 is no whole number from 1 to {1 << 30}"


@pytest.mark.parametrize("parse", [parse_entry, parse_part])
@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{", b"\xff\xfe", b"null", b"{}", b"[" * 100_000, b"9" * 100_000, b'{"version": 1}',
     b'{"version": 1, "job_id": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"version": 1, "node": ' + b"9" * 4000 + b"}",
     b'{"version": 1, "node": 0, "host_key": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}"],
    ids=range(12),
)  # fmt: skip
def test_what_is_nothing_of_the_kind(parse: Callable[[bytes, str], object], data: bytes) -> None:
    refused(parse, data)


def test_a_text_that_is_too_long_is_not_read_to_its_end() -> None:
    refused(parse_entry, dump_entry(ENTRY)[:-2] + b" " * stored.MAX_ENTRY_BYTES + b"}")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRY_PATHS = [(name,) for name in json.loads(dump_entry(ENTRY))]
PART_PATHS: list[tuple[object, ...]] = [
    *((name,) for name in json.loads(dump_part(PART))),
    *(("guests", 0, name) for name in SavedGuest._fields),
    *(("guests", 0, "layout", name) for name in Layout._fields),
    ("guests", 0, "layout", "cells", 0, "vcpus"),
]


@FUZZ
@given(st.sampled_from(ENTRY_PATHS), plain)
def test_any_json_in_any_place_of_an_entry(path: tuple[object, ...], value: object) -> None:
    data = changed(dump_entry(ENTRY), path, value)
    try:
        read = parse_entry(data, "the file")
    except VTorqueError:
        refused(parse_entry, data)
    else:
        assert parse_entry(dump_entry(read), "again") == read


@FUZZ
@given(st.sampled_from(PART_PATHS), plain)
def test_any_json_in_any_place_of_a_part(path: tuple[object, ...], value: object) -> None:
    data = changed(dump_part(PART), path, value)
    try:
        read = parse_part(data, "the file")
    except VTorqueError:
        refused(parse_part, data)
    else:
        assert parse_part(dump_part(read), "again") == read


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    for parse in (parse_entry, parse_part):
        refused(parse, data)


@given(st.lists(st.binary(max_size=50), max_size=6))
def test_texts_are_framed_and_unframed(texts: list[bytes]) -> None:
    data = framed(texts)
    assert unframed(data) == texts
    for cut in range(1, 4 + len(texts[-1]) if texts else 0):
        with pytest.raises(ValueError, match="cut off"):
            unframed(data[:-cut])
