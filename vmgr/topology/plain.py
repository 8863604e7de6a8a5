"""Topologies and placements as plain data, for JSON: what `vmgr topology --json` prints, and agents answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from vmgr.topology.model import Allowed, Cell, Cpu, Layout, Placement, Topology


def topology_as_plain(topology: Topology, allowed: Allowed) -> dict[str, Any]:
    """A machine, and what may be used of it. Distances are by node and node; huge pages by their size in KiB."""
    members: dict[tuple[str, Optional[int]], list[int]] = {}
    for cpu in topology.cpus:
        for key in (("core", cpu.core), ("package", cpu.package), ("node", cpu.node)):
            members.setdefault(key, []).append(cpu.number)
    packages: dict[int, dict[int, None]] = {}
    cores: dict[int, Cpu] = {}
    for cpu in topology.cpus:
        packages.setdefault(cpu.package, {})[cpu.core] = None
        cores.setdefault(cpu.core, cpu)
    numbers = [node.number for node in topology.nodes]
    return {
        "allowed": {"cpus": sorted(allowed.cpus), "nodes": sorted(allowed.nodes), "source": allowed.source},
        "cores": [
            {"core": core, "cpus": members["core", core], "kind": cpu.kind, "node": cpu.node, "package": cpu.package}
            for core, cpu in sorted(cores.items())
        ],
        "cpus": [
            {"core": cpu.core, "cpu": cpu.number, "kind": cpu.kind, "node": cpu.node, "package": cpu.package}
            for cpu in topology.cpus
        ],
        "distances": {str(one): {str(other): topology.distances[one, other] for other in numbers} for one in numbers},
        "hugepages": _pages(topology.hugepages),
        "memory_mib": topology.memory_mib,
        "nodes": [
            {
                "cpus": members.get(("node", node.number), []),
                "hugepages": _pages(node.hugepages),
                "memory_mib": node.memory_mib,
                "node": node.number,
            }
            for node in topology.nodes
        ],
        "packages": [
            {"cores": list(found), "cpus": members["package", package], "package": package}
            for package, found in sorted(packages.items())
        ],
    }


def _pages(hugepages: Mapping[int, tuple[int, int]]) -> dict[str, dict[str, int]]:
    return {str(kib): {"free": free, "total": total} for kib, (total, free) in hugepages.items()}


def as_plain(placement: Placement) -> dict[str, Any]:
    """Where a guest sits, with its own NUMA layout. `from_plain` is the way back."""
    layout = placement.layout
    return {
        "vcpus": {str(number): list(cpus) for number, cpus in enumerate(placement.vcpus)},
        "emulator": list(placement.emulator),
        "io": list(placement.io),
        "memory_nodes": list(placement.memory),
        "layout": {
            "sockets": layout.sockets,
            "cores": layout.cores,
            "threads": layout.threads,
            "nodes": [
                {
                    "node": number,
                    "vcpus": list(cell.vcpus),
                    "ram_mib": cell.ram_mib,
                    "host_node": cell.host_node,
                }
                for number, cell in enumerate(layout.cells)
            ],
            "distances": [list(row) for row in layout.distances],
        },
    }


def from_plain(plain: object) -> Placement:
    """The placement in what `as_plain` gave, after a way through JSON. Raises ValueError when it is none."""
    found = _object(plain, "vcpus", "emulator", "io", "memory_nodes", "layout")
    layout = _object(found["layout"], "sockets", "cores", "threads", "nodes", "distances")
    cells = []
    for number, cell in enumerate(_list(layout["nodes"])):
        known = _object(cell, "node", "vcpus", "ram_mib", "host_node")
        if known["node"] != number:
            raise ValueError("nodes are counted from 0")
        host_node = None if known["host_node"] is None else _number(known["host_node"])
        cells.append(Cell(_numbers(known["vcpus"]), _number(known["ram_mib"]), host_node))
    vcpus = found["vcpus"]
    if not isinstance(vcpus, dict) or set(vcpus) != {str(number) for number in range(len(vcpus))}:
        raise ValueError("vCPUs are counted from 0")
    return Placement(
        tuple(_numbers(vcpus[str(number)]) for number in range(len(vcpus))),
        _numbers(found["emulator"]),
        _numbers(found["io"]),
        _numbers(found["memory_nodes"]),
        Layout(
            _number(layout["sockets"]),
            _number(layout["cores"]),
            _number(layout["threads"]),
            tuple(cells),
            tuple(_numbers(row) for row in _list(layout["distances"])),
        ),
    )


def _object(plain: object, *keys: str) -> dict[str, Any]:
    if not isinstance(plain, dict) or set(plain) != set(keys):
        raise ValueError(f"an object with {', '.join(keys)} is needed")
    return plain


def _list(plain: object) -> list[Any]:
    if not isinstance(plain, list):
        raise ValueError("a list is needed")
    return plain


def _number(plain: object) -> int:
    if not isinstance(plain, int) or isinstance(plain, bool) or plain < 0:
        raise ValueError("a whole number is needed")
    return plain


def _numbers(plain: object) -> tuple[int, ...]:
    return tuple(_number(number) for number in _list(plain))
