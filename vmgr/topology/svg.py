"""A machine and the guests on it, drawn as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Union
from xml.etree import ElementTree

from vmgr.errors import printable
from vmgr.topology.cpulist import show_cpus
from vmgr.topology.model import Allowed, Cpu, NumaNode, Placement, Topology
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
    wrapped,
)

_PAGE = 1180
_BLOCK = 420
_NARROWEST = 720
_PAD = 14
_GAP = 10
_CPU = 38
_LINE = 19
_CHAR = 7.2
"""About the width of a letter of 13 pixels."""

_COLOURS = ("#2f6fb0", "#c2571a", "#2e8b57", "#8a4fa3", "#b03a48", "#7a6a1f", "#0f8a8a", "#5b5fc7")
_HOST, _FREE, _BARRED, _INK, _FAINT = "#3d4652", "#ffffff", "url(#barred)", "#1d242c", "#5c6773"

Element = ElementTree.Element


class _Card(NamedTuple):
    """Something with a size, drawn by `parts` from its own corner."""

    width: float
    height: float
    parts: Sequence[Element]


def draw_svg(
    topology: Topology,
    placements: Mapping[str, Placement],
    allowed: Allowed,
    host: frozenset[int] = frozenset(),
) -> str:
    """The picture of `vmgr.topology.picture.draw` as an SVG document, in ASCII, that needs nothing from elsewhere."""
    artist = _Artist(placements, allowed, host)
    packages: dict[int, list[_Card]] = {}
    for block in blocks(topology):
        packages.setdefault(block.package, []).append(artist.block(block))
    cards = [_framed(f"package {package}", *_flow(inner, _PAGE - 2 * _PAD)) for package, inner in packages.items()]
    cards += [artist.node(node) for node in bare_nodes(topology)]
    width, height, groups = _flow(cards, _PAGE)
    width = max(width, _NARROWEST)
    head = [_text(0, 18, summary(topology), size=17, weight="600")]
    usable = f"to be used: CPUs {show_cpus(allowed.cpus)} ({printable(allowed.source)})"
    lines = [usable, *([pages(topology.hugepages)] if pages(topology.hugepages) else [])]
    lines = [part for line in lines for part in wrapped(line, _letters(width))]
    head += [_text(0, 18 + _LINE * row, line, fill=_FAINT) for row, line in enumerate(lines, 1)]
    top = 18 + _LINE * len(lines) + _PAD
    below, foot = artist.legend(top + height + _PAD, width)
    page = Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"{-_PAD} {-_PAD} {_show(width + 2 * _PAD)} {_show(below + 2 * _PAD)}",
        width=_show(width + 2 * _PAD),
        height=_show(below + 2 * _PAD),
    )
    page.set("font-family", "system-ui, 'DejaVu Sans', Helvetica, Arial, sans-serif")
    page.set("font-size", "13")
    page.append(_titled(Element("desc"), summary(topology)))
    page.append(_hatching())
    page.append(_box(-_PAD, -_PAD, width + 2 * _PAD, below + 2 * _PAD, fill="#f4f6f8", radius=0))
    page.extend(head)
    page.append(_moved(0, top, groups))
    page.extend(foot)
    text: bytes = ElementTree.tostring(page, encoding="us-ascii")
    return text.decode("ascii") + "\n"


class _Artist:
    """Draws blocks and nodes with the guests that are on them."""

    def __init__(self, placements: Mapping[str, Placement], allowed: Allowed, host: frozenset[int]) -> None:
        self._placements = placements
        self._names = [printable(name) for name in placements]
        self._allowed = allowed
        self._seats = seats(placements.values(), host)

    def block(self, block: Block) -> _Card:
        """The cores of a block in rows of equal length, below what its node has."""
        size = max(len(core) for core in block.cores)
        wide = size * _CPU + 6
        columns = max(1, min(len(block.cores), int((_BLOCK + 4) // (wide + 4))))
        columns = math.ceil(len(block.cores) / math.ceil(len(block.cores) / columns))
        cards = [_Card(wide, _CPU + 6, self._core(core, wide)) for core in block.cores]
        width, height, parts = _flow(cards, columns * (wide + 4), gap=4)
        name = "no node" if block.node is None else f"node {block.node.number}"
        if block.kind:
            name += f", kind {block.kind} (less capable)"
        if block.node is None or not block.is_first:
            return _framed(name, width, height, parts, fill="#ffffff")
        width, top, memory_parts = self._memory(block.node, max(width, len(name) * _CHAR))
        return _framed(name, width, top + height, [*memory_parts, _moved(0, top, parts)], fill="#ffffff")

    def node(self, node: NumaNode) -> _Card:
        """A node without CPUs."""
        width, height, parts = self._memory(node, 120)
        return _framed(f"node {node.number}, no CPUs", width, height, parts, fill="#ffffff")

    def _memory(self, node: NumaNode, width: float) -> tuple[float, float, Sequence[Element]]:
        """What a node has, and a bar of the guests' shares of it; gives width, height and parts."""
        lines = [memory(node.memory_mib), *([pages(node.hugepages)] if pages(node.hugepages) else [])]
        width = max(width, *(len(line) * _CHAR for line in lines))
        parts = [_text(0, 12 + row * _LINE, line, fill=_FAINT) for row, line in enumerate(lines)]
        top = len(lines) * _LINE
        parts.append(_box(0, top, width, 8, fill="#dde2e7", radius=4))
        at = 0.0
        for guest, placement in enumerate(self._placements.values()):
            mib = sum(cell.ram_mib for cell in placement.layout.cells if cell.host_node == node.number)
            share = min(width * mib / max(node.memory_mib, 1), width - at)
            if share > 0:
                bar = _box(at, top, share, 8, fill=_colour(guest), radius=2)
                parts.append(_titled(bar, f"{self._names[guest]}: {memory(mib)}"))
                at += share
        return width, top + 8 + _GAP, parts

    def _core(self, core: Sequence[Cpu], wide: float) -> Sequence[Element]:
        parts = [_box(0, 0, wide, _CPU + 6, fill="#e6eaee", radius=5)]
        for column, cpu in enumerate(core):
            parts.append(_moved(4 + column * _CPU, 4, self._cpu(cpu)))
        return parts

    def _cpu(self, cpu: Cpu) -> Sequence[Element]:
        """A CPU: its number over the first that sits there; a pointer on it sees all."""
        taken = self._seats.get(cpu.number, ())
        side = _CPU - 2
        if not taken:
            free = cpu.number in self._allowed.cpus
            box = _box(0, 0, side, side, fill=_FREE if free else _BARRED, radius=3, stroke="#c3cad1")
            whole = [_titled(box, f"CPU {cpu.number}: {'free' if free else 'not for this job'}")]
            return [*whole, _text(side / 2, 14, str(cpu.number), size=10, fill=_FAINT, anchor="middle")]
        who = ", ".join(self._sitter(seat) for seat in taken)
        first = taken[0]
        colour = _HOST if first.guest is None else _colour(first.guest)
        helper = first.guest is not None and first.label.endswith(("io", "em"))
        box = _box(
            0, 0, side, side, fill="#ffffff" if helper else colour, radius=3, stroke=colour, wide=2 if helper else 1
        )
        ink = colour if helper else "#ffffff"
        label = first.label + ("+" if len(taken) > 1 else "")
        return [
            _titled(box, f"CPU {cpu.number}: {who}"),
            _text(side / 2, 13, str(cpu.number), size=10, fill=ink, anchor="middle"),
            _text(side / 2, 29, label, size=11 if len(label) > 3 else 13, fill=ink, anchor="middle", weight="600"),
        ]

    def _sitter(self, seat: Seat) -> str:
        if seat.guest is None:
            return "kept for the host"
        role = seat.label[len(letter(seat.guest)) :]
        named = {"io": "I/O threads", "em": "emulator"}.get(role, f"vCPU {role}")
        return f"{named} of {self._names[seat.guest]}"

    def legend(self, top: float, width: float) -> tuple[float, Sequence[Element]]:
        """The guests in words, then the signs; gives where it ends, and its parts."""
        parts: list[Element] = []
        y = top
        for guest, (name, placement) in enumerate(zip(self._names, self._placements.values())):
            parts.append(_box(0, y, 30, 20, fill=_colour(guest), radius=3))
            parts.append(_text(15, y + 14.5, letter(guest), fill="#ffffff", anchor="middle", weight="600"))
            parts.append(_text(40, y + 14.5, name, weight="600"))
            for line in (part for text in portrait(placement) for part in wrapped(text, _letters(width - 40))):
                y += _LINE
                parts.append(_text(40, y + 14.5, line, fill=_FAINT))
            y += _LINE + _GAP
        x = 0.0
        signs = [
            (_FREE, "#c3cad1", "free"),
            (_BARRED, "#c3cad1", "not for this job"),
            (_HOST, _HOST, "kept for the host"),
        ]
        signs += [(_FAINT, _FAINT, "vCPU"), ("#ffffff", _FAINT, "io: I/O threads, em: emulator")] if self._names else []
        for fill, stroke, text in signs:
            parts.append(_box(x, y, 16, 16, fill=fill, radius=3, stroke=stroke))
            parts.append(_text(x + 23, y + 13, text, fill=_FAINT))
            x += 23 + len(text) * _CHAR + 16
        return y + 20, parts


