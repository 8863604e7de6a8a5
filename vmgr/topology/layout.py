"""What a guest sees of the machine: sockets, cores and threads, and NUMA nodes with memory and distances."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, Optional

from vmgr.topology.model import Cell, Layout
from vmgr.topology.room import NOWHERE, Ground

NEAREST, FARTHEST = 11, 254
"""The distances between two nodes that QEMU takes; 10 is here, 255 unreachable (docs/system/invocation, `-numa`)."""

HERE = 10


class Grid(NamedTuple):
    """How the vCPUs are arranged: `sockets * cores * threads` is their number."""

    sockets: int
    cores: int
    threads: int


def in_order(ground: Ground, cpus: Sequence[int], units: Mapping[int, int]) -> Sequence[int]:
    """A guest's CPUs in the order of its vCPUs: by packages, cells, nodes and cores, so that they match a grid."""

    def place(cpu: int) -> tuple[int, ...]:
        core = ground.cores[ground.core_of[cpu]]
        return core.package, ground.nearest(core.node, units), core.node, core.number, cpu

    return sorted(cpus, key=place)


def home(ground: Ground, cpus: Sequence[int], memory: Collection[int]) -> int:
    """The node, of those that have `memory`, nearest to most of the CPUs that a vCPU may run on."""
    near = Counter(ground.nearest(ground.node_of(cpu), memory) for cpu in cpus)
    return min(near, key=lambda node: (-near[node], node))


def make_layout(
    ground: Ground, vcpus: Sequence[Sequence[int]], units: Mapping[int, int], unit_mib: int, ram_mib: int
) -> Layout:
    """The layout of a guest whose vCPUs may run on these CPUs and whose RAM is so many units of each node.

    All units are whole but the last: RAM that is no multiple of a unit has less of it.
    """
    homes = [home(ground, cpus, units) for cpus in vcpus]
    ram = {node: count * unit_mib for node, count in units.items()}
    ram[max(units, key=lambda node: (units[node], node))] -= sum(ram.values()) - ram_mib
    order = sorted(units, key=lambda node: (homes.index(node) if node in homes else len(homes), node))
    cells = tuple(
        Cell(
            tuple(vcpu for vcpu, home in enumerate(homes) if home == node),
            ram[node],
            None if node == NOWHERE else node,
        )
        for node in order
    )
    distances = tuple(
        tuple(HERE if one == other else _clamped(ground.distance(one, other)) for other in order) for one in order
    )
    return Layout(*make_grid(ground, vcpus), cells, distances)


def _clamped(distance: int) -> int:
    return min(max(distance, NEAREST), FARTHEST)


def make_grid(ground: Ground, vcpus: Sequence[Sequence[int]]) -> Grid:
    """Threads where neighbours are siblings throughout, sockets where every package has as many vCPUs."""
    count = len(vcpus)
    threads = _regular([_same_core(ground, cpus) for cpus in vcpus]) or 1
    if len({cpu for cpus in vcpus for cpu in cpus}) < count:
        threads = 1
    of_package = _regular([_same_package(ground, cpus) for cpus in vcpus])
    sockets = count // of_package if of_package and of_package % threads == 0 else 1
    return Grid(sockets, count // sockets // threads, threads)


def _regular(places: Sequence[Optional[int]]) -> Optional[int]:
    """How many neighbours are in each place, if all are in one, each is filled in one go, and all have as many."""
    runs = [(place, len(list(run))) for place, run in groupby(places)]
    known = {place for place, _ in runs}
    lengths = {length for _, length in runs}
    return lengths.pop() if None not in known and len(known) == len(runs) and len(lengths) == 1 else None


def _same_core(ground: Ground, cpus: Sequence[int]) -> Optional[int]:
    return ground.core_of[cpus[0]] if len(cpus) == 1 else None


def _same_package(ground: Ground, cpus: Sequence[int]) -> Optional[int]:
    packages = {ground.cores[ground.core_of[cpu]].package for cpu in cpus}
    return packages.pop() if len(packages) == 1 else None
