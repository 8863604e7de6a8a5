"""Pictures of machines and guests, read back: everybody is drawn where they sit, on every machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ
from test_topology_read import tree
from topologies import RECORDED, SMALL, small

from vmgr.topology.allowed import read_allowed
from vmgr.topology.model import Allowed, Cell, Layout, Placement, Topology
from vmgr.topology.picture import draw
from vmgr.topology.plain import as_plain, from_plain, topology_as_plain
from vmgr.topology.read import read_topology
from vmgr.topology.seats import letter, memory
from vmgr.topology.svg import draw_svg

SVG = "{http://www.w3.org/2000/svg}"


def a_placement(vcpus: tuple[tuple[int, ...], ...], **fields: Any) -> Placement:
    cells = (Cell(tuple(range(len(vcpus))), 2048, fields.pop("node", None)),)
    layout = Layout(1, len(vcpus), 1, cells, ((10,),))
    return Placement(**{"vcpus": vcpus, "emulator": (), "io": (), "memory": (), "layout": layout, **fields})


def crowd(topology: Topology) -> tuple[Mapping[str, Placement], frozenset[int]]:
    """Two guests on a machine: the second shares a CPU with the emulator of the first; the last CPU is the host's."""
    cpus = [cpu.number for cpu in topology.cpus]
    third = max(1, len(cpus) // 3)
    first = a_placement(tuple((cpu,) for cpu in cpus[:third]), emulator=(cpus[third],), node=topology.cpus[0].node)
    second = a_placement(tuple((cpu,) for cpu in cpus[third : 2 * third]), io=(cpus[-2],))
    return {"vnode01-1": first, "vnode01-2": second}, frozenset(cpus[-1:])


def read_back(picture: str) -> dict[int, str]:
    """What stands under each CPU of a drawn machine."""
    found: dict[int, str] = {}
    lines = picture.replace("|", "│").partition("\ndistance ")[0].splitlines()
    for above, below in zip(lines, lines[1:]):
        if above.startswith(" ") and re.fullmatch(r"[ 0-9│]+", above) and not re.fullmatch(r"[ 0-9│]+", below):
            for match in re.finditer(r"[0-9]+", above):
                start = below.rfind(" ", 0, match.end()) + 1
                assert int(match[0]) not in found
                found[int(match[0])] = below[start : match.end()]
    return found


@pytest.mark.parametrize("name", [*RECORDED, *SMALL])
def test_everybody_is_drawn_where_they_sit(name: str) -> None:
    topology = read_topology(tree(name))
    allowed = read_allowed(topology, tree(name))
    guests, host = crowd(topology)
    picture = draw(topology, guests, allowed, host)
    assert all(len(line) <= 80 for line in picture.splitlines())
    found = read_back(picture)
    assert list(found) == sorted(found, key=list(found).index) and set(found) == {cpu.number for cpu in topology.cpus}
    for guest, placement in zip("AB", guests.values()):
        for vcpu, cpus in enumerate(placement.vcpus):
            for cpu in cpus:
                assert found[cpu].rstrip("+") == f"{guest}{vcpu}"
    shared = guests["vnode01-1"].emulator[0]
    assert found[shared] == "B0+"
    (kept,) = host
    assert found[kept] == "host"
    seated = {cpu for placement in guests.values() for cpus in placement.vcpus for cpu in cpus} | host
    for cpu in set(found) - seated - {guests["vnode01-2"].io[0]}:
        assert found[cpu] == ("·" if cpu in allowed.cpus else "×")  # noqa: RUF001
    for node in topology.nodes:
        assert re.search(rf"\bnode {node.number}\b.*  {re.escape(memory(node.memory_mib))}", picture)
    assert click.unstyle(draw(topology, guests, allowed, host, colour=True)) == picture
    assert "\x1b" not in picture and "\x1b" in draw(topology, guests, allowed, host, colour=True)


@pytest.mark.parametrize("name", [*RECORDED, *SMALL])
def test_svg_has_every_cpu_once(name: str) -> None:
    topology = read_topology(tree(name))
    guests, host = crowd(topology)
    text = draw_svg(topology, guests, read_allowed(topology, tree(name)), host)
    page = ElementTree.fromstring(text)
    told: dict[int, str] = {}
    for title in page.iter(f"{SVG}title"):
        match = re.fullmatch(r"CPU ([0-9]+): (.*)", title.text or "")
        if match:
            assert int(match[1]) not in told
            told[int(match[1])] = match[2]
    assert set(told) == {cpu.number for cpu in topology.cpus}
    assert told[topology.cpus[0].number].startswith("vCPU 0 of vnode01-1")
    assert told[guests["vnode01-1"].emulator[0]] == "vCPU 0 of vnode01-2, emulator of vnode01-1"
    assert told[topology.cpus[-1].number].endswith("kept for the host")
    width, height = (float(page.get(side, "0")) for side in ("width", "height"))
    assert all(x + w <= width and y + h <= height for x, y, w, h in boxes(page))
    assert text.isascii() and not re.search(r"href|url\((?!#barred\))|<script|@import", text)


def boxes(element: ElementTree.Element, x: float = 14.0, y: float = 14.0) -> list[tuple[float, float, float, float]]:
    """All rectangles of a page, where its groups have moved them, from its upper left corner."""
    found = []
    if element.tag == f"{SVG}rect":
        left, top, width, height = (float(element.get(key, "0")) for key in ("x", "y", "width", "height"))
        found.append((x + left, y + top, width, height))
    moved = re.fullmatch(r"translate\(([0-9.]+) ([0-9.]+)\)", element.get("transform", ""))
    if moved:
        x, y = x + float(moved[1]), y + float(moved[2])
    if element.tag != f"{SVG}pattern":
        for child in element:
            found += boxes(child, x, y)
    return found


HOSTILE = '<script>&"]]>\x1b[2J\n\x00é'


def test_names_are_only_names() -> None:
    topology = read_topology(small("two-nodes-smt"))
    allowed = Allowed(frozenset(range(4)), frozenset({0}), HOSTILE)
    guests = {HOSTILE: a_placement(((0,), (1,)))}
    page = ElementTree.fromstring(draw_svg(topology, guests, allowed))
    texts = " ".join(element.text or "" for element in page.iter())
    assert r'<script>&"]]>\x1b[2J\n\x00é' in texts and not list(page.iter(f"{SVG}script"))
    picture = draw(topology, guests, allowed)
    assert "\x1b" not in picture and "\x00" not in picture and r"A  <script>" in picture


def test_what_a_guest_has_is_said() -> None:
    topology = read_topology(small("two-nodes-smt"))
    layout = Layout(2, 1, 2, (Cell((0, 1), 1024, 0), Cell((2, 3), 1536, 1)), ((10, 21), (21, 10)))
    guest = Placement(((0,), (4,), (2, 6), (2, 6)), (1, 5), (3,), (0, 1), layout)
    picture = draw(topology, {"g": guest}, read_allowed(topology, small("two-nodes-smt")))
    assert "A  g: 4 vCPUs on 0,2,4,6, emulator on 1,5, I/O on 3" in picture
    assert "1 GiB on node 0 + 1.5 GiB on node 1, seen as 2 sockets x 1 core x 2 threads, 2 nodes" in " ".join(
        line.strip() for line in picture.splitlines()
    )
    together = guest._replace(io=guest.emulator)
    shown = draw(topology, {"g": together}, read_allowed(topology, small("two-nodes-smt")), frozenset({1}))
    assert "emulator and I/O on 1,5" in shown and "Aio" not in shown and read_back(shown)[1] == "host+"
    assert "huge pages of 2 MiB: 500 of 512 free" in picture
    assert read_back(picture) == {
        0: "A0", 4: "A1", 1: "Aem", 5: "Aem", 2: "A2+", 6: "A2+", 3: "Aio", 7: "·",
    }  # fmt: skip


def test_letters_and_sizes() -> None:
    assert [letter(guest) for guest in (0, 25, 26, 27, 701, 702)] == ["A", "Z", "AA", "AB", "ZZ", "AAA"]
    assert [memory(mib) for mib in (0, 512, 1024, 1536, 131072)] == ["0 MiB", "512 MiB", "1 GiB", "1.5 GiB", "128 GiB"]


numbers = st.integers(0, 1 << 14)
some = st.lists(numbers, max_size=4).map(tuple)
placements = st.builds(
    Placement,
    vcpus=st.lists(some, max_size=12).map(tuple),
    emulator=some,
    io=some,
    memory=some,
    layout=st.builds(
        Layout,
        sockets=numbers,
        cores=numbers,
        threads=numbers,
        cells=st.lists(st.builds(Cell, vcpus=some, ram_mib=numbers, host_node=st.none() | numbers), max_size=3).map(
            tuple
        ),
        distances=st.lists(some, max_size=3).map(tuple),
    ),
)


@FUZZ
@given(placements)
def test_placements_survive_json(placement: Placement) -> None:
    assert from_plain(json.loads(json.dumps(as_plain(placement), sort_keys=True))) == placement


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "1", "node", "vcpus"]), inner),
    max_leaves=8,
)


