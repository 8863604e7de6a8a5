"""What a machine has for guests: cores with CPUs that may be used, and memory by NUMA node.

`Ground` is what holds for a whole plan; `Room` is what is left of it while guests are seated one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Optional

from vmgr.topology.model import Allowed, Cpu, NumaNode, Topology

NOWHERE = -1
"""The node of CPUs that are of no NUMA node, and of everything on a machine without NUMA."""

FAR = 20
"""ACPI's distance to another node, where nothing is known."""


class Core(NamedTuple):
    """A core; `node` is NOWHERE where it has none, `cpus` are those of its threads that guests may use."""

    number: int
    package: int
    node: int
    kind: int
    cpus: tuple[int, ...]


class Ground(NamedTuple):
    """Cores by number, the core of each CPU, and memory by node in units (see `Memory`)."""

    cores: Mapping[int, Core]
    core_of: Mapping[int, int]
    memory: Mapping[int, int]
    distances: Mapping[tuple[int, int], int]

    def distance(self, one: int, other: int) -> int:
        return self.distances.get((one, other), 10 if one == other else FAR)

    def extent(self, nodes: Iterable[int]) -> int:
        """How far nodes are apart: the sum over all pairs."""
        every = sorted(set(nodes))
        return sum(self.distance(one, other) for at, one in enumerate(every) for other in every[at + 1 :])

    def nearest(self, node: int, among: Iterable[int]) -> int:
        """The nearest of these nodes, of which there must be one; itself if it is one of them."""
        return min(among, key=lambda other: (self.distance(node, other), other))

    def node_of(self, cpu: int) -> int:
        return self.cores[self.core_of[cpu]].node


class Memory(NamedTuple):
    """How memory is counted: in units of `unit_mib`, those of huge pages of `page_kib` where that is given."""

    unit_mib: int
    page_kib: Optional[int]

    def capacity(self, node: NumaNode, held_mib: int) -> int:
        """The units of a node that guests may have.

        Without huge pages that is all its memory: what the page cache has is given back. Huge pages count when they
        are free, and when those that other guests hold will not take them.
        """
        if self.page_kib is None:
            return max(node.memory_mib - held_mib, 0) // self.unit_mib
        total, free = node.hugepages.get(self.page_kib, (0, 0))
        total_mib, free_mib = total * self.page_kib // 1024, free * self.page_kib // 1024
        return max(min(free_mib, total_mib - held_mib), 0) // self.unit_mib


def memory_nodes(topology: Topology, allowed: Allowed) -> Sequence[NumaNode]:
    """The nodes that guests may have memory of: allowed ones with CPUs, for others are GPUs or slow memory."""
    if not topology.nodes:
        return [NumaNode(NOWHERE, topology.memory_mib, topology.hugepages)]
    peopled = {cpu.node for cpu in topology.cpus}
    return [node for node in topology.nodes if node.number in allowed.nodes and node.number in peopled]


def survey(
    topology: Topology, usable: frozenset[int], nodes: Sequence[NumaNode], memory: Memory, held_mib: Mapping[int, int]
) -> Ground:
    """The ground of `usable` CPUs and of `nodes` for memory; on a machine without NUMA all that is held counts."""
    threads: dict[int, list[int]] = {}
    first: dict[int, Cpu] = {}
    for cpu in topology.cpus:
        if cpu.number in usable:
            threads.setdefault(cpu.core, []).append(cpu.number)
            first.setdefault(cpu.core, cpu)
    cores = {
        core: Core(core, cpu.package, NOWHERE if cpu.node is None else cpu.node, cpu.kind, tuple(threads[core]))
        for core, cpu in first.items()
    }
    capacity = {}
    for node in nodes:
        held = sum(held_mib.values()) if node.number == NOWHERE else held_mib.get(node.number, 0)
        capacity[node.number] = memory.capacity(node, held)
    core_of = {cpu: core.number for core in cores.values() for cpu in core.cpus}
    return Ground(cores, core_of, capacity, topology.distances)


class Room:
    """What is left: `free` CPUs of each core, `clean` cores (nobody's yet), `memory` units of each node.

    A CPU stands in `free` as often as a vCPU may be put there: once, or more often where guests share CPUs.
    """

    def __init__(self, ground: Ground, free: Mapping[int, Sequence[int]], clean: frozenset[int]) -> None:
        self.ground = ground
        self.free = {core: list(cpus) for core, cpus in free.items() if cpus}
        self.clean = set(clean)
        self.memory = dict(ground.memory)

    def take(self, cpu: int) -> None:
        """Give away a CPU; its core is clean no more."""
        core = self.ground.core_of[cpu]
        self.free[core].remove(cpu)
        self.clean.discard(core)
