"""The reader of topologies: recorded machines held against hwloc, small ones against what their manifests say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Optional
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ
from topologies import RECORDED, SMALL, recorded, small

from vmgr.errors import Code, VTorqueError
from vmgr.topology import read as reader
from vmgr.topology.allowed import read_allowed
from vmgr.topology.model import Topology
from vmgr.topology.read import read_topology

BUGGY = "8em64t-2s2ca2c-buggynuma"


class Hwloc:
    """What hwloc says of a tree, whatever a process may use of it."""

    def __init__(self, root: Path) -> None:
        lstopo = shutil.which("lstopo-no-graphics")
        if lstopo is None:
            pytest.skip("no lstopo-no-graphics (hwloc-nox) to hold the reader against")
        command = [lstopo, "--input", str(root), "--if", "fsroot", "--of", "xml", "--whole-system", "--no-io"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        self._top = ElementTree.fromstring(done.stdout[done.stdout.index("<topology") :])

    def sets(self, kind: str) -> set[frozenset[int]]:
        """The CPUs of each object of a kind."""
        return {bits(found.get("cpuset")) for found in self._objects(kind)}

    def nodes(self) -> dict[int, tuple[frozenset[int], int]]:
        """CPUs and MiB of each NUMA node."""
        return {
            int(found.get("os_index", "")): (bits(found.get("cpuset")), int(found.get("local_memory", "0")) >> 20)
            for found in self._objects("NUMANode")
        }

    def allowed(self) -> tuple[frozenset[int], frozenset[int]]:
        (machine,) = self._objects("Machine")
        return bits(machine.get("allowed_cpuset")), bits(machine.get("allowed_nodeset"))

    def distances(self) -> Optional[dict[tuple[int, int], int]]:
        found = self._top.find("distances2[@type='NUMANode']")
        if found is None:
            return None
        nodes = " ".join(part.text or "" for part in found.findall("indexes")).split()
        values = " ".join(part.text or "" for part in found.findall("u64values")).split()
        pairs = [(int(one), int(other)) for one in nodes for other in nodes]
        return dict(zip(pairs, map(int, values)))

    def _objects(self, kind: str) -> list[ElementTree.Element]:
        return [found for found in self._top.iter("object") if found.get("type") == kind]


def bits(mask: Optional[str]) -> frozenset[int]:
    """The numbers in one of hwloc's masks: words of 32 bits, of which empty ones may be left out."""
    number = 0
    for word in (mask or "0x0").split(","):
        number = number << 32 | int(word or "0", 16)
    return frozenset(bit for bit in range(number.bit_length()) if number >> bit & 1)


def grouped(topology: Topology, field: str) -> set[frozenset[int]]:
    """The CPUs that share a core or package."""
    groups: dict[int, set[int]] = {}
    for cpu in topology.cpus:
        groups.setdefault(getattr(cpu, field), set()).add(cpu.number)
    return {frozenset(group) for group in groups.values()}


def tree(name: str) -> Path:
    return small(name) if name in SMALL else recorded(name)


@pytest.mark.parametrize("name", [*RECORDED, *(name for name in SMALL if name != "arm-two-kinds")])
def test_it_says_what_hwloc_says(name: str) -> None:
    root = tree(name)
    hwloc, topology = Hwloc(root), read_topology(root)
    assert {frozenset([cpu.number]) for cpu in topology.cpus} == hwloc.sets("PU")
    assert grouped(topology, "core") == hwloc.sets("Core")
    assert grouped(topology, "package") == hwloc.sets("Package")
    if name == BUGGY:
        return
    owned = {
        node.number: frozenset(c.number for c in topology.cpus if c.node == node.number) for node in topology.nodes
    }
    found = {node.number: (owned[node.number], node.memory_mib) for node in topology.nodes}
    told = hwloc.nodes()
    assert found.keys() == told.keys()
    for node, (cpus, memory_mib) in told.items():  # hwloc gives all CPUs to a node without memory
        assert found[node] == ((cpus, memory_mib) if memory_mib else (owned[node], 0))
    distances = hwloc.distances()
    if len(topology.nodes) > 1:
        assert distances == topology.distances
    allowed = read_allowed(topology, root)
    assert (allowed.cpus, allowed.nodes) == hwloc.allowed()


