"""Which CPUs of the node the vCPUs of a guest are pinned to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.node import record


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


def reserve(config: Config, place: record.Place, vcpus: int) -> list[int]:
    """CPUs for a guest, chosen and written to the attempt's record under the node's lock."""
    with record.node_lock(config.paths, "cpus"):
        used: Counter[int] = Counter()
        for other in record.places(config.paths):
            if other != place and record.is_held(other):
                for step in record.steps(other):
                    used.update(step["cpus"] if step.get("do") == "cpus" else ())
        chosen = plan_cpus(vcpus, usable_cpus(), used, overcommit=config.hypervisor.overcommit_cpus)
        record.append(place, {"do": "cpus", "cpus": chosen})
    return chosen