def _flow(cards: Iterable[_Card], width: float, gap: float = _GAP) -> tuple[float, float, Sequence[Element]]:
    """Cards side by side, row by row, within `width`; gives the width and height that they take, and themselves.

    Rows get as many cards each as the fewest rows allow: four and four, not seven and one.
    """
    cards = list(cards)
    rows, x = 1, 0.0
    for card in cards:
        if x and x + card.width > width:
            rows, x = rows + 1, 0.0
        x += card.width + gap
    most = math.ceil(len(cards) / rows)
    x = y = tallest = widest = 0.0
    count = 0
    parts = []
    for card in cards:
        if count == most or (x and x + card.width > width):
            x, y, tallest, count = 0.0, y + tallest + gap, 0.0, 0
        parts.append(_moved(x, y, card.parts))
        x += card.width + gap
        count += 1
        tallest = max(tallest, card.height)
        widest = max(widest, x - gap)
    return widest, y + tallest, parts


def _framed(name: str, width: float, height: float, parts: Sequence[Element], *, fill: str = "#eaf0f6") -> _Card:
    """A card with a heading."""
    width = max(width, len(name) * _CHAR) + 2 * _PAD
    height += 2 * _PAD + _LINE
    frame = _box(0, 0, width, height, fill=fill, radius=8, stroke="#c9d2da")
    heading = _text(_PAD, _PAD + 10, name, weight="600")
    return _Card(width, height, [frame, heading, _moved(_PAD, _PAD + _LINE, parts)])


