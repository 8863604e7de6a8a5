"""One guest's CPUs and memory, taken from nodes that have been chosen for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

from vmgr.topology.nearest import Nodes
from vmgr.topology.room import Core, Room


class Want(NamedTuple):
    """One guest: its vCPUs, its memory in units, and how it is seated.

    `cores` is how many cores of its own it gets, None for as few as hold it. An `even` guest has about as many vCPUs
    on each of its nodes, another one fills nodes up. A `spread` guest goes where most is to spare, another one where
    least is. One that `shares` may use CPUs of cores that are not its own.
    """

    vcpus: int
    units: int
    cores: Optional[int]
    even: bool = True
    spread: bool = False
    shares: bool = False


class Stock(NamedTuple):
    """What a node has of some kinds: clean cores, how many CPUs each has, and CPUs of other cores."""

    cores: Sequence[Core]
    threads: Sequence[int]
    others: Sequence[int]


def pick_cpus(room: Room, want: Want, stocks: Mapping[int, Stock], count: int) -> Sequence[int]:
    """CPUs for the guest: the first of each of its cores, then these cores' others, then those of other cores."""
    clean = {node: len(stock.cores) for node, stock in stocks.items()}
    while True:
        split = _split(clean, count, even=want.even)
        own = {node: _best_cores(room, stocks[node].cores, cores, want, count) for node, cores in split.items()}
        beyond = {node: sum(len(room.free[core.number]) for core in mine) - len(mine) for node, mine in own.items()}
        if sum(beyond.values()) >= want.vcpus - count or want.shares or count == sum(clean.values()):
            break
        count += 1  # the nodes' shares have fewer threads than their best cores together
    more = _split(beyond, want.vcpus - count, even=want.even)
    cpus: list[int] = []
    for node, mine in own.items():
        if count < want.vcpus:
            _narrow(room, mine, stocks[node].cores, len(mine) + more[node])
        rounds = _rounds([room.free[core.number] for core in mine])
        cpus += rounds[: len(mine) + more[node]]
    if len(cpus) < want.vcpus:
        taken = Counter(cpus)
        rest = _rounds([room.free[core] for core in sorted(room.free) if room.ground.cores[core].node in stocks])
        mine_too = {core.number for mine in own.values() for core in mine}
        unused = [cpu for cpu in rest if room.ground.core_of[cpu] not in room.clean - mine_too]
        unused += [cpu for cpu in rest if room.ground.core_of[cpu] in room.clean - mine_too]
        for cpu in unused:
            if taken[cpu]:
                taken[cpu] -= 1
            elif len(cpus) < want.vcpus:
                cpus.append(cpu)
    return cpus


def _narrow(room: Room, mine: list[Core], cores: Sequence[Core], vcpus: int) -> None:
    """Put cores with fewer threads in the place of some of `mine`, where they do: others may need the wide ones."""

    def threads(core: Core) -> int:
        return len(room.free[core.number])

    surplus = sum(map(threads, mine)) - vcpus
    others = sorted((core for core in cores if core not in mine), key=lambda core: (threads(core), core.number))
    for at in reversed(range(len(mine))):
        fit = [
            core for core in others if core.kind == mine[at].kind and 0 < threads(mine[at]) - threads(core) <= surplus
        ]
        if fit:
            others.remove(fit[0])
            surplus -= threads(mine[at]) - threads(fit[0])
            mine[at] = fit[0]


def _rounds(lists: Sequence[Sequence[int]]) -> Sequence[int]:
    """The first of each list, then the second of each, and so on."""
    longest = max(map(len, lists), default=0)
    return [own[at] for at in range(longest) for own in lists if at < len(own)]


def _split(room: Mapping[int, int], count: int, *, even: bool) -> dict[int, int]:
    """So many things (or as many as there is room for) put into places: about evenly, or the narrowest filled first."""
    split = dict.fromkeys(room, 0)
    left = min(count, sum(room.values()))
    open_ = sorted(room, key=lambda node: (room[node], node))
    for at, node in enumerate(open_):
        split[node] = min(room[node], left // (len(open_) - at) if even else left)
        left -= split[node]
    return split


def _best_cores(room: Room, cores: Sequence[Core], count: int, want: Want, whole: int) -> list[Core]:
    """`count` cores of a node: of the most capable kind, of one package if one has enough, the first of them."""
    sizes = Counter((core.kind, core.package) for core in cores)
    crowded = whole < want.vcpus

    def preference(core: Core) -> tuple[int, ...]:
        size = sizes[core.kind, core.package]
        threads = -len(room.free[core.number]) if crowded else 0
        return core.kind, threads, size < count, size if size >= count else -size, core.package, core.number

    return sorted(sorted(cores, key=preference)[:count], key=lambda core: core.number)


def take_memory(room: Room, want: Want, nodes: Nodes, cpus: Sequence[int]) -> Mapping[int, int]:
    """Memory for a guest, taken from the room: of each node in proportion to its vCPUs, as far as there is enough."""
    near = {node for node in nodes if room.memory.get(node)}
    weights = Counter(room.ground.nearest(room.ground.node_of(cpu), near) for cpu in cpus)
    units = share_units(want.units, weights, {node: room.memory[node] for node in near})
    for node, taken in units.items():
        room.memory[node] -= taken
    return units


def share_units(units: int, weights: Mapping[int, int], capacity: Mapping[int, int]) -> dict[int, int]:
    """Units by node: in proportion to `weights` as far as `capacity` goes, the rest where there is some.

    Nodes that get nothing are left out. The capacity must be enough.
    """
    given = dict.fromkeys(sorted(capacity), 0)
    left = units
    open_ = [node for node in given if weights.get(node) and capacity[node]]
    while left and open_:
        total = sum(weights[node] for node in open_)
        grants = {node: min(left * weights[node] // total, capacity[node] - given[node]) for node in open_}
        if not any(grants.values()):
            grants = dict.fromkeys(open_[:left], 1)
        for node, granted in grants.items():
            given[node] += granted
            left -= granted
        open_ = [node for node in open_ if given[node] < capacity[node]]
    for node in given:
        more = min(left, capacity[node] - given[node])
        given[node] += more
        left -= more
    return {node: taken for node, taken in given.items() if taken}
