"""A machine's topology, read from `/sys` and `/proc`: of the node itself, or of a recorded tree of another machine.

Facts are from the kernel's Documentation/ABI/{stable,testing}/sysfs-devices-{node,system-cpu} and
Documentation/admin-guide/cputopology.rst.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

from vmgr.topology.model import Cpu, NumaNode, Topology
from vmgr.topology.tree import Tree

_CPU = "sys/devices/system/cpu"
_NODE = "sys/devices/system/node"
_HERE, _ELSEWHERE = 10, 20
_FARTHEST = 255
_SAME_KIND = 0.9
"""Cores whose highest frequencies differ by less are of one kind: on one chip some clock a little higher."""

Hugepages = Mapping[int, tuple[int, int]]


def read_topology(root: Path = Path("/")) -> Topology:
    """The topology of the machine whose file system root is `root`: what is online of it.

    Where NUMA nodes claim the same CPUs, as some firmware has it, no word of theirs is believed: the machine counts
    as one without NUMA. Nodes that are the memory of a GPU are left out. Raises VTorqueError (VT-NODE, or VT-VALUE
    for a root other than `/`) when there is no machine to be seen.
    """
    tree = Tree(root)
    ids = _ids(tree)
    if not ids:
        raise tree.error(f"no CPU can be seen in {tree.at(_CPU)}")
    owners, nodes, distances = _numa(tree, frozenset(ids))
    cores, packages, kinds = _cores(tree, ids), _packages(ids), _kinds(tree, sorted(ids))
    best: dict[int, int] = {}
    for cpu, core in cores.items():
        best[core] = min(kinds[cpu], best.get(core, kinds[cpu]))
    cpus = tuple(Cpu(cpu, cores[cpu], packages[cpu], owners.get(cpu), best[cores[cpu]]) for cpu in sorted(ids))
    memory_mib = sum(node.memory_mib for node in nodes) or _memory_mib(tree.text("proc/meminfo"))
    hugepages = _hugepages(tree, "sys/kernel/mm/hugepages")
    if len(nodes) == 1 and not nodes[0].hugepages:
        nodes = (nodes[0]._replace(hugepages=hugepages),)
    return Topology(cpus, nodes, distances, memory_mib, {} if nodes else hugepages)


_Ids = Mapping[int, tuple[int, int]]
"""The kernel's package and core ids of CPUs, -1 where it knows none."""


def _ids(tree: Tree) -> _Ids:
    """The CPUs that are online, with their ids.

    A CPU without a folder `topology` is offline: kernels take it away with the CPU, and the oldest have nothing else
    to say so. Where none has one, /proc/cpuinfo tells, which lists CPUs that are online.
    """
    listed = tree.cpus(f"{_CPU}/online")
    there = [
        cpu
        for cpu in tree.numbered(_CPU, "cpu")
        if (tree.number(f"{_CPU}/cpu{cpu}/online") != 0 if listed is None else cpu in listed)
    ]
    known = [cpu for cpu in there if tree.at(f"{_CPU}/cpu{cpu}/topology").is_dir()]
    if not known:
        told = _cpuinfo(tree.text("proc/cpuinfo") or "")
        return told if listed is None else {cpu: told.get(cpu, (-1, -1)) for cpu in sorted(listed)}
    ids = {}
    for cpu in known:
        package = tree.number(f"{_CPU}/cpu{cpu}/topology/physical_package_id")
        core = tree.number(f"{_CPU}/cpu{cpu}/topology/core_id")
        ids[cpu] = (-1 if package is None else package, -1 if core is None else core)
    return ids


def _cpuinfo(text: str) -> _Ids:
    """CPUs and ids in /proc/cpuinfo."""
    ids: dict[int, tuple[int, int]] = {}
    cpu = None
    for line in text.splitlines():
        match = re.fullmatch(r"(processor|physical id|core id)\s*:\s*([0-9]{1,6})", line.strip(), re.ASCII)
        if match is None:
            continue
        number = int(match[2])
        if match[1] == "processor":
            cpu = number
            ids[cpu] = (-1, -1)
        elif cpu is not None:
            package, core = ids[cpu]
            ids[cpu] = (number, core) if match[1] == "physical id" else (package, number)
    return ids


