"""A machine and the guests on it, drawn for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import click

from vmgr.errors import printable
from vmgr.topology.cpulist import show_cpus
from vmgr.topology.model import Allowed, Cpu, Placement, Topology
from vmgr.topology.seats import (
    Block,
    Seat,
    bare_nodes,
    blocks,
    letter,
    memory,
    pages,
    portrait,
    seats,
    summary,
    title,
    wrapped,
)

WIDTH = 80

_FREE, _BARRED, _MORE = "·", "×", "+"  # noqa: RUF001
_COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")
_MATRIX_NODES = 16


class _Cell(NamedTuple):
    """A CPU as drawn: its number over who sits there."""

    number: str
    who: str
    style: Callable[[str], str]


def draw(
    topology: Topology,
    placements: Mapping[str, Placement],
    allowed: Allowed,
    host: frozenset[int] = frozenset(),
    *,
    colour: bool = False,
    width: int = WIDTH,
) -> str:
    """The machine by package, NUMA node and core, with the guests of `placements` (by name) and `host`'s own CPUs.

    `width` columns are kept as far as a single core allows. `colour` adds the terminal's escape sequences.
    """
    taken = seats(placements.values(), host)
    cells = {cpu.number: _cell(cpu, taken.get(cpu.number, ()), allowed) for cpu in topology.cpus}
    wide = max(max(len(cell.number), len(cell.who)) for cell in cells.values())
    lines = [*wrapped(summary(topology), width)]
    lines += wrapped(f"to be used: CPUs {show_cpus(allowed.cpus)} ({printable(allowed.source)})", width)
    if topology.hugepages and pages(topology.hugepages):
        lines.append(pages(topology.hugepages))
    for block in blocks(topology):
        lines += ["", click.style(title(block), bold=True) if colour else title(block)]
        lines += _rows(block, cells, wide, width, colour=colour)
    for node in bare_nodes(topology):
        parts = (f"node {node.number}, no CPUs", memory(node.memory_mib), pages(node.hugepages))
        lines += ["", "  ".join(part for part in parts if part)]
    if 1 < len(topology.nodes) <= _MATRIX_NODES:
        lines += ["", *_matrix(topology)]
    if placements:
        lines.append("")
    for guest, (name, placement) in enumerate(placements.items()):
        first, *more = portrait(placement)
        head = f"{letter(guest)}  {printable(name)}: "
        told = [
            *wrapped(head + first, width, "   "),
            *(line for text in more for line in wrapped("   " + text, width, "   ")),
        ]
        if colour:
            told[0] = click.style(head, fg=_colour(guest)) + told[0][len(head) :]
        lines += told
    lines += ["", *wrapped(_key(placements, cells), width)]
    return "\n".join(line.rstrip() for line in lines)


def _colour(guest: int) -> str:
    return _COLOURS[guest % len(_COLOURS)]


def _cell(cpu: Cpu, taken: Sequence[Seat], allowed: Allowed) -> _Cell:
    number = str(cpu.number)
    if not taken:
        who = _FREE if cpu.number in allowed.cpus else _BARRED
        return _Cell(number, who, partial(click.style, dim=True))
    guest = taken[0].guest
    who = taken[0].label + (_MORE if len(taken) > 1 else "")
    return _Cell(number, who, partial(click.style, fg=None if guest is None else _colour(guest), bold=True))


def _rows(block: Block, cells: Mapping[int, _Cell], wide: int, width: int, *, colour: bool) -> Sequence[str]:
    """The cores of a block, as many in a row as fit, two lines a row: CPUs, and who sits there.

    Threads of a core stand together, cores are apart; where no core has several threads they are like columns.
    """
    several = any(len(core) > 1 for core in block.cores)
    joint = " │ " if several else " "
    size = max(len(core) for core in block.cores)
    one = size * wide + size - 1 + len(joint)
    fit = max(1, (width - 1 + len(joint)) // one)
    fit -= fit % 4 if fit > 4 else 0
    lines = []
    for start in range(0, len(block.cores), fit):
        row = [[cells[cpu.number] for cpu in core] for core in block.cores[start : start + fit]]
        for line in (0, 1):
            texts = []
            for core in row:
                inner = [_styled(cell, line, wide, colour=colour) for cell in core]
                inner += [" " * wide] * (size - len(core))
                texts.append(" ".join(inner))
            lines.append(" " + joint.join(texts))
    return lines


def _styled(cell: _Cell, line: int, wide: int, *, colour: bool) -> str:
    text = (cell.who if line else cell.number).rjust(wide)
    return cell.style(text) if colour and line else click.style(text, dim=True) if colour else text


def _matrix(topology: Topology) -> Sequence[str]:
    """The distances between the nodes."""
    numbers = [node.number for node in topology.nodes]
    wide = max(3, *(len(str(number)) for number in numbers))
    rows = [[str(number), *(str(topology.distances[number, other]) for other in numbers)] for number in numbers]
    return [
        "  ".join(("distance", *(str(number).rjust(wide) for number in numbers))),
        *("  ".join((row[0].rjust(8), *(text.rjust(wide) for text in row[1:]))) for row in rows),
    ]


def _key(placements: Mapping[str, Placement], cells: Mapping[int, _Cell]) -> str:
    """What the signs mean that are in the picture."""
    seen = {cell.who for cell in cells.values()}
    signs = {
        "A0 vCPU 0 of A": bool(placements),
        "Aio its I/O threads": any(placement.io not in ((), placement.emulator) for placement in placements.values()),
        "Aem its emulator": any(placement.emulator for placement in placements.values()),
        "host kept for the host": any(who.startswith("host") for who in seen),
        f"{_MORE} and others": any(who.endswith(_MORE) for who in seen),
        f"{_FREE} free": _FREE in seen,
        f"{_BARRED} not for this job": _BARRED in seen,
    }
    return ", ".join(sign for sign, is_there in signs.items() if is_there)
