"""Which CPUs of the node the vCPUs of a guest are pinned to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import Pinning
from vmgr.node import record

Affinity = list[set[int]]
"""For each vCPU the CPUs that it may run on."""


def plan_cpus(vcpus: int, nodes: Mapping[int, set[int]], used: Counter[int], *, overcommit: bool) -> list[int]:
    """One CPU for each vCPU, in order.

    `nodes` maps NUMA nodes to the CPUs that may be used, `used` counts the vCPUs already pinned to each. Free CPUs of
    one NUMA node are taken where one has enough, from the node with the least to spare, else from as few nodes as
    possible. With fewer free CPUs than vCPUs the guest is refused, or, where the site allows `overcommit`, all vCPUs
    are spread evenly over the CPUs, the least used first. Raises VTorqueError (VT-NODE).
    """
    free = {node: sorted(cpu for cpu in cpus if not used[cpu]) for node, cpus in nodes.items()}
    enough = [cpus for cpus in free.values() if len(cpus) >= vcpus]
    if enough:
        return min(enough, key=len)[:vcpus]
    scattered = [cpu for cpus in sorted(free.values(), key=len, reverse=True) for cpu in cpus]
    if len(scattered) >= vcpus:
        return scattered[:vcpus]
    every = [cpu for cpus in nodes.values() for cpu in cpus]
    if not overcommit or not every:
        raise VTorqueError(
            f"{vcpus} vCPUs do not fit: {len(scattered)} of {len(every)} CPUs of this node are free",
            code=Code.NODE,
            hint="ask for fewer vcpus, or the site sets hypervisor.overcommit_cpus",
        )
    load = Counter(used)
    chosen = []
    for _ in range(vcpus):
        cpu = min(every, key=lambda c: (load[c], c))
        load[cpu] += 1
        chosen.append(cpu)
    return chosen


def map_cpus(listed: Sequence[str], usable: set[int], used: Counter[int], *, overcommit: bool) -> Affinity:
    """The CPUs of each vCPU as the user listed them, such as `4-5,8`.

    All must be `usable`; those that are `used` by another guest are refused unless the site allows `overcommit`. The
    vCPUs of one guest may share CPUs. Raises VTorqueError (VT-NODE) naming vCPU and CPUs.
    """
    affinity = []
    for vcpu, text in enumerate(listed):
        cpus = _read_list(text, max(usable, default=-1))
        strange = None if cpus is None else cpus - usable
        if cpus is None or strange:
            which = f", of which {show_cpus(strange)} may not be" if strange and cpus and strange != cpus else ""
            raise VTorqueError(
                f"vCPU {vcpu} cannot be bound to the CPUs {text}{which}",
                code=Code.NODE,
                hint=f"guests may use {show_cpus(usable)} of this node",
            )
        taken = {cpu for cpu in cpus if used[cpu]}
        if taken and not overcommit:
            raise VTorqueError(
                f"vCPU {vcpu} cannot be bound to the CPUs {text}: {show_cpus(taken)} in use by another guest",
                code=Code.NODE,
                hint="bind it to others, or the site sets hypervisor.overcommit_cpus",
            )
        affinity.append(cpus)
    return affinity


def _read_list(text: str, highest: int) -> Optional[set[int]]:
    """The CPUs in a list such as `4-5,8`; None for a range that is none, or goes above `highest`."""
    cpus: set[int] = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        first, last = int(low), int(high or low)
        if not first <= last <= highest:
            return None
        cpus.update(range(first, last + 1))
    return cpus


def show_cpus(cpus: Iterable[int]) -> str:
    """CPUs as a list of ranges: `0-3,8`."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges) or "none"


def usable_cpus() -> dict[int, set[int]]:
    """The CPUs that this process may run on, by NUMA node.

    The nodes come from libnuma; a node without libnuma, or with one NUMA node only, counts as one.
    """
    allowed = os.sched_getaffinity(0)
    if len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) < 2:
        return {0: allowed}
    from numa import info  # loads libnuma: only where there is something to learn from it

    nodes: dict[int, set[int]] = {}
    for cpu in allowed:
        nodes.setdefault(max(info.cpu_to_node(cpu), 0), set()).add(cpu)
    return nodes


def reserve(
    config: Config, place: record.Place, pinning: Pinning, vcpus: int, guests: int
) -> Sequence[Optional[Affinity]]:
    """CPUs for each of the node's guests, chosen and written to the attempt's record under the node's lock.

    None stands for a guest that is not pinned: it runs where the agent may and reserves nothing.
    """
    if pinning.mode == "off":
        return [None] * guests
    affinities: list[Affinity] = []
    with record.node_lock(config.paths, "cpus"):
        used: Counter[int] = Counter()
        for other in record.places(config.paths):
            if other != place and record.is_held(other):
                for step in record.steps(other):
                    used.update(step["cpus"] if step.get("do") == "cpus" else ())
        nodes, overcommit = usable_cpus(), config.hypervisor.overcommit_cpus
        for number in range(guests):
            if pinning.cpus is not None:
                affinity = map_cpus(pinning.cpus[number], set().union(*nodes.values()), used, overcommit=overcommit)
                cpus = sorted(set().union(*affinity))
            else:
                cpus = plan_cpus(vcpus, nodes, used, overcommit=overcommit)
                affinity = [{cpu} for cpu in cpus]
            record.append(place, {"do": "cpus", "cpus": cpus})
            used.update(cpus)
            affinities.append(affinity)
    return affinities