def _cores(tree: Tree, ids: _Ids) -> Mapping[int, int]:
    """Numbers of cores, from 0 in the order of their first CPUs.

    CPUs are threads of one core when the kernel calls them siblings and gives them the same core id. Both are needed:
    ids repeat between packages and dies, and the two cores of a Bulldozer module are siblings.
    """
    cores: dict[int, int] = {}
    count = 0
    for cpu in sorted(ids):
        if cpu in cores:
            continue
        folder = f"{_CPU}/cpu{cpu}/topology"
        siblings = tree.cpus(
            f"{folder}/core_cpus_list",
            f"{folder}/thread_siblings_list",
            f"{folder}/core_cpus",
            f"{folder}/thread_siblings",
        )
        if siblings is None:
            siblings = frozenset(ids) if ids[cpu][1] >= 0 else frozenset()
        cores[cpu] = count
        cores.update((other, count) for other in siblings & ids.keys() - cores.keys() if ids[other] == ids[cpu])
        count += 1
    return cores


def _packages(ids: _Ids) -> Mapping[int, int]:
    """Numbers of packages, from 0 in the order of their first CPUs. What the kernel knows no package of makes one."""
    numbers: dict[int, int] = {}
    return {cpu: numbers.setdefault(ids[cpu][0], len(numbers)) for cpu in sorted(ids)}


def _kinds(tree: Tree, cpus: Sequence[int]) -> Mapping[int, int]:
    """How capable each CPU is, 0 the most: by its capacity, its PMU (Intel's hybrids), else by its frequency."""
    capacities = [tree.number(f"{_CPU}/cpu{cpu}/cpu_capacity") for cpu in cpus]
    by_capacity = _ranked(capacities, 1.0)
    if len(set(by_capacity)) > 1:
        return dict(zip(cpus, by_capacity))
    pmus = [tree.cpus(f"sys/devices/{name}/cpus") for name in ("cpu_core", "cpu_atom", "cpu_lowpower")]
    if pmus[0]:
        rank = {cpu: kind for kind, found in enumerate(pmus) for cpu in found or ()}
        if all(cpu in rank for cpu in cpus):
            return {cpu: rank[cpu] for cpu in cpus}
    base = [tree.number(f"{_CPU}/cpu{cpu}/cpufreq/base_frequency") for cpu in cpus]
    highest = [tree.number(f"{_CPU}/cpu{cpu}/cpufreq/cpuinfo_max_freq") for cpu in cpus]
    by_base = _ranked(base, _SAME_KIND)
    return dict(zip(cpus, by_base if len(set(by_base)) > 1 else _ranked(highest, _SAME_KIND)))


def _ranked(values: Sequence[Optional[int]], same: float) -> Sequence[int]:
    """The rank of each value, the greatest 0; values above `same` times the greatest of a rank are of that rank.

    All are 0 where a value is missing.
    """
    known = [value for value in values if value is not None and value > 0]
    if len(known) < len(values):
        return [0] * len(values)
    rank: dict[int, int] = {}
    greatest, kind = 0, -1
    for value in sorted(set(known), reverse=True):
        if kind < 0 or value < greatest * same:
            greatest, kind = value, kind + 1
        rank[value] = kind
    return [rank[value] for value in known]


_Numa = tuple[Mapping[int, int], tuple[NumaNode, ...], Mapping[tuple[int, int], int]]
"""The nodes of CPUs, the nodes, and their distances."""


