"""Where this node's guests sit: planned for the job and written to the attempt's record under the node's lock."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple, Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import GuestGroup, Pinning
from vmgr.node import record
from vmgr.node.guestjob import Job
from vmgr.node.resuming import bound
from vmgr.topology.allowed import allowed_for
from vmgr.topology.cpulist import parse_cpus
from vmgr.topology.model import Layout, Placement, Topology
from vmgr.topology.plain import as_plain
from vmgr.topology.plan import Ask, Plan, plan
from vmgr.topology.read import read_topology

NUMAD_SECONDS = 10.0
NOWHERE = -1
"""Stands for the NUMA node of memory on a machine without such nodes."""


class Seats(NamedTuple):
    """Where each guest sits; None for one that is not pinned. `shown` says it to users, as plain data.

    `kept` are the layouts of guests that are not pinned and go on, None for guests that boot.
    """

    guests: tuple[Optional[Placement], ...]
    shown: Optional[dict[str, Any]]
    kept: Optional[tuple[Layout, ...]] = None

    def layout(self, index: int, group: GuestGroup) -> Layout:
        """What guest `index` (from 0) sees of CPUs and memory."""
        placement = self.guests[index]
        if placement is None and self.kept is not None:
            return self.kept[index]
        return Layout.flat(group.vcpus, group.ram_mib) if placement is None else placement.layout


async def find_seats(config: Config, job: Job) -> Seats:
    """Seats for the guests of this node. Raises VTorqueError (VT-NODE)."""
    group, place, pinning, slots = job.group, job.place, job.spec.pinning, job.allocation.slots
    names = [member.name for member in job.own]
    hugepage_kib = config.hypervisor.hugepage_kib
    kept = None if job.part is None else tuple(guest.layout for guest in job.part.guests)
    if pinning.mode == "off":
        if hugepage_kib is not None:
            _take_hugepages(config, place, read_topology(), hugepage_kib, group.ram_mib, len(names))
        return Seats((None,) * len(names), None, kept)
    topology = read_topology()
    assigned = slots if config.resources.slots_are_cpus and slots else None
    allowed = allowed_for(topology, groups=[group.path for group in job.groups], assigned=assigned)
    advised = None
    if pinning.mode == "numad":
        from vmgr.topology.numad import advise  # few sites have it

        vcpus, ram_mib = group.vcpus * len(names), group.ram_mib * len(names)
        advised = await advise(vcpus, ram_mib, timeout_s=NUMAD_SECONDS)
    ask = Ask(len(names), group.vcpus, group.ram_mib, mapped=_mapped(pinning))
    with record.node_lock(config.paths, "cpus"):
        busy, held_mib = _taken(config, place)
        planned = plan(
            topology,
            allowed,
            ask,
            host_cores=config.resources.host_cores,
            busy=busy,
            held_mib=held_mib,
            overcommit=config.hypervisor.overcommit_cpus,
            hugepage_kib=hugepage_kib,
            advised=advised,
        )
        if kept is not None:
            planned = planned._replace(guests=tuple(map(_keeping, planned.guests, kept)))
        for placement in planned.guests:
            record.append(place, _step(placement))
    return Seats(planned.guests, _shown(planned, names, allowed.cpus))


def _keeping(placement: Placement, layout: Layout) -> Placement:
    """The placement of a guest that has had its layout since its boot, perhaps on another node."""
    found = bound(layout, placement.layout)
    nodes = {cell.host_node for cell in found.cells if cell.host_node is not None}
    return placement._replace(layout=found, memory=tuple(sorted(nodes)))


def _mapped(pinning: Pinning) -> Optional[tuple[tuple[frozenset[int], ...], ...]]:
    """The user's mapping: guest, vCPU, CPUs. Raises VTorqueError (VT-NODE) for numbers that no CPU can have."""
    if pinning.cpus is None:
        return None
    return tuple(tuple(_cpus(number, listed) for number, listed in enumerate(guest)) for guest in pinning.cpus)


def _cpus(vcpu: int, listed: str) -> frozenset[int]:
    cpus = parse_cpus(listed)
    if not cpus:
        raise VTorqueError(
            f"vCPU {vcpu} cannot be bound to the CPUs {listed}",
            code=Code.NODE,
            hint="a list such as 4-5,8 is needed, of CPUs of the node",
        )
    return cpus


def _step(placement: Placement) -> dict[str, Any]:
    memory: Counter[int] = Counter()
    for cell in placement.layout.cells:
        memory[NOWHERE if cell.host_node is None else cell.host_node] += cell.ram_mib
    return {
        "do": "cpus",
        "cpus": sorted({cpu for allowed in placement.vcpus for cpu in allowed}),
        "memory": {str(node): mib for node, mib in memory.items()},
    }


def _taken(config: Config, place: record.Place) -> tuple[Counter[int], Counter[int]]:
    """Other guests' vCPUs on each CPU, and their RAM (MiB) on each NUMA node, by the records of attempts that live."""
    busy: Counter[int] = Counter()
    held: Counter[int] = Counter()
    for other in record.places(config.paths):
        if other != place and record.is_held(other):
            for step in record.steps(other):
                if step.get("do") == "cpus":
                    busy.update(step["cpus"])
                    held.update({int(node): mib for node, mib in step.get("memory", {}).items()})
    return busy, held


def _shown(planned: Plan, names: list[str], allowed: frozenset[int]) -> dict[str, Any]:
    return {
        "host": sorted(planned.host),
        "allowed": sorted(allowed),
        "guests": {name: as_plain(placement) for name, placement in zip(names, planned.guests)},
    }


def _take_hugepages(
    config: Config, place: record.Place, topology: Topology, size_kib: int, ram_mib: int, guests: int
) -> None:
    """Count huge pages for guests that are not pinned, wherever on the node. Raises VTorqueError (VT-NODE)."""
    if ram_mib * 1024 % size_kib:
        raise VTorqueError(
            f"{ram_mib} MiB of RAM are no whole number of huge pages of {size_kib} KiB",
            code=Code.NODE,
            hint=f"ask for a multiple of {size_kib // 1024} MiB",
        )
    pools = [node.hugepages for node in topology.nodes] or [topology.hugepages]
    counts = [pool.get(size_kib, (0, 0)) for pool in pools]
    with record.node_lock(config.paths, "cpus"):
        _, held_mib = _taken(config, place)
        total_mib, free_mib = (sum(count[which] for count in counts) * size_kib // 1024 for which in (0, 1))
        free_mib = min(free_mib, total_mib - sum(held_mib.values()))
        if free_mib < ram_mib * guests:
            raise VTorqueError(
                f"{ram_mib * guests} MiB of RAM do not fit: {max(0, free_mib)} MiB are free in huge pages of "
                f"{size_kib} KiB",
                code=Code.NODE,
                hint="hypervisor.hugepages promises them: the node must set enough aside",
            )
        record.append(place, {"do": "cpus", "cpus": [], "memory": {str(NOWHERE): ram_mib * guests}})
