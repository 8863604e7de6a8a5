"""Whether the node has CPUs, memory and huge pages for a guest, and its topology can be read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Optional

from vmgr.config import Config
from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.topology.model import Topology
from vmgr.topology.read import read_topology

_find = finder("memory")


def check(node: Node) -> Iterator[Finding]:
    topology = read_topology(node.tree.root)
    yield from judge_cpus(topology, node.config)
    yield from judge_memory(node.tree.text("proc/meminfo") or "", node.config)
    yield from judge_hugepages(topology, node.config)


def judge_cpus(topology: Topology, config: Config) -> Iterator[Finding]:
    cpus, nodes = len(topology.cpus), len(topology.nodes)
    shown = f"{nodes} NUMA node{'s' if nodes != 1 else ''}" if nodes else "no NUMA"
    yield _find(Level.OK, f"{cpus} CPUs, {shown}, {topology.memory_mib} MiB")
    wanted = config.policy["vcpus"]["default"]
    free = cpus - config.resources.host_cores
    if wanted > free and not config.hypervisor.overcommit_cpus:
        yield _find(
            Level.FAILURE, f"a guest of policy.vcpus.default ({wanted} vCPUs) does not fit on {free} CPUs",
            "lower policy.vcpus.default or resources.host_cores, or set hypervisor.overcommit_cpus",
        )  # fmt: skip


def available_mib(meminfo: str, key: str) -> Optional[int]:
    """A value of /proc/meminfo (proc(5)) in MiB, None when it is not told."""
    match = re.search(rf"^{key}:\s+([0-9]{{1,15}}) kB$", meminfo, re.MULTILINE)
    return int(match[1]) // 1024 if match else None


def judge_memory(meminfo: str, config: Config) -> Iterator[Finding]:
    total, available = available_mib(meminfo, "MemTotal"), available_mib(meminfo, "MemAvailable")
    if total is None or available is None:
        yield _find(Level.WARNING, "/proc/meminfo does not tell how much memory is available", "is /proc mounted?")
        return
    guest = 0 if config.hypervisor.hugepages else config.policy["ram"]["default"]
    needed = guest + config.resources.host_memory
    what = f"{available} of {total} MiB are available"
    asks = f"a guest of policy.ram.default and resources.host_memory take {needed} MiB"
    if needed > total:
        yield _find(Level.FAILURE, f"{what}: {asks}", "lower policy.ram.default or resources.host_memory")
    elif needed > available:
        yield _find(Level.WARNING, f"{what}: {asks}", "free memory: what runs here?")
    else:
        yield _find(Level.OK, what)


def judge_hugepages(topology: Topology, config: Config) -> Iterator[Finding]:
    """What hypervisor.hugepages promises, held against what the node has set aside."""
    size = config.hypervisor.hugepages
    if size is None:
        return
    kib = config.hypervisor.hugepage_kib or 0
    pools = [node.hugepages for node in topology.nodes] or [topology.hugepages]
    total, free = (sum(pool.get(kib, (0, 0))[which] for pool in pools) * kib // 1024 for which in (0, 1))
    wanted = config.policy["ram"]["default"]
    name = "hugepages" if size == "2M" else "1G hugepages"
    remedy = (
        f"set enough aside: vm.nr_hugepages (2M), or `hugepagesz={size} hugepages=NUMBER` on the kernel's command line"
    )
    if total < wanted:
        yield _find(
            Level.FAILURE, f"{total} MiB are set aside in {name}, and a guest of policy.ram.default takes {wanted} MiB",
            remedy,
        )  # fmt: skip
    elif free < wanted:
        yield _find(Level.WARNING, f"{free} of {total} MiB in {name} are free: no guest of {wanted} MiB fits", remedy)
    else:
        yield _find(Level.OK, f"{free} of {total} MiB in {name} are free")
    if wanted * 1024 % kib:
        yield _find(
            Level.FAILURE, f"policy.ram.default ({wanted} MiB) is no whole number of pages of {size}",
            f"set it to a multiple of {kib // 1024} MiB",
        )  # fmt: skip