def _numa(tree: Tree, online: frozenset[int]) -> _Numa:
    folders = tree.numbered(_NODE, "node")
    listed = tree.cpus(f"{_NODE}/online")
    all_nodes = [node for node in folders if not listed or node in listed]
    gpu = _gpu_nodes(tree)
    owners: dict[int, int] = {}
    nodes = []
    for node in all_nodes:
        cpus = (tree.cpus(f"{_NODE}/node{node}/cpulist", f"{_NODE}/node{node}/cpumap") or frozenset()) & online
        if node in gpu and not cpus:
            continue
        if cpus & owners.keys():
            return {}, (), {}
        owners.update(dict.fromkeys(cpus, node))
        folder = f"{_NODE}/node{node}"
        nodes.append(
            NumaNode(node, _memory_mib(tree.text(f"{folder}/meminfo")), _hugepages(tree, f"{folder}/hugepages"))
        )
    return owners, tuple(nodes), _distances(tree, all_nodes, [node.number for node in nodes])


def _gpu_nodes(tree: Tree) -> frozenset[int]:
    """The nodes that are the memory of GPUs: NVIDIA's driver says so, the kernel does not tell them from others."""
    gpus = "proc/driver/nvidia/gpus"
    try:
        names = sorted(entry.name for entry in tree.at(gpus).iterdir())
    except OSError:
        return frozenset()
    texts = (tree.text(f"{gpus}/{name}/numa_status") or "" for name in names)
    found = (re.search(r"^Node:\s*([0-9]{1,6})\s*$", text, re.MULTILINE | re.ASCII) for text in texts)
    return frozenset(int(match[1]) for match in found if match)


def _distances(tree: Tree, every: Sequence[int], wanted: Sequence[int]) -> Mapping[tuple[int, int], int]:
    """The distances between all `wanted` nodes: libnuma's on the running system, else those of sysfs.

    A row has one column for each of `every` node that is online, or for each that is possible. Where nothing sensible
    is said ACPI's defaults hold: 10 here, 20 elsewhere.
    """
    known = (tree.is_live and len(wanted) > 1 and _libnuma_distances(wanted)) or {}
    if not known:
        possible = sorted(tree.cpus(f"{_NODE}/possible") or ())
        for node in wanted:
            row = (tree.text(f"{_NODE}/node{node}/distance") or "").split()
            columns = next((nodes for nodes in (every, possible) if len(nodes) == len(row)), ())
            known.update(
                ((node, other), int(text)) for other, text in zip(columns, row) if re.fullmatch("[0-9]{1,3}", text)
            )
    return {
        (one, other): known[one, other] if _HERE <= known.get((one, other), 0) <= _FARTHEST
        else _HERE if one == other else _ELSEWHERE
        for one in wanted for other in wanted
    }  # fmt: skip


def _libnuma_distances(nodes: Sequence[int]) -> dict[tuple[int, int], int]:
    """The distances between nodes as libnuma has them; empty where it is missing or of no use."""
    try:
        from numa import info  # loads libnuma: only where there is something to learn from it

        if not info.numa_available():
            return {}
    except (ImportError, OSError, AttributeError):
        return {}
    return {(one, other): int(info.numa_distance(one, other)) for one in nodes for other in nodes}


def _memory_mib(meminfo: Optional[str]) -> int:
    """The whole memory in /proc/meminfo or a node's `meminfo`; 0 where nothing is said."""
    match = re.search(r"MemTotal:\s*([0-9]{1,15}) kB", meminfo or "", re.ASCII)
    return int(match[1]) // 1024 if match else 0


def _hugepages(tree: Tree, folder: str) -> Hugepages:
    """By size in KiB how many huge pages there are, and how many of them are free."""
    try:
        names = sorted(entry.name for entry in tree.at(folder).iterdir())
    except OSError:
        return {}
    pages = {}
    for name in names:
        match = re.fullmatch(r"hugepages-([0-9]{1,10})kB", name, re.ASCII)
        total = tree.number(f"{folder}/{name}/nr_hugepages")
        free = tree.number(f"{folder}/{name}/free_hugepages")
        if match and total is not None and total >= 0:
            pages[int(match[1])] = (total, min(max(free or 0, 0), total))
    return dict(sorted(pages.items()))
