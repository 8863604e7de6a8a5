"""Where guests sit: small machines one can follow by hand, and rules that hold on all, recorded ones among them."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodesite import FUZZ
from placements import GIB, cpus_of, keeps_the_rules, machine, uniform, whole
from topologies import RECORDED, SMALL, recorded, small

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import GuestGroup
from vmgr.topology.allowed import read_allowed
from vmgr.topology.cpulist import parse_cpus
from vmgr.topology.model import Allowed, Cell, Cpu, NumaNode, Topology
from vmgr.topology.nearest import MAX_SETS, fewest_nearest
from vmgr.topology.plan import Ask, plan
from vmgr.topology.read import read_topology
from vsub.userfiles import read_pinning

TWO = machine(4, 4)
SMT = machine(4, 4, threads=2)


def seats(topology: Topology, ask: Ask, **options: Any) -> list[list[int]]:
    made = keeps_the_rules(topology, options.pop("allowed", whole(topology)), ask, **options)
    return [cpus_of(guest) for guest in made.guests]


def refusal(topology: Topology, ask: Ask, **options: Any) -> str:
    with pytest.raises(VTorqueError) as caught:
        plan(topology, options.pop("allowed", whole(topology)), ask, **options)
    assert caught.value.code is Code.NODE and "\n" not in str(caught.value)
    return caught.value.detail


# CPUs


@pytest.mark.parametrize(
    ("vcpus", "busy", "chosen"),
    [
        (1, {}, [0]),
        (4, {}, [0, 1, 2, 3]),
        (2, {0: 1}, [1, 2]),  # the node with the least to spare
        (3, {0: 1, 1: 1}, [4, 5, 6]),
        (5, {}, [0, 1, 4, 5, 6]),  # two nodes, about evenly
        (5, {0: 1}, [1, 2, 4, 5, 6]),
        (8, {}, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_one_guest(vcpus: int, busy: dict[int, int], chosen: list[int]) -> None:
    assert seats(TWO, Ask(1, vcpus, 512), busy=busy) == [chosen]


def test_guests_fill_a_node_before_they_begin_another() -> None:
    assert seats(TWO, Ask(2, 2, 512)) == [[0, 1], [2, 3]]
    assert seats(TWO, Ask(2, 3, 512)) == [[0, 1, 2], [4, 5, 6]]
    assert seats(TWO, Ask(2, 4, 512)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert seats(machine(6, 6), Ask(3, 4, 512)) == [[0, 1, 2, 3], [6, 7, 8, 9], [4, 5, 10, 11]]


def test_guests_on_several_nodes_do_not_tear_each_other_apart() -> None:
    """Two nodes each, though three guests that were split evenly would leave the last one a rest on every node."""
    made = keeps_the_rules(machine(8, 8, 8, 8), whole(machine(8, 8, 8, 8)), Ask(3, 10, 512))
    assert [len(guest.layout.cells) for guest in made.guests] == [2, 2, 2]


def test_siblings_come_last() -> None:
    assert seats(SMT, Ask(1, 4, 512)) == [[0, 1, 2, 3]]
    assert seats(SMT, Ask(1, 8, 512)) == [[0, 1, 2, 3, 4, 5, 6, 7]]  # cores of two nodes before siblings of one
    assert seats(SMT, Ask(1, 10, 512)) == [[0, 8, 1, 2, 3, 4, 12, 5, 6, 7]]
    assert seats(SMT, Ask(1, 16, 512)) == [[0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]]


def test_guests_have_cores_of_their_own_when_siblings_must_be_used() -> None:
    assert seats(SMT, Ask(2, 6, 512)) == [[0, 8, 1, 9, 2, 3], [4, 12, 5, 13, 6, 7]]
    assert seats(SMT, Ask(3, 4, 512)) == [[0, 8, 1, 9], [4, 5, 6, 7], [2, 10, 3, 11]]
    assert seats(machine(4, threads=2), Ask(3, 2, 512)) == [[0, 1], [2, 6], [3, 7]]


def test_guests_share_cores_only_when_there_is_no_other_way() -> None:
    assert seats(machine(3, threads=2), Ask(2, 3, 512)) == [[0, 3, 1], [4, 2, 5]]
    assert seats(machine(2, threads=2), Ask(4, 1, 512)) == [[0], [1], [2], [3]]


def test_cores_of_other_jobs_come_last() -> None:
    assert seats(machine(4, threads=2), Ask(1, 2, 512), busy={0: 1, 1: 1}) == [[2, 3]]
    assert seats(machine(4, threads=2), Ask(1, 3, 512), busy={0: 1, 1: 1}) == [[2, 6, 3]]
    assert seats(machine(4, threads=2), Ask(1, 6, 512), busy={0: 1, 1: 1}) == [[4, 5, 2, 6, 3, 7]]
    assert seats(machine(4, 4, threads=2), Ask(1, 4, 512), busy={8: 1}) == [[4, 5, 6, 7]]


HYBRID = Topology(
    tuple(Cpu(n, n // 2 if n < 8 else n - 4, 0, 0, int(n >= 8)) for n in range(16)),
    (NumaNode(0, 8 * GIB),),
    {(0, 0): 10},
    8 * GIB,
)
"""Four cores with two threads, and eight less capable ones."""


@pytest.mark.parametrize(
    ("ask", "chosen"),
    [
        (Ask(1, 4, 512), [[0, 2, 4, 6]]),
        (Ask(1, 5, 512), [[8, 9, 10, 11, 12]]),  # one kind, and no siblings
        (Ask(2, 4, 512), [[0, 2, 4, 6], [8, 9, 10, 11]]),
        (Ask(3, 3, 512), [[0, 2, 4], [8, 9, 10], [11, 12, 13]]),
        (Ask(1, 10, 512), [[0, 2, 4, 6, 8, 9, 10, 11, 12, 13]]),  # both, before siblings
        (Ask(1, 13, 512), [[0, 1, 2, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15]]),
    ],
)
def test_kinds_of_cores_are_not_mixed(ask: Ask, chosen: list[list[int]]) -> None:
    assert seats(HYBRID, ask) == chosen


def test_too_few_cpus_are_refused() -> None:
    assert refusal(TWO, Ask(1, 9, 512)) == (
        "9 vCPUs do not fit: 8 of 8 CPUs of this node are free; "
        "ask for fewer vcpus, or the site sets hypervisor.overcommit_cpus"
    )
    assert "3 vCPUs do not fit: 2 of 8 CPUs of this node" in refusal(
        TWO, Ask(1, 3, 512), busy=dict.fromkeys(range(6), 1)
    )
    assert "2 guests with 5 vCPUs each do not fit: 8 of 8 CPUs" in refusal(TWO, Ask(2, 5, 512))
    cpuset = Allowed(frozenset({0, 1, 99}), frozenset({0}), "the cpuset /torque/12.srv")
    assert "3 vCPUs do not fit: 2 of 2 CPUs of the cpuset /torque/12.srv are free" in refusal(
        TWO, Ask(1, 3, 512), allowed=cpuset
    )
    assert "7 of 7 CPUs of this node are free, 1 more stay with the host (resources.host_cores)" in refusal(
        TWO, Ask(1, 8, 512), host_cores=1
    )
    assert "0 of 0 CPUs" in refusal(TWO, Ask(1, 1, 512), host_cores=8, overcommit=True)


def test_overcommitted_vcpus_go_where_the_load_is_least() -> None:
    two = machine(2)
    assert seats(two, Ask(1, 3, 512), overcommit=True) == [[0, 0, 1]]
    assert seats(two, Ask(1, 2, 512), busy={0: 2}, overcommit=True) == [[1, 1]]
    assert seats(machine(2, 2), Ask(2, 4, 512), overcommit=True) == [[0, 0, 1, 1], [2, 2, 3, 3]]
    made = keeps_the_rules(two, whole(two), Ask(1, 4, 512), overcommit=True)
    assert made.guests[0].layout[:3] == (1, 4, 1), "vCPUs on one CPU are no siblings"


# the host, emulators, I/O


def test_the_first_cores_stay_with_the_host() -> None:
    made = keeps_the_rules(SMT, whole(SMT), Ask(1, 4, 512), host_cores=1)
    assert made.host == {0, 8} and cpus_of(made.guests[0]) == [4, 5, 6, 7]
    cpuset = Allowed(frozenset({2, 3, 4, 10, 11, 12}), frozenset({0}), "the cpuset /torque/1.srv")
    made = keeps_the_rules(SMT, cpuset, Ask(1, 2, 512), host_cores=1)
    assert made.host == {2, 10} and cpus_of(made.guests[0]) == [3, 4]


def test_siblings_of_the_host_are_given_before_a_guest_is_refused() -> None:
    """`vsub` counts `ppn` by CPUs: 1 for the host and 15 for the guest are what a job of 16 has asked for."""
    made = keeps_the_rules(SMT, whole(SMT), Ask(1, 15, 512), host_cores=1)
    assert made.host == {0} and len(cpus_of(made.guests[0])) == 15
    assert "14 of 14 CPUs of this node are free, 2 more" in refusal(SMT, Ask(1, 16, 512), host_cores=1)
    assert plan(SMT, whole(SMT), Ask(1, 15, 512), host_cores=1, overcommit=True).host == {0, 8}


@pytest.mark.parametrize(
    ("vcpus", "options", "emulator"),
    [
        (2, {}, (3, 11)),  # a whole core of its node, the last
        (4, {}, (7, 15)),  # of its package
        (4, {"host_cores": 1}, (3, 11)),
        (7, {"host_cores": 1}, (0, 8)),  # the host's
        (8, {}, tuple(range(8, 16))),  # siblings of its own
        (16, {}, tuple(range(16))),  # none is left
        (2, {"busy": {0: 1, 8: 1, 1: 1, 9: 1}}, (7, 15)),
    ],
)
def test_emulators_are_off_the_vcpus(vcpus: int, options: dict[str, Any], emulator: tuple[int, ...]) -> None:
    topology = machine(4, 4, threads=2, per_package=2)
    made = keeps_the_rules(topology, whole(topology), Ask(1, vcpus, 512), **options)
    assert made.guests[0].emulator == emulator


def test_emulators_of_several_guests_and_of_large_ones() -> None:
    topology = machine(32, 32)
    made = keeps_the_rules(topology, whole(topology), Ask(3, 4, 512))
    assert [guest.emulator for guest in made.guests] == [(31,), (30,), (29,)]
    assert keeps_the_rules(topology, whole(topology), Ask(1, 17, 512)).guests[0].emulator == (30, 31)
    full = machine(2, threads=2)
    made = keeps_the_rules(full, whole(full), Ask(2, 1, 512), busy={1: 1})
    assert [guest.emulator for guest in made.guests] == [(3,), (3,)]


def test_io_threads_get_whole_cores_near_to_each_guest() -> None:
    made = keeps_the_rules(SMT, whole(SMT), Ask(2, 3, 512, io=4))
    assert [guest.io for guest in made.guests] == [(3, 11), (7, 15)]
    assert all(not set(guest.io) & set(guest.emulator) for guest in made.guests)
    made = keeps_the_rules(SMT, whole(SMT), Ask(1, 2, 512, io=1))
    assert made.guests[0].io == (3, 11) and made.guests[0].emulator == (2, 10)
    far = machine(2, 1)
    made = keeps_the_rules(far, whole(far), Ask(1, 1, 512, io=2))
    assert cpus_of(made.guests[0]) == [2] and made.guests[0].io == (0, 1), "all are for it"
    assert made.guests[0].emulator == (1,), "shared, where no other is left"


def test_cores_for_io_are_set_aside_as_long_as_the_vcpus_fit() -> None:
    made = keeps_the_rules(SMT, whole(SMT), Ask(1, 8, 512, io=2))
    assert made.guests[0].io == (7, 15) and len(set(cpus_of(made.guests[0]))) == 8
    made = keeps_the_rules(SMT, whole(SMT), Ask(1, 14, 512, io=4))
    assert len(made.guests[0].io) == 2
    made = keeps_the_rules(SMT, whole(SMT), Ask(1, 16, 512, io=2))
    assert made.guests[0].io == made.guests[0].emulator == tuple(range(16))


# memory


def test_memory_decides_about_the_node() -> None:
    topology = machine(4, 4, memory=(4 * GIB, 16 * GIB))
    assert seats(topology, Ask(1, 4, 5 * GIB)) == [[4, 5, 6, 7]]
    assert seats(topology, Ask(2, 2, 4 * GIB)) == [[0, 1], [4, 5]]
    assert seats(topology, Ask(2, 2, 5 * GIB)) == [[4, 5], [6, 7]]
    assert seats(topology, Ask(1, 4, 5 * GIB), held_mib={1: 12 * GIB}) == [[0, 1, 4, 5]]


def test_memory_of_several_nodes_makes_a_guest_of_several() -> None:
    topology = machine(4, 4, memory=(4 * GIB, 16 * GIB))
    made = keeps_the_rules(topology, whole(topology), Ask(1, 4, 18 * GIB))
    assert made.guests[0].layout.cells == (Cell((0, 1), 4 * GIB, 0), Cell((2, 3), 14 * GIB, 1))
    made = keeps_the_rules(topology, whole(topology), Ask(1, 1, 18 * GIB))
    assert made.guests[0].layout.cells == (Cell((0,), 16 * GIB, 1), Cell((), 2 * GIB, 0))
    assert made.guests[0].memory == (0, 1) and cpus_of(made.guests[0]) == [4]


def test_memory_in_all() -> None:
    assert refusal(TWO, Ask(1, 1, 17 * GIB)) == (
        "17G of RAM does not fit: node 0 has 8G, node 1 has 8G (of this node); "
        "ask for less ram, or fewer guests on a node"
    )
    assert "2 guests with 9G of RAM each do not fit" in refusal(TWO, Ask(2, 1, 9 * GIB))
    assert "node 1 has 2G" in refusal(TWO, Ask(1, 1, 12 * GIB), held_mib={1: 6 * GIB})
    only = Allowed(frozenset(range(8)), frozenset({1}), "the cpuset /torque/1.srv")
    assert "does not fit: node 1 has 8G (of the cpuset /torque/1.srv)" in refusal(TWO, Ask(1, 1, 9 * GIB), allowed=only)
    assert "it has none" in refusal(TWO, Ask(1, 1, 512), allowed=only._replace(nodes=frozenset()))
    assert "the machine has 8G" in refusal(uniform(2, 2), Ask(1, 1, 9 * GIB))


def test_a_guest_has_its_memory_of_the_nodes_that_are_allowed() -> None:
    made = keeps_the_rules(TWO, Allowed(frozenset(range(8)), frozenset({1}), "x"), Ask(1, 4, 512))
    assert cpus_of(made.guests[0]) == [4, 5, 6, 7]
    made = keeps_the_rules(TWO, Allowed(frozenset(range(4)), frozenset({1}), "x"), Ask(1, 4, 512))
    assert cpus_of(made.guests[0]) == [0, 1, 2, 3] and made.guests[0].layout.cells == (Cell((0, 1, 2, 3), 512, 1),)


def test_nodes_without_memory_have_it_from_the_nearest_and_nodes_without_cpus_are_left_alone() -> None:
    topology = machine(4, 4, 4, 0, memory=(8 * GIB, 0, 8 * GIB, 64 * GIB))
    topology = topology._replace(distances={**topology.distances, (1, 2): 15, (2, 1): 15, (1, 3): 11, (3, 1): 11})
    made = keeps_the_rules(topology, whole(topology), Ask(3, 4, GIB))
    assert [guest.memory for guest in made.guests] == [(0,), (2,), (2,)]
    assert cpus_of(made.guests[2]) == [4, 5, 6, 7]
    assert "node 0 has 8G, node 1 has 0M, node 2 has 8G (of" in refusal(topology, Ask(1, 4, 17 * GIB))


PAGES = {2048: (1024, 512), 1048576: (4, 4)}


def test_huge_pages() -> None:
    topology = machine(4, 4, pages=PAGES)
    made = keeps_the_rules(topology, whole(topology), Ask(1, 2, GIB), hugepage_kib=2048)
    assert made.guests[0].memory == (0,)
    made = keeps_the_rules(topology, whole(topology), Ask(1, 2, GIB + 2), hugepage_kib=2048)
    assert made.guests[0].memory == (0, 1)
    assert refusal(topology, Ask(2, 2, 2 * GIB), hugepage_kib=2048) == (
        "2 guests with 2G of RAM each do not fit: 2048 huge pages of 2M are needed, 1024 are free: "
        "node 0 has 1G, node 1 has 1G (of this node); "
        "ask for less ram, or the site sets more of them aside (hypervisor.hugepages)"
    )
    assert "1 huge pages of 16G are needed, 0 are free: node 0 has 0M" in refusal(
        topology, Ask(1, 1, 16 * GIB), hugepage_kib=16 << 20
    )
    assert refusal(topology, Ask(1, 2, 1536), hugepage_kib=1 << 20) == (
        "1536M of RAM is no multiple of this node's huge pages of 1G; ask for ram=1G or 2G"
    )
    assert "ask for ram=1G" in refusal(topology, Ask(1, 2, 512), hugepage_kib=1 << 20)
    made = keeps_the_rules(topology, whole(topology), Ask(1, 6, 3 * GIB), hugepage_kib=1 << 20)
    assert sorted(cell.ram_mib for cell in made.guests[0].layout.cells) == [GIB, 2 * GIB]
    made = keeps_the_rules(topology, whole(topology), Ask(1, 6, GIB), hugepage_kib=1 << 20)
    assert [cell.ram_mib for cell in made.guests[0].layout.cells] == [GIB], "a page is not split"


def test_huge_pages_that_others_hold_and_have_not_touched_yet_are_not_free() -> None:
    topology = machine(4, 4, pages={2048: (1024, 1024)})
    made = keeps_the_rules(topology, whole(topology), Ask(1, 2, GIB), hugepage_kib=2048, held_mib={0: 1536})
    assert made.guests[0].memory == (1,)


def test_huge_pages_of_a_machine_without_numa_and_small_ones() -> None:
    topology = uniform(4)._replace(hugepages={64: (16384, 16384), 2048: (2, 2)})
    assert plan(topology, whole(topology), Ask(1, 2, 4), hugepage_kib=2048).guests[0].memory == ()
    assert plan(topology, whole(topology), Ask(1, 2, 1023), hugepage_kib=64).guests[0].layout.cells[0].ram_mib == 1023
    assert "16400 huge pages of 64K are needed, 16384 are free" in refusal(topology, Ask(1, 2, 1025), hugepage_kib=64)


# what the guest sees


def test_the_layout_mirrors_packages_nodes_and_siblings() -> None:
    topology = machine(2, 2, 2, 2, threads=2, per_package=2)
    topology = topology._replace(
        distances={
            key: 10 if key[0] == key[1] else 16 if key[0] // 2 == key[1] // 2 else 300 for key in topology.distances
        }
    )
    layout = keeps_the_rules(topology, whole(topology), Ask(1, 16, 4 * GIB)).guests[0].layout
    assert layout[:3] == (2, 4, 2)
    assert layout.cells == tuple(Cell(tuple(range(n * 4, n * 4 + 4)), GIB, n) for n in range(4))
    assert layout.distances == ((10, 16, 254, 254), (16, 10, 254, 254), (254, 254, 10, 16), (254, 254, 16, 10))
    layout = keeps_the_rules(topology, whole(topology), Ask(1, 4, GIB)).guests[0].layout
    assert layout[:3] == (1, 4, 1) and [cell.vcpus for cell in layout.cells] == [(0, 1), (2, 3)]


def test_an_uneven_guest_has_one_socket() -> None:
    layout = keeps_the_rules(machine(2, 2), whole(machine(2, 2)), Ask(1, 3, 513)).guests[0].layout
    assert layout[:3] == (1, 3, 1)
    assert layout.cells == (Cell((0,), 172, 0), Cell((1, 2), 341, 1))


def test_a_machine_without_numa() -> None:
    made = keeps_the_rules(uniform(4, 4), whole(uniform(4, 4)), Ask(2, 4, 512))
    assert [cpus_of(guest) for guest in made.guests] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert made.guests[0].layout.cells == (Cell((0, 1, 2, 3), 512, None),) and made.guests[0].memory == ()
    assert keeps_the_rules(uniform(4, 4), whole(uniform(4, 4)), Ask(1, 8, 512)).guests[0].layout[:3] == (2, 4, 1)


# advice, mappings


def test_advice_is_followed_where_it_suffices() -> None:
    assert seats(TWO, Ask(1, 4, 512), advised=frozenset({1})) == [[4, 5, 6, 7]]
    assert seats(TWO, Ask(1, 5, 512), advised=frozenset({1})) == [[0, 1, 4, 5, 6]]
    assert seats(TWO, Ask(1, 2, 9 * GIB), advised=frozenset({1})) == [[0, 4]]
    assert seats(SMT, Ask(1, 6, 512), advised=frozenset({1})) == seats(SMT, Ask(1, 6, 512)), "no siblings for its sake"
    for strange in (frozenset({7}), frozenset()):
        assert seats(TWO, Ask(1, 4, 512), advised=strange) == [[0, 1, 2, 3]]
    only = Allowed(frozenset({0, 1}), frozenset({0}), "x")
    assert seats(TWO, Ask(1, 2, 512), allowed=only, advised=frozenset({1})) == [[0, 1]]


def a_mapping(*guests: tuple[set[int], ...]) -> tuple[tuple[frozenset[int], ...], ...]:
    return tuple(tuple(frozenset(cpus) for cpus in guest) for guest in guests)


def test_a_mapping_is_met_exactly() -> None:
    mapped = a_mapping(({4, 5}, {1}, {5}), ({0}, {2, 6, 7}, {3}))
    made = keeps_the_rules(TWO, whole(TWO), Ask(2, 3, 900, mapped=mapped))
    assert [guest.vcpus for guest in made.guests] == [((4, 5), (1,), (5,)), ((0,), (2, 6, 7), (3,))]
    assert made.guests[0].layout.cells == (Cell((0, 2), 600, 1), Cell((1,), 300, 0))
    assert made.guests[1].layout.cells == (Cell((0, 2), 600, 0), Cell((1,), 300, 1))
    assert made.guests[0].emulator == (1, 4, 5), "none is left"
    pairs = a_mapping(({0}, {8}, {4}, {12}))
    made = keeps_the_rules(SMT, whole(SMT), Ask(1, 4, 512, mapped=pairs))
    assert made.guests[0].layout[:3] == (2, 1, 2) and made.guests[0].emulator == (7, 15)


def test_the_mapping_files_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "users.md").read_text()
    section = text[text.index("## Binding vCPUs") : text.index("## Cloud-config")]
    topology = machine(16, threads=2)  # CPU n and n + 16 are the threads of a core
    seen = []
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        pinning = read_pinning(str(path), "-vm", GuestGroup("micro", *((1, 2, 512), (2, 4, 512))[number]))
        assert pinning.cpus is not None
        mapped = tuple(tuple(parse_cpus(listed) or frozenset() for listed in guest) for guest in pinning.cpus)
        made = keeps_the_rules(topology, whole(topology), Ask(len(mapped), len(mapped[0]), 512, mapped=mapped))
        seen.append([guest.layout[:3] for guest in made.guests])
    assert seen == [[(1, 2, 1)], [(1, 2, 2), (1, 4, 1)]]


@pytest.mark.parametrize(
    ("mapped", "options", "said"),
    [
        (a_mapping(({0}, {9})), {}, "vCPU 1 cannot be bound to the CPUs 9; guests may use 0-7 of this node"),
        (a_mapping(({6, 7, 8},)), {}, "vCPU 0 cannot be bound to the CPUs 6-8, of which 8 may not be; guests may use"),
        (a_mapping(({0, 1},)), {"host_cores": 1}, "the CPUs 0-1, of which 0 may not be; guests may use 1-7 of this"),
        (a_mapping(({0}, {0, 1, 2})), {"busy": {1: 1, 2: 1}}, "vCPU 1 cannot be bound to the CPUs 0-2: 1-2 in use"),
        (a_mapping(({0},), ({0},)), {}, "vCPU 0 cannot be bound to the CPUs 0: 0 in use by another guest; bind"),
        (a_mapping((set(),)), {}, "vCPU 0 cannot be bound to the CPUs none; guests may use 0-7"),
    ],
)  # fmt: skip
def test_a_mapping_to_what_may_not_be_used_is_refused(mapped: Any, options: dict[str, Any], said: str) -> None:
    assert said in refusal(TWO, Ask(len(mapped), len(mapped[0]), 512, mapped=mapped), **options)


def test_a_mapping_to_what_another_guest_has_where_the_site_allows_it() -> None:
    mapped = a_mapping(({0},), ({0},))
    made = keeps_the_rules(TWO, whole(TWO), Ask(2, 1, 512, mapped=mapped), overcommit=True, busy={0: 1})
    assert [guest.vcpus for guest in made.guests] == [((0,),), ((0,),)]


def test_a_mapped_guest_that_needs_memory_of_more_nodes() -> None:
    made = keeps_the_rules(TWO, whole(TWO), Ask(1, 1, 9 * GIB, mapped=a_mapping(({0},))))
    assert made.guests[0].layout.cells == (Cell((0,), 8 * GIB, 0), Cell((), GIB, 1))


# all machines


@st.composite
def machines(draw: st.DrawFn) -> tuple[Topology, Allowed]:
    """Machines with holes: nodes of any size and memory, cores of 1 to 4 threads, two kinds, restricted jobs."""
    count = draw(st.integers(0, 5))
    numbers = sorted(draw(st.sets(st.integers(0, 9), min_size=count, max_size=count)))
    cpus: list[Cpu] = []
    core, threads = 0, draw(st.sampled_from([(1,), (2,), (1, 2), (4,)]))
    kinds = draw(st.sampled_from([(0,), (0, 1)]))
    for node in [*numbers] or [None]:
        for _ in range(draw(st.integers(0 if numbers else 1, 5))):
            kind = draw(st.sampled_from(kinds))
            package = 0 if node is None else node // 2
            cpus += [Cpu(0, core, package, node, kind)] * draw(st.sampled_from(threads))
            core += 1
    if not cpus:
        cpus = [Cpu(0, 0, 0, None)]
    order = draw(st.permutations(range(len(cpus))))
    online = tuple(sorted(cpu._replace(number=number) for number, cpu in zip(order, cpus)))
    sizes = st.sampled_from([0, 512, 1023, 2048, 4096])
    pages = st.sampled_from([{}, {2048: (512, 300)}, {2048: (1024, 1024)}])
    nodes = tuple(
        NumaNode(number, size, draw(pages) if size else {})
        for number, size in zip(numbers, draw(st.lists(sizes, min_size=count, max_size=count)))
    )
    far = st.integers(11, 40)
    distances: dict[tuple[int, int], int] = {}
    for one in numbers:
        for other in numbers:
            distances[one, other] = 10 if one == other else distances.get((other, one)) or draw(far)
    topology = Topology(online, nodes, distances, sum(node.memory_mib for node in nodes) or 4096)
    if not numbers:
        topology = topology._replace(hugepages=draw(pages))
    allowed = whole(topology)
    if draw(st.booleans()):
        some = draw(st.sets(st.sampled_from(sorted(allowed.cpus)), min_size=1)) | {10_000}
        mems = draw(st.sets(st.sampled_from(numbers))) if numbers else set()
        allowed = Allowed(frozenset(some), frozenset(mems), "the cpuset /torque/1")
    return topology, allowed


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "host_cores": st.integers(0, 2),
    "busy": st.dictionaries(st.integers(0, 30), st.integers(0, 2), max_size=6),
    "held_mib": st.dictionaries(st.integers(0, 9), st.integers(0, 1024), max_size=3),
    "overcommit": st.booleans(),
    "hugepage_kib": st.sampled_from([None, None, 2048]),
    "advised": st.none() | st.frozensets(st.integers(0, 9), max_size=3),
}


@settings(FUZZ, max_examples=400)
@given(
    machines(),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(1, 3000),
    st.sampled_from([0, 0, 0, 1, 3]),
    st.fixed_dictionaries({}, optional=OPTIONS),
)
def test_what_every_plan_keeps(
    where: tuple[Topology, Allowed], guests: int, vcpus: int, ram_mib: int, io: int, options: dict[str, Any]
) -> None:
    topology, allowed = where
    ask = Ask(guests, vcpus, ram_mib, io)
    try:
        made = plan(topology, allowed, ask, **options)
    except VTorqueError as err:
        assert err.code is Code.NODE
        assert must_be_refused(topology, allowed, ask, options), str(err)
        return
    assert keeps_the_rules(topology, allowed, ask, **options) == made


def must_be_refused(topology: Topology, allowed: Allowed, ask: Ask, options: dict[str, Any]) -> bool:
    """Whether too little is there, however it is arranged."""
    from placements import Facts

    cores: dict[int, list[int]] = {}
    for cpu in topology.cpus:
        if cpu.number in allowed.cpus:
            cores.setdefault(cpu.core, []).append(cpu.number)
    kept = sorted(cores.values())[: options.get("host_cores", 0)]
    overcommit = options.get("overcommit", False)
    host = frozenset(cpu for core in kept for cpu in (core if overcommit else core[:1]))
    facts = Facts(topology, allowed, options, host)
    kib = options.get("hugepage_kib")
    page = 2 if kib is None else kib // 1024
    if kib is not None and ask.ram_mib % page:
        return True
    if len(facts.free) < ask.guests * ask.vcpus and not (overcommit and facts.usable):
        return True
    has_memory = any(node.memory_mib and node.number in facts.memory for node in topology.nodes) or not topology.nodes
    return not has_memory or sum(mib // page for mib in facts.memory.values()) < ask.guests * -(-ask.ram_mib // page)


@settings(FUZZ, max_examples=100)
@given(machines(), st.data())
def test_what_every_mapped_plan_keeps(where: tuple[Topology, Allowed], data: st.DataObject) -> None:
    topology, allowed = where
    online = sorted(cpu.number for cpu in topology.cpus)
    guest = st.lists(st.frozensets(st.sampled_from(online), min_size=1), min_size=3, max_size=3).map(tuple)
    mapped = tuple(data.draw(st.lists(guest, min_size=1, max_size=2)))
    ask = Ask(len(mapped), 3, data.draw(st.integers(2, 2000)), mapped=mapped)
    try:
        made = keeps_the_rules(topology, allowed, ask, overcommit=True)
    except VTorqueError as err:
        assert "cannot be bound" in str(err) or must_be_refused(topology, allowed, ask, {"overcommit": True})
        return
    assert [guest.vcpus for guest in made.guests] == [tuple(tuple(sorted(cpus)) for cpus in own) for own in mapped]


def requests(topology: Topology, allowed: Allowed) -> list[tuple[Ask, dict[str, Any]]]:
    """A sweep of what one may ask of a machine, from a vCPU to all of it."""
    count = len(allowed.cpus)
    found: list[tuple[Ask, dict[str, Any]]] = []
    for vcpus in sorted({1, 3, 4, count // 4, count // 2 + 1, count} - {0}):
        for guests in sorted({1, 2, 3, min(count // vcpus, 16)} & {*range(1, count // vcpus + 1)}):
            found.append((Ask(guests, vcpus, 512), {}))
            found.append((Ask(guests, vcpus, max(topology.memory_mib // 3 // guests, 1)), {}))
            found.append((Ask(guests, vcpus, 512, io=2), {"host_cores": 1}))
            found.append((Ask(guests, vcpus, 512), {"busy": dict.fromkeys(sorted(allowed.cpus)[:3], 1)}))
    return found


@pytest.mark.parametrize("name", [*RECORDED, *SMALL])
def test_recorded_machines(name: str) -> None:
    root = recorded(name) if name in RECORDED else small(name)
    topology = read_topology(root)
    everything = read_allowed(topology, root)
    held = sorted(everything.cpus)
    holes = everything._replace(cpus=frozenset(held[::3] + held[1::3]))
    planned: Counter[bool] = Counter()
    for allowed in (everything, holes):
        for ask, options in requests(topology, allowed):
            try:
                keeps_the_rules(topology, allowed, ask, **options)
                planned[True] += 1
            except VTorqueError as err:
                assert must_be_refused(topology, allowed, ask, options), (ask, options, str(err))
                planned[False] += 1
    assert planned[True] > planned[False]


def test_cpusets_with_holes_and_offline_cpus_by_name() -> None:
    root = recorded("16amd64-8n2c-cpusets")
    topology = read_topology(root)
    made = plan(topology, read_allowed(topology, root), Ask(1, 2, 512))
    assert cpus_of(made.guests[0]) == [2, 3] and made.guests[0].memory == (1,)
    topology = read_topology(recorded("offline-cpu0-node0"))
    made = plan(topology, whole(topology), Ask(2, 8, GIB))
    assert cpus_of(made.guests[0]) == [5, 7, 9, 11, 13, 15, 17, 19]
    assert [guest.memory for guest in made.guests] == [(1,), (1,)]


# sets of nodes


def test_so_many_nodes_that_not_all_sets_can_be_tried() -> None:
    topology = machine(*[2] * 40)
    topology = topology._replace(distances={(a, b): 10 + 2 * abs(a - b) for a in range(40) for b in range(40)})
    made = plan(topology, whole(topology), Ask(1, 20, 512))
    used = sorted({cell.host_node or 0 for cell in made.guests[0].layout.cells})
    assert used == list(range(used[0], used[0] + 10)), "neighbours"
    assert fewest_nearest([1, 2], lambda nodes: len(nodes) > 2, lambda nodes: nodes, lambda a, b: 10) is None
    assert MAX_SETS > 70, "all sets of the eight nodes of a usual machine are tried"


def test_planning_a_large_node_takes_no_time() -> None:
    topology = machine(*[16] * 8, threads=2, memory=[64 * GIB] * 8)
    for ask in (Ask(16, 16, 8 * GIB), Ask(16, 8, 8 * GIB), Ask(5, 20, 8 * GIB)):
        begin = time.process_time()
        plan(topology, whole(topology), ask)
        assert time.process_time() - begin < 0.5, ask
