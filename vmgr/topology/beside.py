"""CPUs for what runs beside the vCPUs: I/O threads, and emulators with vhost and file servers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from vmgr.topology.model import Topology
from vmgr.topology.room import NOWHERE, Ground

VCPUS_PER_CORE = 16
"""An emulator gets a core, and one more for every so many vCPUs."""


class Spare(NamedTuple):
    """The CPUs of a core that no vCPU is bound to; `is_whole` where that is all of the core, `is_host` the host's."""

    core: int
    package: int
    node: int
    cpus: tuple[int, ...]
    is_whole: bool
    is_host: bool


def find_spares(
    topology: Topology, allowed: frozenset[int], host: frozenset[int], taken: Collection[int]
) -> Sequence[Spare]:
    """What is spare of the allowed CPUs, by cores; `taken` are the CPUs of all vCPUs on the machine."""
    threads: dict[int, list[int]] = {}
    for cpu in topology.cpus:
        threads.setdefault(cpu.core, []).append(cpu.number)
    first = {cpu.core: cpu for cpu in reversed(topology.cpus)}
    spares = []
    for core, cpus in threads.items():
        idle = tuple(cpu for cpu in cpus if cpu in allowed and cpu not in taken)
        if idle:
            node = first[core].node
            spares.append(
                Spare(
                    core,
                    first[core].package,
                    NOWHERE if node is None else node,
                    idle,
                    not any(cpu in taken for cpu in cpus),
                    any(cpu in host for cpu in idle),
                )
            )
    return spares


def io_cpus(ground: Ground, spares: Sequence[Spare], guests: Sequence[Collection[int]], wanted: int) -> Sequence[Spare]:
    """Whole free cores with so many CPUs in all, or as many as there are: near to each guest in turn, the last first.

    `guests` are the cores of each guest.
    """
    left = [spare for spare in spares if spare.is_whole and not spare.is_host]
    chosen: list[Spare] = []
    turn = 0
    while left and sum(len(spare.cpus) for spare in chosen) < wanted:
        nodes = _nodes(ground, guests[turn % len(guests)])
        best = min(left, key=lambda spare: (_nearest(ground, spare, nodes), -spare.core))
        left.remove(best)
        chosen.append(best)
        turn += 1
    return chosen


def near_io(ground: Ground, chosen: Sequence[Spare], guests: Sequence[Collection[int]]) -> Sequence[tuple[int, ...]]:
    """The I/O CPUs of each guest: of the cores to which no guest is nearer, or the nearest ones where it has none."""
    far = [[_nearest(ground, spare, _nodes(ground, cores)) for spare in chosen] for cores in guests]
    found = []
    for own in far:
        mine = [at for at, distance in enumerate(own) if distance == min(other[at] for other in far)]
        mine = mine or [at for at, distance in enumerate(own) if distance == min(own)]
        found.append(tuple(sorted(cpu for at in mine for cpu in chosen[at].cpus)))
    return found


def emulator_cpus(
    ground: Ground, spares: Sequence[Spare], guests: Sequence[Collection[int]], vcpus: Sequence[Sequence[int]]
) -> Sequence[tuple[int, ...]]:
    """CPUs for the emulator of each guest, those of its vCPUs where none is spare.

    Whole free cores of its nodes come first, then of its packages, the host's cores, whole ones elsewhere, idle
    siblings of its own cores, and of others'. Whole cores are taken from the last one, where other guests come last,
    and shared only when there are too few.
    """
    load: Counter[int] = Counter()
    chosen = []
    for cores, own in zip(guests, vcpus):
        found = _best(ground, spares, cores, load, 1 + (len(own) - 1) // VCPUS_PER_CORE)
        load.update(spare.core for spare in found)
        chosen.append(tuple(sorted(cpu for spare in found for cpu in spare.cpus)) or tuple(sorted(set(own))))
    return chosen


def _best(
    ground: Ground, spares: Sequence[Spare], cores: Collection[int], load: Mapping[int, int], count: int
) -> Sequence[Spare]:
    nodes = _nodes(ground, cores)
    packages = {ground.cores[core].package for core in cores}

    def tier(spare: Spare) -> int:
        if spare.is_whole and not spare.is_host:
            return 0 if spare.node in nodes else 1 if spare.package in packages else 3
        if spare.is_host:
            return 2
        return 4 if spare.core in cores else 5

    best = min(map(tier, spares), default=None)
    among = sorted(
        (spare for spare in spares if tier(spare) == best),
        key=lambda spare: (load[spare.core], _nearest(ground, spare, nodes), -spare.core),
    )
    if best in (2, 4):
        return among
    if best == 5:
        return [spare for spare in among if _nearest(ground, spare, nodes) == _nearest(ground, among[0], nodes)]
    return among[:count]


def _nodes(ground: Ground, cores: Collection[int]) -> Collection[int]:
    return {ground.cores[core].node for core in cores}


def _nearest(ground: Ground, spare: Spare, nodes: Collection[int]) -> int:
    return min(ground.distance(spare.node, node) for node in nodes)
