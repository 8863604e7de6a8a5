"""Where a node's guests sit: CPUs for their vCPUs and everything beside, memory, and what they see of the machine.

Pure: from values to values, the same plan for the same input. The rules are in docs/placement.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.topology import beside
from vmgr.topology.choose import Seat, seat_guests
from vmgr.topology.layout import home, in_order, make_layout
from vmgr.topology.mapping import Mapped, check_mapping
from vmgr.topology.model import Allowed, NumaNode, Placement, Topology
from vmgr.topology.pick import share_units
from vmgr.topology.room import NOWHERE, Ground, Memory, memory_nodes, survey
from vmgr.units import format_size_mib

UNIT_MIB = 2
"""RAM is divided among nodes in steps of this, where it is not on huge pages: the size of a transparent one."""


class Ask(NamedTuple):
    """What the guests of a node ask for: `guests` of them, all alike, each with `vcpus` and `ram_mib`, all above 0.

    `io` is how many CPUs are wanted for I/O threads, for all guests together. `mapped` is the user's own mapping: for
    each guest, for each vCPU, the CPUs that it may run on.
    """

    guests: int
    vcpus: int
    ram_mib: int
    io: int = 0
    mapped: Optional[Mapped] = None


class Plan(NamedTuple):
    """The CPUs that stay with the host, and a placement for each guest."""

    host: frozenset[int]
    guests: tuple[Placement, ...]


def plan(
    topology: Topology,
    allowed: Allowed,
    ask: Ask,
    *,
    host_cores: int = 0,
    busy: Mapping[int, int] = {},
    held_mib: Mapping[int, int] = {},
    overcommit: bool = False,
    hugepage_kib: Optional[int] = None,
    advised: Optional[frozenset[int]] = None,
) -> Plan:
    """Seat the guests on what is `allowed` of the machine.

    `host_cores` cores of that stay with the host. `busy` counts the vCPUs of other jobs' guests that are bound to each
    CPU; `held_mib` is the RAM that these guests have on each NUMA node. With `overcommit` guests share CPUs where there
    are too few. With `hugepage_kib` all RAM is on huge pages of that size. Of the NUMA nodes that are `advised` the
    guests get those CPUs and memory that they need if there is enough.

    Raises VTorqueError (VT-NODE) when the guests do not fit, or a mapping names CPUs that may not be used.
    """
    memory = _memory(ask, hugepage_kib)
    job = _Job(topology, allowed, ask, memory, held_mib, busy, overcommit)
    host = _host(job, host_cores)
    usable = job.online - host
    ground = job.ground(usable)
    if ask.mapped is not None:
        check_mapping(ask.mapped, usable, busy, overcommit=overcommit)
    else:
        _check_cpus(job, usable, host)
    _check_memory(job, ground)
    io: Sequence[beside.Spare] = ()
    if ask.mapped is not None:
        vcpus, units = _mapped_seats(ground, ask, memory)
    else:
        seats = _advised_seats(job, usable, advised) or job.seats(ground)
        if ask.io:
            seats, io = _with_io(job, ground, usable, host, seats)
        vcpus = [[(cpu,) for cpu in in_order(ground, seat.cpus, seat.units)] for seat in seats]
        units = [seat.units for seat in seats]
    return Plan(host, _placements(job, ground, host, vcpus, units, io))


class _Job(NamedTuple):
    """What a plan is made for, and the values that it is made from."""

    topology: Topology
    allowed: Allowed
    ask: Ask
    memory: Memory
    held_mib: Mapping[int, int]
    busy: Mapping[int, int]
    overcommit: bool

    @property
    def online(self) -> frozenset[int]:
        return self.allowed.cpus & {cpu.number for cpu in self.topology.cpus}

    @property
    def vcpus(self) -> int:
        """The vCPUs of all guests."""
        return self.ask.guests * self.ask.vcpus

    @property
    def units(self) -> int:
        """The units of memory of one guest."""
        return -(-self.ask.ram_mib // self.memory.unit_mib)

    @property
    def place(self) -> str:
        return "this node" if self.allowed.source == "the node" else self.allowed.source

    @property
    def guests(self) -> str:
        """The guests, for the start of a message about their number of vCPUs."""
        ask = self.ask
        return f"{ask.vcpus} vCPUs do" if ask.guests == 1 else f"{ask.guests} guests with {ask.vcpus} vCPUs each do"

    def nodes(self) -> Sequence[NumaNode]:
        return memory_nodes(self.topology, self.allowed)

    def ground(self, usable: frozenset[int], nodes: Optional[Sequence[NumaNode]] = None) -> Ground:
        nodes = self.nodes() if nodes is None else nodes
        return survey(self.topology, usable, nodes, self.memory, self.held_mib)

    def free(self, cpus: frozenset[int]) -> frozenset[int]:
        return frozenset(cpu for cpu in cpus if not self.busy.get(cpu))

    def clean(self, ground: Ground) -> frozenset[int]:
        """The cores on which no guest of another job sits."""
        dirty = {cpu.core for cpu in self.topology.cpus if self.busy.get(cpu.number)}
        return frozenset(ground.cores.keys() - dirty)

    def seats(self, ground: Ground) -> Sequence[Seat]:
        """Seats on the ground, which must be enough."""
        free: Mapping[int, Sequence[int]] = {
            core.number: [cpu for cpu in core.cpus if not self.busy.get(cpu)] for core in ground.cores.values()
        }
        if sum(map(len, free.values())) < self.vcpus:
            free = _shared(ground, self.busy, self.vcpus)
        return seat_guests(ground, free, self.clean(ground), self.ask.guests, self.ask.vcpus, self.units)


def _memory(ask: Ask, hugepage_kib: Optional[int]) -> Memory:
    """How memory is counted. Raises VTorqueError (VT-NODE) for RAM that huge pages cannot make up."""
    if hugepage_kib is None:
        return Memory(UNIT_MIB, None)
    unit = max(hugepage_kib // 1024, 1)
    if ask.ram_mib % unit:
        low = ask.ram_mib // unit * unit
        nearest = [format_size_mib(mib) for mib in (low, low + unit) if mib]
        raise VTorqueError(
            f"{format_size_mib(ask.ram_mib)} of RAM is no multiple of this node's huge pages of {_pages(hugepage_kib)}",
            code=Code.NODE,
            hint=f"ask for ram={' or '.join(nearest)}",
        )
    return Memory(unit, hugepage_kib)


def _pages(kib: int) -> str:
    return format_size_mib(kib // 1024) if kib >= 1024 else f"{kib}K"


def _host(job: _Job, count: int) -> frozenset[int]:
    """The CPUs of the cores that stay with the host: the first ones, where the kernel itself does most.

    They are whole unless guests that do not share CPUs would be refused for want of their siblings, for batch systems
    and `vsub` count a core as one CPU. At least one CPU of each stays.
    """
    cores: dict[int, list[int]] = {}
    for cpu in sorted(job.topology.cpus):
        if cpu.number in job.online:
            cores.setdefault(cpu.core, []).append(cpu.number)
    kept = sorted(cores.values())[:count]
    host = frozenset(cpu for core in kept for cpu in core)
    missing = job.vcpus - len(job.free(job.online - host))
    siblings = sorted(job.free(frozenset(cpu for core in kept for cpu in core[1:])), reverse=True)
    if job.overcommit or job.ask.mapped is not None or not 0 < missing <= len(siblings):
        return host
    return host - frozenset(siblings[:missing])


def _check_cpus(job: _Job, usable: frozenset[int], host: frozenset[int]) -> None:
    free = job.free(usable)
    if len(free) >= job.vcpus or (job.overcommit and usable):
        return
    kept = f", {len(host)} more stay with the host (resources.host_cores)" if host else ""
    raise VTorqueError(
        f"{job.guests} not fit: {len(free)} of {len(usable)} CPUs of {job.place} are free{kept}",
        code=Code.NODE,
        hint="ask for fewer vcpus, or the site sets hypervisor.overcommit_cpus",
    )


def _check_memory(job: _Job, ground: Ground) -> None:
    memory, ask = job.memory, job.ask
    if sum(ground.memory.values()) >= job.units * ask.guests:
        return
    has = {node: units * memory.unit_mib for node, units in sorted(ground.memory.items())}
    each = ", ".join(
        f"{'the machine' if node == NOWHERE else f'node {node}'} has {format_size_mib(mib)}"
        for node, mib in has.items()
    )
    have = f"{each or 'it has none'} (of {job.place})"
    ram = format_size_mib(ask.ram_mib)
    asked = f"{ram} of RAM does" if ask.guests == 1 else f"{ask.guests} guests with {ram} of RAM each do"
    if memory.page_kib is None:
        text, hint = f"{asked} not fit: {have}", "ask for less ram, or fewer guests on a node"
    else:
        wanted = ask.guests * ask.ram_mib * 1024 // memory.page_kib
        free = sum(has.values()) * 1024 // memory.page_kib
        text = f"{asked} not fit: {wanted} huge pages of {_pages(memory.page_kib)} are needed, {free} are free: {have}"
        hint = "ask for less ram, or the site sets more of them aside (hypervisor.hugepages)"
    raise VTorqueError(text, code=Code.NODE, hint=hint)


def _shared(ground: Ground, busy: Mapping[int, int], vcpus: int) -> Mapping[int, Sequence[int]]:
    """By core the CPUs for so many vCPUs in all, the least used first, each as often as it is to be used."""
    load = {cpu: busy.get(cpu, 0) for cpu in ground.core_of}
    level, left = min(load.values()), vcpus
    while left:
        lowest = sorted(cpu for cpu, count in load.items() if count <= level)[:left]
        for cpu in lowest:
            load[cpu] += 1
        left -= len(lowest)
        level += 1
    return {
        core.number: [cpu for cpu in core.cpus for _ in range(load[cpu] - busy.get(cpu, 0))]
        for core in ground.cores.values()
    }


def _advised_seats(job: _Job, usable: frozenset[int], advised: Optional[frozenset[int]]) -> Optional[Sequence[Seat]]:
    """Seats on the advised nodes alone, if all guests find a core for each vCPU there, and memory."""
    if not advised:
        return None
    there = usable & {cpu.number for cpu in job.topology.cpus if cpu.node in advised}
    ground = job.ground(there, [node for node in job.nodes() if node.number in advised])
    if len(job.clean(ground)) < job.vcpus or sum(ground.memory.values()) < job.units * job.ask.guests:
        return None
    return job.seats(ground)


def _with_io(
    job: _Job, ground: Ground, usable: frozenset[int], host: frozenset[int], seats: Sequence[Seat]
) -> tuple[Sequence[Seat], Sequence[beside.Spare]]:
    """Cores for I/O threads: what the guests leave, else set aside before them as far as vCPUs still find CPUs."""
    cores = [{ground.core_of[cpu] for cpu in seat.cpus} for seat in seats]
    taken = {cpu for seat in seats for cpu in seat.cpus} | {cpu for cpu, count in job.busy.items() if count}
    chosen = beside.io_cpus(ground, beside.find_spares(job.topology, job.online, host, taken), cores, job.ask.io)
    if sum(len(spare.cpus) for spare in chosen) >= job.ask.io:
        return seats, chosen
    others = frozenset(cpu for cpu, count in job.busy.items() if count)
    aside = beside.io_cpus(ground, beside.find_spares(job.topology, job.online, host, others), cores, job.ask.io)
    while len(aside) > len(chosen):
        left = usable - {cpu for spare in aside for cpu in spare.cpus}
        if len(job.free(left)) >= job.vcpus:
            return job.seats(job.ground(left)), aside
        aside = aside[:-1]
    return seats, chosen


def _mapped_seats(
    ground: Ground, ask: Ask, memory: Memory
) -> tuple[Sequence[Sequence[tuple[int, ...]]], Sequence[Mapping[int, int]]]:
    """The CPUs of a mapping, and memory near to them."""
    vcpus = [[tuple(sorted(cpus)) for cpus in guest] for guest in ask.mapped or ()]
    left = dict(ground.memory)
    units = []
    for guest in vcpus:
        near = [node for node, count in left.items() if count]
        weights = Counter(home(ground, cpus, near) for cpus in guest)
        shares = share_units(-(-ask.ram_mib // memory.unit_mib), weights, left)
        for node, count in shares.items():
            left[node] -= count
        units.append(shares)
    return vcpus, units


def _placements(
    job: _Job,
    ground: Ground,
    host: frozenset[int],
    vcpus: Sequence[Sequence[tuple[int, ...]]],
    units: Sequence[Mapping[int, int]],
    io: Sequence[beside.Spare],
) -> tuple[Placement, ...]:
    taken = {cpu for guest in vcpus for cpus in guest for cpu in cpus} | {c for c, count in job.busy.items() if count}
    cores = [{ground.core_of[cpu] for cpus in guest for cpu in cpus} for guest in vcpus]
    spares = beside.find_spares(job.topology, job.online, host, taken)
    if job.ask.io and not io:
        io = beside.io_cpus(ground, spares, cores, job.ask.io)
    beside_io = [spare for spare in spares if spare.core not in {other.core for other in io}]
    emulators = beside.emulator_cpus(
        ground, beside_io, cores, [[cpu for cpus in guest for cpu in cpus] for guest in vcpus]
    )
    found = []
    for own, mine, shares, emulator in zip(vcpus, cores, units, emulators):
        layout = make_layout(ground, own, shares, job.memory.unit_mib, job.ask.ram_mib)
        memory = tuple(sorted(cell.host_node for cell in layout.cells if cell.host_node is not None))
        found.append(Placement(tuple(own), emulator, beside.near_io(ground, io, mine) or emulator, memory, layout))
    return tuple(found)
