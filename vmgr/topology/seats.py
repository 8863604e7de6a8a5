"""Who sits on which CPU, and in which order CPUs are drawn: what both pictures of a machine have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Optional

from vmgr.topology.cpulist import show_cpus
from vmgr.topology.model import Cpu, NumaNode, Placement, Topology


class Seat(NamedTuple):
    """Somebody on a CPU: what is written there, and the guest's position, None for the host."""

    label: str
    guest: Optional[int]


HOST = Seat("host", None)


class Block(NamedTuple):
    """The cores of one package that are of one NUMA node and of one kind, each with its CPUs.

    `node` is None where they belong to none. `is_first` is false when the node was drawn with an earlier block.
    """

    package: int
    node: Optional[NumaNode]
    kind: int
    cores: tuple[tuple[Cpu, ...], ...]
    is_first: bool


def letter(guest: int) -> str:
    """The letters that stand for the guest of that position: A to Z, then AA, AB and so on."""
    text = ""
    guest += 1
    while guest:
        guest, digit = divmod(guest - 1, 26)
        text = chr(ord("A") + digit) + text
    return text


def seats(placements: Iterable[Placement], host: frozenset[int]) -> Mapping[int, Sequence[Seat]]:
    """Everybody on each CPU that somebody sits on: vCPUs first, then the host, I/O threads, emulators.

    I/O threads that are where their emulator is have no seats of their own.
    """
    found: dict[int, list[Seat]] = {}
    placed = list(enumerate(placements))
    for guest, placement in placed:
        for vcpu, cpus in enumerate(placement.vcpus):
            for cpu in cpus:
                found.setdefault(cpu, []).append(Seat(f"{letter(guest)}{vcpu}", guest))
    for cpu in host:
        found.setdefault(cpu, []).append(HOST)
    for guest, placement in placed:
        for cpu in placement.io if placement.io != placement.emulator else ():
            found.setdefault(cpu, []).append(Seat(f"{letter(guest)}io", guest))
    for guest, placement in placed:
        for cpu in placement.emulator:
            found.setdefault(cpu, []).append(Seat(f"{letter(guest)}em", guest))
    return found


def blocks(topology: Topology) -> Sequence[Block]:
    """The machine by packages, in them by NUMA nodes and kinds, in the order of the first CPUs."""
    cores: dict[int, list[Cpu]] = {}
    for cpu in topology.cpus:
        cores.setdefault(cpu.core, []).append(cpu)
    groups: dict[tuple[int, Optional[int], int], list[tuple[Cpu, ...]]] = {}
    for threads in cores.values():
        groups.setdefault((threads[0].package, threads[0].node, threads[0].kind), []).append(tuple(threads))
    nodes = {node.number: node for node in topology.nodes}
    drawn: set[int] = set()
    found = []
    for package, number, kind in sorted(groups, key=lambda key: (key[0], groups[key][0][0].number)):
        node = None if number is None else nodes.get(number)
        found.append(Block(package, node, kind, tuple(groups[package, number, kind]), number not in drawn))
        drawn.update(() if number is None else (number,))
    return found


def bare_nodes(topology: Topology) -> Sequence[NumaNode]:
    """The NUMA nodes without CPUs."""
    owned = {cpu.node for cpu in topology.cpus}
    return [node for node in topology.nodes if node.number not in owned]


def counted(number: int, word: str) -> str:
    """`1 core`, `2 cores`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def summary(topology: Topology) -> str:
    """The machine in a few words."""
    parts = [
        counted(len({cpu.package for cpu in topology.cpus}), "package"),
        counted(len(topology.nodes), "NUMA node"),
        counted(len({cpu.core for cpu in topology.cpus}), "core"),
        counted(len(topology.cpus), "CPU"),
        memory(topology.memory_mib),
    ]
    return ", ".join(part for part in parts if not part.startswith("0 "))


def memory(mib: int) -> str:
    """Memory as one reads it, to a tenth of a GiB: `124 GiB`, `7.5 GiB`, `512 MiB`."""
    if mib < 1024:
        return f"{mib} MiB"
    return f"{mib / 1024:.1f}".removesuffix(".0") + " GiB"


def pages(hugepages: Mapping[int, tuple[int, int]]) -> str:
    """The huge pages that there are: `huge pages of 2 MiB: 100 of 512 free`; empty when there are none."""
    texts = [
        f"huge pages of {memory(kib // 1024) if kib >= 1024 else f'{kib} KiB'}: {free} of {total} free"
        for kib, (total, free) in hugepages.items()
        if total
    ]
    return ", ".join(texts)


def title(block: Block) -> str:
    """A block in words: package, node, what the node has."""
    parts = [f"package {block.package}"]
    if block.node is not None:
        parts.append(f"node {block.node.number}")
        if block.is_first:
            parts += [text for text in (memory(block.node.memory_mib), pages(block.node.hugepages)) if text]
    if block.kind:
        parts.append(f"kind {block.kind} (less capable)")
    return "  ".join(parts)


def portrait(placement: Placement) -> Sequence[str]:
    """A guest in words: its CPUs, its memory, and what it sees itself."""
    cells = placement.layout.cells
    where = [
        f"{memory(cell.ram_mib)}" + ("" if cell.host_node is None else f" on node {cell.host_node}") for cell in cells
    ]
    threads = [f"{counted(len(placement.vcpus), 'vCPU')} on {show_cpus({c for cpus in placement.vcpus for c in cpus})}"]
    together = bool(placement.io) and placement.io == placement.emulator
    if placement.emulator:
        threads.append(f"emulator{' and I/O' if together else ''} on {show_cpus(placement.emulator)}")
    if placement.io and not together:
        threads.append(f"I/O on {show_cpus(placement.io)}")
    layout = placement.layout
    sees = [counted(layout.sockets, "socket"), counted(layout.cores, "core"), counted(layout.threads, "thread")]
    return [", ".join(threads), f"{' + '.join(where)}, seen as {' x '.join(sees)}, {counted(len(cells), 'node')}"]


def wrapped(text: str, width: int, indent: str = "") -> Sequence[str]:
    """`text` in lines of up to `width` letters, broken at spaces and behind commas; `indent` begins all but the first.

    What has neither is not broken.
    """
    lines = [""]
    for word in text.replace(",", ",\0").replace(" ", " \0").split("\0"):
        if len(lines[-1]) + len(word.rstrip()) > width and lines[-1].strip():
            lines.append(indent)
        lines[-1] += word
    return [line.rstrip() for line in lines]