@pytest.mark.parametrize("name", [*RECORDED, *SMALL])
def test_every_topology_is_whole(name: str) -> None:
    topology = read_topology(tree(name))
    numbers = [cpu.number for cpu in topology.cpus]
    nodes = [node.number for node in topology.nodes]
    assert numbers == sorted(set(numbers)) and nodes == sorted(set(nodes))
    for field in ("core", "package", "kind"):
        assert {getattr(cpu, field) for cpu in topology.cpus} == set(range(len(grouped(topology, field))))
    assert {cpu.node for cpu in topology.cpus} <= {*nodes, None}
    assert set(topology.distances) == {(one, other) for one in nodes for other in nodes}
    assert topology.memory_mib >= sum(node.memory_mib for node in topology.nodes) > 0 or not nodes
    assert not nodes or not topology.hugepages
    for core in grouped(topology, "core"):
        assert len({(cpu.package, cpu.kind) for cpu in topology.cpus if cpu.number in core}) == 1
    assert topology == read_topology(tree(name))


def test_nodes_that_claim_the_same_cpus_are_not_believed() -> None:
    topology = read_topology(recorded(BUGGY))
    assert (topology.nodes, dict(topology.distances)) == ((), {})
    assert {cpu.node for cpu in topology.cpus} == {None}
    assert topology.memory_mib == 16331824 // 1024


def test_memory_of_gpus_is_no_node() -> None:
    assert [node.number for node in read_topology(recorded("nvidiagpunumanodes")).nodes] == [0, 8]


def test_hybrid_cores() -> None:
    topology = read_topology(recorded("20em64t-hybrid-1p6c2t+2ca4co1t"))
    assert [cpu.number for cpu in topology.cpus if cpu.kind == 0] == list(range(12))
    assert [cpu.number for cpu in topology.cpus if cpu.kind == 1] == list(range(12, 20))


def test_two_nodes_and_their_huge_pages() -> None:
    topology = read_topology(small("two-nodes-smt"))
    assert [(cpu.core, cpu.package, cpu.node) for cpu in topology.cpus] == 2 * [
        (0, 0, 0),
        (1, 0, 0),
        (2, 1, 1),
        (3, 1, 1),
    ]
    assert [dict(node.hugepages) for node in topology.nodes] == [{2048: (512, 500)}, {2048: (0, 0)}]
    assert topology.distances == {(0, 0): 10, (0, 1): 21, (1, 0): 21, (1, 1): 10}


def test_nodes_without_memory_or_cpus() -> None:
    topology = read_topology(small("odd-nodes"))
    assert [(node.number, node.memory_mib) for node in topology.nodes] == [(0, 4096), (1, 0), (4, 2048)]
    assert [cpu.node for cpu in topology.cpus] == [0, 0, 0, 1, 1]


def test_arm_of_two_kinds_without_packages() -> None:
    topology = read_topology(small("arm-two-kinds"))
    assert [cpu.kind for cpu in topology.cpus] == [1, 1, 1, 1, 0, 0]
    assert [cpu.core for cpu in topology.cpus] == [0, 1, 2, 3, 4, 5]  # their ids are 0 to 3 and 0 to 1
    assert {cpu.package for cpu in topology.cpus} == {0}
    assert (topology.nodes, topology.memory_mib, dict(topology.hugepages)) == ((), 4096, {2048: (64, 60)})


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_kinds_of_intel_by_their_pmus(tmp_path: Path) -> None:
    for cpu in range(4):
        write(tmp_path, f"sys/devices/system/cpu/cpu{cpu}/topology/core_id", f"{cpu}\n")
    write(tmp_path, "sys/devices/cpu_core/cpus", "0-1\n")
    write(tmp_path, "sys/devices/cpu_atom/cpus", "2-3\n")
    assert [cpu.kind for cpu in read_topology(tmp_path).cpus] == [0, 0, 1, 1]


def test_cpuinfo_where_there_is_nothing_else(tmp_path: Path) -> None:
    rows = [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 0, 0)]
    text = "\n".join(
        f"processor\t: {cpu}\nphysical id\t: {package}\ncore id\t\t: {core}\n" for cpu, package, core in rows
    )
    write(tmp_path, "proc/cpuinfo", text)
    topology = read_topology(tmp_path)
    assert grouped(topology, "core") == {frozenset({0, 3}), frozenset({1}), frozenset({2})}
    assert grouped(topology, "package") == {frozenset({0, 1, 3}), frozenset({2})}