def _letters(width: float) -> int:
    """How many letters fit into a width."""
    return max(20, int(width / _CHAR))


def _colour(guest: int) -> str:
    return _COLOURS[guest % len(_COLOURS)]


def _show(number: Union[int, float]) -> str:
    return f"{number:.1f}".rstrip("0").rstrip(".")


def _moved(x: float, y: float, parts: Iterable[Element]) -> Element:
    group = Element("g", transform=f"translate({_show(x)} {_show(y)})")
    group.extend(parts)
    return group


def _box(
    x: float, y: float, width: float, height: float, *, fill: str, radius: float, stroke: str = "none", wide: float = 1
) -> Element:
    places = {"x": x, "y": y, "width": width, "height": height, "rx": radius, "stroke-width": wide}
    return Element("rect", {key: _show(value) for key, value in places.items()}, fill=fill, stroke=stroke)


def _text(
    x: float, y: float, text: str, *, size: float = 13, fill: str = _INK, anchor: str = "start", weight: str = "400"
) -> Element:
    element = Element("text", {"text-anchor": anchor, "font-weight": weight, "font-size": _show(size)}, fill=fill)
    element.set("x", _show(x))
    element.set("y", _show(y))
    element.text = text
    return element


def _titled(element: Element, text: str) -> Element:
    """What a pointer on the element shows, and a reader of the document reads."""
    if element.tag == "desc":
        element.text = text
    else:
        ElementTree.SubElement(element, "title").text = text
    return element


def _hatching() -> Element:
    """The pattern of what is not to be used."""
    definitions = Element("defs")
    pattern = ElementTree.SubElement(
        definitions,
        "pattern",
        {"patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"},
        id="barred",
        width="6",
        height="6",
    )
    pattern.append(_box(0, 0, 6, 6, fill="#eceff2", radius=0))
    pattern.append(_box(0, 0, 2, 6, fill="#d3d9df", radius=0))
    return definitions
