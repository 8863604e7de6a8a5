"""What is stored of a suspended job, beside the memory and the disks of its guests: values, and their files.

The files are the job's user's own, written and read with that user's rights. So whatever stands in them is the user's
word: it is bounded and checked here, and says nothing that root would not work out again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Callable, NamedTuple, Optional, TypeVar

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import MAX_PER_NODE
from vmgr.names import USER
from vmgr.topology.model import Cell, Layout

VERSION = 1
MAX_ENTRY_BYTES = 1 << 20
MAX_VCPUS = 4096
MAX_CELLS = 128
MAX_BYTES = 1 << 50
MAX_NODES = 1 << 16
MAX_SECONDS = 1 << 40

COMPLETING, STALE, SETTLED = "completing", "stale", "settled"
"""What an attempt's record says of an entry: the job is not known to be queued again yet; the job has gone on since, so
it is to be removed; nothing more is to be done about it."""

# texts: what is not used need not be compiled
_JOB_ID = r"[0-9]{1,20}(?:\[[0-9]{1,10}\]|-[0-9]{1,10})?(?:\.[A-Za-z0-9._-]{1,255})?"
_SHA256 = r"[0-9a-f]{64}"
_IMAGE = r"[a-z0-9][a-z0-9._-]{0,63}@[1-9][0-9]{0,8}"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_MAC = r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}"
_ADDRESS = r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}"
_KEY = r"[A-Za-z0-9._-]{1,64}"
_WORDS = r"[ -~]{1,128}"
_HOST_KEY = r"ssh-ed25519 [A-Za-z0-9+/]{68}={0,2}"

_T = TypeVar("_T")


class SavedGuest(NamedTuple):
    """One guest: who it is in the job, its machine, and the bytes of what was written of it.

    `layout` is bound to no node of a host. `overlay_bytes` is None for a guest without a disk, `state_crc32` where
    nobody has summed the state up.
    """

    rank: int
    name: str
    mac: str
    address: Optional[str]
    layout: Layout
    state_bytes: int
    overlay_bytes: Optional[int]
    state_crc32: Optional[int] = None


class NodePart(NamedTuple):
    """What one node has stored: its place among the job's nodes, the host key of its guests, and these, by rank.

    `accelerator` and `qemu` (its version, as QEMU says it) are those of the node: another may not read what this wrote.
    """

    node: int
    host_key: str
    accelerator: str
    qemu: str
    guests: tuple[SavedGuest, ...]


class Entry(NamedTuple):
    """A suspended job. `image` is NAME@REVISION, `key` that of the attempt that was suspended (see `Allocation`).

    `when` is in seconds since the epoch, `walltime_s` what the attempt had run by then.
    """

    job_id: str
    user: str
    spec_sha256: str
    image: str
    key: str
    nodes: int
    per_node: int
    when: int
    walltime_s: int


def dump_entry(entry: Entry) -> bytes:
    """The text of `job.json`."""
    return _dump(entry._asdict())


def dump_part(part: NodePart) -> bytes:
    """The text of `node.<i>.json`."""
    guests = [{**guest._asdict(), "layout": _plain_layout(guest.layout)} for guest in part.guests]
    return _dump({**part._asdict(), "guests": guests})


def parse_entry(data: bytes, source: str) -> Entry:
    """The entry in the text of a `job.json`. Raises VTorqueError (VT-SUSPEND) that names `source`."""
    tree = _Tree(data, source)
    return Entry(
        tree.text("job_id", _JOB_ID),
        tree.text("user", USER),
        tree.text("spec_sha256", _SHA256),
        tree.text("image", _IMAGE),
        tree.text("key", _KEY),
        tree.number("nodes", 1, MAX_NODES),
        tree.number("per_node", 1, MAX_PER_NODE),
        tree.number("when", 0, MAX_SECONDS),
        tree.number("walltime_s", 0, MAX_SECONDS),
    )


def parse_part(data: bytes, source: str) -> NodePart:
    """The part in the text of a `node.<i>.json`. Raises VTorqueError (VT-SUSPEND) that names `source`."""
    tree = _Tree(data, source)
    return NodePart(
        tree.number("node", 0, MAX_NODES - 1),
        tree.text("host_key", _HOST_KEY),
        tree.text("accelerator", r"kvm|tcg"),
        tree.text("qemu", _WORDS),
        tuple(_guest(each) for each in tree.trees("guests", MAX_PER_NODE)),
    )


def _guest(tree: _Tree) -> SavedGuest:
    return SavedGuest(
        tree.number("rank", 0, MAX_NODES * MAX_PER_NODE - 1),
        tree.text("name", _NAME),
        tree.text("mac", _MAC),
        tree.perhaps("address", lambda name: tree.text(name, _ADDRESS)),
        _layout(tree.tree("layout")),
        tree.number("state_bytes", 1, MAX_BYTES),
        tree.perhaps("overlay_bytes", lambda name: tree.number(name, 1, MAX_BYTES)),
        tree.perhaps("state_crc32", lambda name: tree.number(name, 0, (1 << 32) - 1)),
    )


def _layout(tree: _Tree) -> Layout:
    shape = [tree.number(name, 1, MAX_VCPUS) for name in ("sockets", "cores", "threads")]
    cells = tuple(
        Cell(tuple(each.numbers("vcpus", 0, MAX_VCPUS - 1)), each.number("ram_mib", 1, MAX_BYTES >> 20), None)
        for each in tree.trees("cells", MAX_CELLS)
    )
    distances = tuple(tuple(row) for row in tree.rows("distances", len(cells)))
    layout = Layout(shape[0], shape[1], shape[2], cells, distances)
    vcpus = sorted(vcpu for cell in cells for vcpu in cell.vcpus)
    if not cells or layout.vcpus > MAX_VCPUS or vcpus != list(range(layout.vcpus)):
        raise tree.wrong("cells", "they do not share out the vCPUs")
    return layout


def _plain_layout(layout: Layout) -> dict[str, Any]:
    cells = [{"vcpus": cell.vcpus, "ram_mib": cell.ram_mib} for cell in layout.cells]
    return {**layout._asdict(), "cells": cells}


def _dump(plain: Mapping[str, Any]) -> bytes:
    return json.dumps({"version": VERSION, **plain}, indent=1).encode("ascii") + b"\n"


def _shown(value: object) -> str:
    """A value for a message; one that is made of others only by its kind: it may be nested deeply."""
    return repr(value)[:64] if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


class _Tree:
    """A JSON object from the user, whose members are taken out one by one."""

    def __init__(self, data: object, source: str, path: str = "") -> None:
        self._source = source
        self._path = path
        if isinstance(data, bytes):
            try:
                data = json.loads(data[:MAX_ENTRY_BYTES])
            except (ValueError, RecursionError):
                data = None
            version = data.get("version") if isinstance(data, dict) else VERSION
            if type(version) is not int or version != VERSION:
                raise self.wrong("version", f"{VERSION} is needed")
        if not isinstance(data, dict):
            raise self.wrong("", "a JSON object is needed")
        self._data: Mapping[str, object] = data

    def wrong(self, name: str, what: str) -> VTorqueError:
        where = ".".join(part for part in (self._path, name) if part)
        return VTorqueError(
            f"{self._source}: {where + ': ' if where else ''}{what}",
            code=Code.SUSPEND,
            hint="it was altered; what is stored there is of no use any more",
        )

    def text(self, name: str, pattern: str) -> str:
        value = self._data.get(name)
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
            raise self.wrong(name, f"{_shown(value)} does not look like {pattern}")
        return value

    def number(self, name: str, least: int, most: int) -> int:
        return self._checked(name, self._data.get(name), least, most)

    def numbers(self, name: str, least: int, most: int) -> Iterable[int]:
        return [self._checked(name, each, least, most) for each in self._list(name, self._data.get(name), MAX_VCPUS)]

    def rows(self, name: str, size: int) -> Iterable[Iterable[int]]:
        rows = self._list(name, self._data.get(name), size)
        found = [[self._checked(name, each, 0, 255) for each in self._list(name, row, size)] for row in rows]
        if len(found) != size or any(len(row) != size for row in found):
            raise self.wrong(name, f"{size} rows of {size} numbers are needed")
        return found

    def tree(self, name: str) -> _Tree:
        return _Tree(self._data.get(name), self._source, ".".join(part for part in (self._path, name) if part))

    def trees(self, name: str, most: int) -> list[_Tree]:
        items = self._list(name, self._data.get(name), most)
        path = f"{self._path}.{name}" if self._path else name
        return [_Tree(item, self._source, f"{path}.{at}") for at, item in enumerate(items)]

    def perhaps(self, name: str, read: Callable[[str], _T]) -> Optional[_T]:
        return None if self._data.get(name) is None else read(name)

    def _list(self, name: str, value: object, most: int) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise self.wrong(name, f"a list of at most {most} is needed")
        return value

    def _checked(self, name: str, value: object, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, f"{_shown(value)} is no whole number from {least} to {most}")
        return value
