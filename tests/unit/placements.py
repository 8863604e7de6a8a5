"""Machines made by hand for the planner, and everything that a plan must keep, whatever the machine and the request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Optional

from vmgr.topology.model import Allowed, Cpu, NumaNode, Placement, Topology
from vmgr.topology.plan import Ask, Plan, plan

GIB = 1024


def machine(
    *nodes: int,
    threads: int = 1,
    memory: Optional[Sequence[int]] = None,
    per_package: int = 1,
    far: int = 20,
    pages: Optional[Mapping[int, tuple[int, int]]] = None,
) -> Topology:
    """NUMA nodes with so many cores each; siblings are numbered after all cores, as on PCs."""
    cpus, count, first = [], sum(nodes), 0
    for node, cores in enumerate(nodes):
        for core in range(first, first + cores):
            cpus += [Cpu(core + count * thread, core, node // per_package, node) for thread in range(threads)]
        first += cores
    sizes = [8 * GIB] * len(nodes) if memory is None else memory
    numbers = range(len(nodes))
    distances = {(one, other): 10 if one == other else far for one in numbers for other in numbers}
    return Topology(
        tuple(sorted(cpus)),
        tuple(NumaNode(node, size, pages or {}) for node, size in enumerate(sizes)),
        distances,
        sum(sizes),
    )


def uniform(*packages: int, threads: int = 1) -> Topology:
    """A machine without NUMA."""
    grown = machine(*packages, threads=threads)
    return grown._replace(
        cpus=tuple(cpu._replace(node=None) for cpu in grown.cpus), nodes=(), distances={}, memory_mib=8 * GIB
    )


def whole(topology: Topology) -> Allowed:
    return Allowed(
        frozenset(cpu.number for cpu in topology.cpus), frozenset(node.number for node in topology.nodes), "the node"
    )


def cpus_of(placement: Placement) -> list[int]:
    """The CPU of each vCPU of a guest that is pinned one to one."""
    assert all(len(cpus) == 1 for cpus in placement.vcpus)
    return [cpu for (cpu,) in placement.vcpus]


class Facts:
    """What is there for a request, counted in a way of its own."""

    def __init__(self, topology: Topology, allowed: Allowed, options: Mapping[str, Any], host: frozenset[int]) -> None:
        self.cpus = {cpu.number: cpu for cpu in topology.cpus}
        self.topology = topology
        self.allowed = allowed.cpus & self.cpus.keys()
        self.usable = self.allowed - host
        self.busy = {cpu for cpu, count in options.get("busy", {}).items() if count}
        self.free = self.usable - self.busy
        busy_cores = {self.cpus[cpu].core for cpu in self.busy if cpu in self.cpus}
        self.clean = {self.cpus[cpu].core for cpu in self.free} - busy_cores
        self.kind = {cpu.core: cpu.kind for cpu in topology.cpus}
        self.node = {cpu.core: cpu.node for cpu in topology.cpus}
        held, kib = options.get("held_mib", {}), options.get("hugepage_kib")
        self.memory: dict[Optional[int], int] = {}
        places: Sequence[Any] = topology.nodes or (NumaNode(-1, topology.memory_mib, topology.hugepages),)
        for node in places:
            if topology.nodes and (node.number not in allowed.nodes or node.number not in self.node.values()):
                continue
            used = held.get(node.number, 0) if topology.nodes else sum(held.values())
            total = node.memory_mib
            if kib is not None:
                there, free = node.hugepages.get(kib, (0, 0))
                total, used = min(free * kib // 1024, there * kib // 1024 - used), 0
            self.memory[node.number if topology.nodes else None] = max(total - used, 0)

    def cores(self, cpus: Sequence[int]) -> list[int]:
        return [self.cpus[cpu].core for cpu in cpus]


def keeps_the_rules(topology: Topology, allowed: Allowed, ask: Ask, **options: Any) -> Plan:
    """Plan, and hold the plan against every rule that holds for all of them."""
    made = plan(topology, allowed, ask, **options)
    again = {
        key: dict(reversed(list(value.items()))) if isinstance(value, dict) else value for key, value in options.items()
    }
    assert plan(topology, allowed, ask, **again) == made, "the same plan for the same input"
    facts = Facts(topology, allowed, options, made.host)
    assert len(made.guests) == ask.guests
    assert made.host <= facts.allowed
    for guest in made.guests:
        _layout(facts, ask, guest, options.get("hugepage_kib"))
        assert {cpu for cpus in guest.vcpus for cpu in cpus} <= facts.usable
        assert guest.emulator and set(guest.emulator) <= facts.allowed
        assert guest.io and set(guest.io) <= facts.allowed
    used: Counter[Optional[int]] = Counter()
    for guest in made.guests:
        for cell in guest.layout.cells:
            used[cell.host_node] += cell.ram_mib
    for node, mib in used.items():
        assert mib <= facts.memory[node], "no more memory than a node has"
    _beside(facts, made, ask)
    if ask.mapped is None:
        _vcpus(facts, made, ask, options)
    return made


def _layout(facts: Facts, ask: Ask, guest: Placement, hugepage_kib: Optional[int]) -> None:
    layout = guest.layout
    assert len(guest.vcpus) == ask.vcpus == layout.sockets * layout.cores * layout.threads
    assert sorted(vcpu for cell in layout.cells for vcpu in cell.vcpus) == list(range(ask.vcpus))
    assert sum(cell.ram_mib for cell in layout.cells) == ask.ram_mib
    assert all(cell.ram_mib > 0 for cell in layout.cells)
    page = 2 if hugepage_kib is None else max(hugepage_kib // 1024, 1)
    odd = [cell for cell in layout.cells if cell.ram_mib % page]
    assert len(odd) == (1 if ask.ram_mib % page else 0)
    hosts = [cell.host_node for cell in layout.cells]
    assert len(set(hosts)) == len(hosts)
    assert guest.memory == tuple(sorted(host for host in hosts if host is not None))
    assert (hosts == [None]) == (not facts.topology.nodes)
    assert [len(row) for row in layout.distances] == [len(hosts)] * len(hosts)
    for one, row in enumerate(layout.distances):
        assert all(distance == 10 if one == other else 10 < distance <= 254 for other, distance in enumerate(row))
    groups = [guest.vcpus[at : at + layout.threads] for at in range(0, ask.vcpus, layout.threads)]
    if layout.threads > 1:
        for siblings in groups:
            cpus = [cpu for cpus in siblings for cpu in cpus]
            assert len(set(cpus)) == layout.threads and len(set(facts.cores(cpus))) == 1
    sockets = [
        guest.vcpus[at : at + ask.vcpus // layout.sockets] for at in range(0, ask.vcpus, ask.vcpus // layout.sockets)
    ]
    if layout.sockets > 1:
        packages = [{facts.cpus[cpu].package for cpus in socket for cpu in cpus} for socket in sockets]
        assert [len(package) for package in packages] == [1] * layout.sockets
        assert len(set().union(*packages)) == layout.sockets


def _beside(facts: Facts, made: Plan, ask: Ask) -> None:
    taken = {cpu for guest in made.guests for cpus in guest.vcpus for cpu in cpus} | facts.busy
    spare = facts.allowed - taken
    io = {cpu for guest in made.guests for cpu in guest.io}
    for guest in made.guests:
        mine = frozenset(cpu for cpus in guest.vcpus for cpu in cpus)
        if spare:
            assert not set(guest.emulator) & taken, "emulators are off the vCPUs while there is any CPU to spare"
        else:
            assert set(guest.emulator) == mine
        assert set(guest.io) == set(guest.emulator) or not set(guest.io) & taken
        if ask.io and spare - io:
            assert set(guest.io) == set(guest.emulator) or not io & set(guest.emulator)


def _vcpus(facts: Facts, made: Plan, ask: Ask, options: Mapping[str, Any]) -> None:
    guests = [cpus_of(guest) for guest in made.guests]
    every = [cpu for cpus in guests for cpu in cpus]
    total = ask.guests * ask.vcpus
    if len(facts.free) < total:
        assert options["overcommit"]
        load = Counter(every)
        for cpu, count in options.get("busy", {}).items():
            load[cpu] += count
        assert max(load[cpu] for cpu in every) <= min(load[cpu] for cpu in facts.usable) + 1, "spread evenly"
        return
    assert len(set(every)) == len(every) == total and set(every) <= facts.free, "no CPU twice"
    if ask.io or options.get("advised"):
        return
    cores = [set(facts.cores(cpus)) for cpus in guests]
    owned = Counter(core for own in cores for core in own)
    assert owned.keys() <= facts.clean or facts.clean <= owned.keys(), "others' cores only when no other is left"
    if max(owned.values()) > 1:
        assert facts.clean <= owned.keys(), "guests share a core only when none is free"
    if total <= len(facts.clean):
        assert len(owned) == total, "a core for each vCPU while there are cores"
    kinds = {facts.kind[core] for core in facts.clean}
    if ask.guests == 1:
        _one_guest(facts, made.guests[0], cores[0], ask)
    elif len(kinds) == 1 and total <= len(facts.clean):
        rooms = Counter(facts.node[core] for core in facts.clean)
        fit = sum(
            min(count // ask.vcpus, facts.memory.get(node, 0) // _even(ask.ram_mib)) for node, count in rooms.items()
        )
        inside = sum(
            len({facts.node[core] for core in own} | set(guest.memory or (None,))) == 1
            for own, guest in zip(cores, made.guests)
        )
        assert inside >= min(fit, ask.guests), "as many guests inside a node as fit there"


def _even(mib: int) -> int:
    return mib + mib % 2


def _one_guest(facts: Facts, guest: Placement, own: set[int], ask: Ask) -> None:
    if ask.vcpus > len(facts.clean):
        return
    kinds = sorted({facts.kind[core] for core in facts.clean})
    enough = [kind for kind in kinds if sum(facts.kind[core] == kind for core in facts.clean) >= ask.vcpus]
    if enough:
        assert {facts.kind[core] for core in own} == {enough[0]}, "one kind, the most capable that suffices"
    nodes = {facts.node[core] for core in own}
    pool = [core for core in facts.clean if facts.kind[core] == enough[0]] if enough else list(facts.clean)
    best = fewest(facts, Counter(facts.node[core] for core in pool), ask)
    mine = nodes | set(guest.memory or (None,))
    assert (len(mine), extent(facts, mine)) <= best, "the fewest and nearest nodes"


def fewest(facts: Facts, rooms: Mapping[Optional[int], int], ask: Ask) -> tuple[int, int]:
    """By trying all sets of nodes: how few hold a guest by cores and memory of their own, and how near they can be."""
    nodes = sorted({*rooms, *facts.memory}, key=lambda node: -1 if node is None else node)
    for size in range(1, len(nodes) + 1):
        near = [
            extent(facts, set(chosen))
            for chosen in combinations(nodes, size)
            if sum(rooms.get(node, 0) for node in chosen) >= ask.vcpus
            and sum(facts.memory.get(node, 0) // 2 * 2 for node in chosen) >= _even(ask.ram_mib)
        ]
        if near:
            return size, min(near)
    return len(nodes) + 1, 0


def extent(facts: Facts, nodes: set[Optional[int]]) -> int:
    """The sum of the distances between all of them."""
    return sum(
        facts.topology.distances.get((one, other), 20)  # type: ignore[arg-type]
        for one, other in combinations(sorted(nodes, key=lambda node: -1 if node is None else node), 2)
    )