@FUZZ
@given(st.data())
def test_what_is_no_placement_is_refused(data: st.DataObject) -> None:
    """Any part replaced by something else, left out, or added: refused, or a placement that was changed."""
    good = as_plain(data.draw(placements))
    part: Any = good
    while True:
        keys = sorted(part) if isinstance(part, dict) else list(range(len(part)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        if isinstance(part[key], (dict, list)) and data.draw(st.booleans()):
            part = part[key]
            continue
        part[key] = data.draw(plain)
        break
    try:
        again = as_plain(from_plain(good))
    except ValueError:
        return
    assert again == good
    for odd in (None, [], {}, {**good, "more": 1}, {key: value for key, value in good.items() if key != "io"}):
        with pytest.raises(ValueError, match="an object with"):
            from_plain(odd)


@pytest.mark.parametrize("name", [*RECORDED, *SMALL])
def test_a_machine_as_json(name: str) -> None:
    topology = read_topology(tree(name))
    found = json.loads(json.dumps(topology_as_plain(topology, read_allowed(topology, tree(name))), sort_keys=True))
    assert [row["cpu"] for row in found["cpus"]] == [cpu.number for cpu in topology.cpus]
    for kind in ("cores", "packages"):
        assert sorted(cpu for row in found[kind] for cpu in row["cpus"]) == [cpu.number for cpu in topology.cpus]
    assert [(row["node"], row["memory_mib"]) for row in found["nodes"]] == [node[:2] for node in topology.nodes]
    assert {(int(one), int(other)): d for one, row in found["distances"].items() for other, d in row.items()} == (
        topology.distances
    )
    assert sorted(found["packages"][0]["cores"]) == sorted(row["core"] for row in found["cores"] if row["package"] == 0)