def test_what_is_no_machine_is_refused(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(VTorqueError) as caught:
            read_topology(root)
        assert caught.value.code is Code.VALUE and str(root) in caught.value.message
    write(tmp_path, "sys/devices/system/cpu/online", "0-3;reboot\n")
    with pytest.raises(VTorqueError, match=r"cpu/online holds no set of numbers"):
        read_topology(tmp_path)


def test_a_file_that_never_ends_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "sys/devices/system/cpu").mkdir(parents=True)
    os.mkfifo(tmp_path / "sys/devices/system/cpu/online")
    write(tmp_path, "sys/devices/system/cpu/cpu0/topology/core_id", "0\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").symlink_to("/dev/zero")
    assert [cpu.number for cpu in read_topology(tmp_path).cpus] == [0]


def test_this_machine() -> None:
    topology = read_topology()
    hwloc = Hwloc(Path("/"))
    assert {cpu.number for cpu in topology.cpus} == set().union(*hwloc.sets("PU"))
    if topology.nodes:
        assert [node.number for node in topology.nodes] == sorted(hwloc.nodes())


def test_libnuma_tells_distances_on_the_running_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is there: its word counts between nodes, and what it cannot say has ACPI's defaults."""
    asked = []

    def numa_distance(one: int, other: int) -> int:
        asked.append((one, other))
        return {(0, 1): 31, (1, 0): 32}.get((one, other), 0)

    info = types.SimpleNamespace(numa_available=lambda: True, numa_distance=numa_distance)
    monkeypatch.setitem(sys.modules, "numa", types.SimpleNamespace(info=info))
    live = reader.Tree(Path("/"))
    assert reader._distances(live, [0, 1], [0, 1]) == {(0, 0): 10, (0, 1): 31, (1, 0): 32, (1, 1): 10}
    assert reader._distances(live, [0], [0]) == {(0, 0): 10}
    recorded_tree = reader.Tree(small("two-nodes-smt"))
    assert reader._distances(recorded_tree, [0, 1], [0, 1])[0, 1] == 21
    assert asked == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_libnuma_agrees_with_sysfs_here() -> None:
    """Loaded for real; on a machine of one node there is not more to compare than its distance to itself."""
    nodes = [node.number for node in read_topology().nodes]
    known = reader._libnuma_distances(nodes)
    if not known:
        pytest.skip("no libnuma, or a kernel without NUMA")
    rows = {node: Path(f"/sys/devices/system/node/node{node}/distance").read_text().split() for node in nodes}
    assert known == {(one, other): int(text) for one in nodes for other, text in zip(nodes, rows[one])}


def test_without_libnuma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numa", None)
    assert reader._libnuma_distances([0, 1]) == {}


FILES = sorted(
    line.split(" ")[0]
    for name in ("two-nodes-smt",)
    for line in (Path(__file__).parent / "topologies" / f"{name}.txt").read_text().splitlines()
    if not line.startswith("#")
)


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(FILES), st.text(max_size=40) | st.from_regex(r"[0-9,\-]{1,12}", fullmatch=True), max_size=6
    )
)
def test_no_text_confuses_it(tmp_path: Path, changed: dict[str, str]) -> None:
    """Whatever files hold: a whole topology, or one line that names a file of the tree."""
    root = tmp_path / "tree"
    if not root.exists():
        shutil.copytree(small("two-nodes-smt"), root)
    for path, text in changed.items():
        write(root, path, text)
    before = {path: (small("two-nodes-smt") / path).read_text() for path in changed}
    try:
        check_topology(root)
    finally:
        for path, text in before.items():
            write(root, path, text)


def check_topology(root: Path) -> None:
    """A tree of a machine gives a whole topology, or one line that names a file of it."""
    try:
        topology = read_topology(root)
    except VTorqueError as err:
        assert err.code is Code.VALUE and str(root) in err.message
        return
    nodes = [node.number for node in topology.nodes]
    assert topology.cpus and set(topology.distances) == {(one, other) for one in nodes for other in nodes}
    assert all(10 <= distance <= 255 for distance in topology.distances.values())


@FUZZ
@given(
    st.text(max_size=300)
    | st.lists(st.sampled_from(["processor: 1", "core id : 2", "physical id:3", "x", ""])).map("\n".join)
)
def test_no_cpuinfo_confuses_it(text: str) -> None:
    for cpu, ids in reader._cpuinfo(text).items():
        assert re.fullmatch("[0-9]+", str(cpu)) and len(ids) == 2
