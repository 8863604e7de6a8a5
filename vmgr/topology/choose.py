"""The CPUs of a node's guests: several ways to seat them, of which the rules (docs/placement.md) choose the best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Optional

from vmgr.topology.nearest import Nodes, fewest_nearest
from vmgr.topology.room import NOWHERE, Core, Ground, Room


class Seat(NamedTuple):
    """A guest's CPUs, one for each vCPU in no order yet, and the units of memory that it has of each node."""

    cpus: tuple[int, ...]
    units: Mapping[int, int]


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


def seat_guests(
    ground: Ground, free: Mapping[int, Sequence[int]], clean: frozenset[int], guests: int, vcpus: int, units: int
) -> Sequence[Seat]:
    """Seats for guests that are all alike; there must be CPUs and memory for all of them."""
    best: Optional[tuple[tuple[int, ...], Sequence[Seat]]] = None
    for wants in _ways(ground, free, clean, guests, vcpus, units):
        room = Room(ground, free, clean)
        seats = _seat_all(room, wants)
        if seats is None:
            continue
        score = _score(ground, seats)
        if best is None or score < best[0]:
            best = score, seats
        if score[:4] == (0, -guests * vcpus, 0, guests):
            break
    if best is None:
        return _seat_close(Room(ground, free, clean), _quotas(len(clean), guests, vcpus), vcpus, units)
    return best[1]


def _ways(
    ground: Ground, free: Mapping[int, Sequence[int]], clean: frozenset[int], guests: int, vcpus: int, units: int
) -> Iterator[Sequence[Want]]:
    """Ways to seat the guests so that no two have CPUs of one core."""
    quotas = _quotas(len(clean), guests, vcpus)
    if quotas[-1] > 0:
        for even in (True, False) if guests > 1 else (True,):
            yield [Want(vcpus, units, quota, even) for quota in quotas]
    if quotas[-1] < vcpus and guests > 1:
        for even in (True, False):
            yield [Want(vcpus, units, None, even, spread=True)] * guests


def _quotas(cores: int, guests: int, vcpus: int) -> Sequence[int]:
    """How many of the cores each guest gets, the most first."""
    share, more = divmod(cores, guests)
    return [min(vcpus, share + (guest < more)) for guest in range(guests)]


def _score(ground: Ground, seats: Sequence[Seat]) -> tuple[int, ...]:
    """What is wrong with a way to seat guests by the rules, the first rule first."""
    cores = [{ground.core_of[cpu] for cpu in seat.cpus} for seat in seats]
    kinds = [{ground.cores[core].kind for core in own} for own in cores]
    nodes = [{ground.cores[core].node for core in own} | set(seat.units) for own, seat in zip(cores, seats)]
    everybody = set().union(*cores)
    return (
        sum(map(len, cores)) - len(everybody),
        -len(everybody),
        sum(len(own) > 1 for own in kinds),
        sum(map(len, nodes)),
        sum(map(ground.extent, nodes)),
    )


def _seat_all(room: Room, wants: Sequence[Want]) -> Optional[Sequence[Seat]]:
    seats = []
    for want in wants:
        seat = _seat(room, want)
        if seat is None:
            return None
        seats.append(seat)
    if any(want.cores is None for want in wants):
        return _widen(room, seats)
    return seats


def _seat_close(room: Room, quotas: Sequence[int], vcpus: int, units: int) -> Sequence[Seat]:
    """Seats where some guests must have CPUs of one core, as few of them as may be."""
    seats = []
    for quota in quotas:
        ways = [Want(vcpus, units, quota), Want(vcpus, units, quota, shares=True), Want(vcpus, units, 0, shares=True)]
        seat = next(seat for seat in (_seat(room, want) for want in ways) if seat is not None)
        seats.append(seat)
    return seats


def _widen(room: Room, seats: Sequence[Seat]) -> Sequence[Seat]:
    """Give guests whose vCPUs share cores the free cores of their nodes, in turns."""
    cpus = [list(seat.cpus) for seat in seats]
    spare: dict[tuple[int, int], list[int]] = {}
    for core in sorted(room.clean & room.free.keys(), reverse=True):
        spare.setdefault(_place(room.ground.cores[core]), []).append(core)
    going = list(range(len(seats)))
    while going:
        for guest in tuple(going):
            load = Counter(room.ground.core_of[cpu] for cpu in cpus[guest])
            crowded = [cpu for cpu in cpus[guest] if load[room.ground.core_of[cpu]] > 1]
            moved = next(
                (cpu for cpu in reversed(crowded) if spare.get(_place(room.ground.cores[room.ground.core_of[cpu]]))),
                None,
            )
            if moved is None:
                going.remove(guest)
                continue
            core = spare[_place(room.ground.cores[room.ground.core_of[moved]])].pop()
            cpus[guest].remove(moved)
            cpus[guest].append(room.free[core][0])
            room.free[room.ground.core_of[moved]].append(moved)
            room.take(cpus[guest][-1])
    return [Seat(tuple(own), seat.units) for own, seat in zip(cpus, seats)]


def _place(core: Core) -> tuple[int, int]:
    return core.node, core.kind


def _seat(room: Room, want: Want) -> Optional[Seat]:
    """A guest's seat, taken from the room: cores of one kind where they suffice, the most capable first."""
    kinds = sorted({core.kind for core in room.ground.cores.values()})
    for pool in [(kind,) for kind in kinds] + ([tuple(kinds)] if len(kinds) > 1 else []):
        seat = _seat_on(room, want, pool)
        if seat is not None:
            return seat
    return None


class _Stock(NamedTuple):
    """What a node has of some kinds: clean cores, how many CPUs each has, and CPUs of other cores."""

    cores: Sequence[Core]
    threads: Sequence[int]
    others: Sequence[int]


def _stocks(room: Room, kinds: tuple[int, ...]) -> dict[int, _Stock]:
    stocks: dict[int, _Stock] = {}
    cores: dict[int, list[Core]] = {}
    others: dict[int, list[int]] = {}
    for number, cpus in room.free.items():
        core = room.ground.cores[number]
        if core.kind not in kinds or not cpus:
            continue
        if number in room.clean:
            cores.setdefault(core.node, []).append(core)
        else:
            others.setdefault(core.node, []).extend(cpus)
    for node in cores.keys() | others.keys():
        own = cores.get(node, [])
        stocks[node] = _Stock(own, [len(room.free[core.number]) for core in own], others.get(node, []))
    return stocks


def _seat_on(room: Room, want: Want, kinds: tuple[int, ...]) -> Optional[Seat]:
    ground = room.ground
    stocks = _stocks(room, kinds)

    def memory(nodes: Nodes) -> int:
        homes = {ground.homes.get(node, node) for node in nodes}
        return sum(room.memory.get(home, 0) for home in homes)

    def cores(nodes: Nodes) -> Optional[int]:
        """How many cores the guest takes of these nodes; None when they are not enough."""
        own = [stocks[node] for node in nodes if node in stocks]
        clean = sum(len(stock.threads) for stock in own)
        if want.cores is not None and (clean < want.cores or want.cores >= want.vcpus):
            return want.cores if clean >= want.cores else None
        threads = sorted((count for stock in own for count in stock.threads), reverse=True)
        if want.shares and want.cores is not None:
            return want.cores if sum(threads) + sum(len(stock.others) for stock in own) >= want.vcpus else None
        if want.cores is not None:
            return want.cores if sum(threads[: want.cores]) >= want.vcpus else None
        held = count = 0
        while held < want.vcpus and count < clean:
            held, count = held + threads[count], count + 1
        return count if held >= want.vcpus else None

    def is_enough(nodes: Nodes) -> bool:
        return memory(nodes) >= want.units and cores(nodes) is not None

    def cost(nodes: Nodes) -> tuple[int, int, Nodes]:
        spare = sum(len(stocks[node].threads) for node in nodes if node in stocks)
        return ground.extent(nodes), -spare if want.spread else spare, nodes

    every = sorted(stocks.keys() | {node for node, units in room.memory.items() if units})
    nodes = fewest_nearest(every, is_enough, cost, ground.distance, least=_least(stocks, want))
    if nodes is None:
        return None
    count = cores(nodes)
    assert count is not None, "nodes that are enough have cores enough"
    cpus = _pick(room, want, {node: stocks[node] for node in nodes if node in stocks}, count)
    for cpu in cpus:
        room.take(cpu)
    return Seat(tuple(cpus), _share_units(room, want, nodes, cpus))


def _least(stocks: Mapping[int, _Stock], want: Want) -> int:
    """How many nodes the guest needs at least, by its cores, or by its vCPUs where their number is open."""
    if want.cores is None:
        needed, sizes = want.vcpus, [sum(stock.threads) for stock in stocks.values()]
    else:
        needed, sizes = want.cores, [len(stock.threads) for stock in stocks.values()]
    sizes.sort(reverse=True)
    least = 0
    while needed > 0 and least < len(sizes):
        needed, least = needed - sizes[least], least + 1
    return least


def _pick(room: Room, want: Want, stocks: Mapping[int, _Stock], count: int) -> Sequence[int]:
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


def _best_cores(room: Room, cores: Sequence[Core], count: int, want: Want, whole: int) -> Sequence[Core]:
    """`count` cores of a node: of the most capable kind, of one package if one has enough, the first of them."""
    sizes = Counter((core.kind, core.package) for core in cores)
    crowded = whole < want.vcpus

    def preference(core: Core) -> tuple[int, ...]:
        size = sizes[core.kind, core.package]
        threads = -len(room.free[core.number]) if crowded else 0
        return core.kind, size < count, size if size >= count else -size, core.package, threads, core.number

    return sorted(sorted(cores, key=preference)[:count], key=lambda core: core.number)


def _share_units(room: Room, want: Want, nodes: Nodes, cpus: Sequence[int]) -> Mapping[int, int]:
    """Memory for a guest, taken from the room: of each node in proportion to its vCPUs, as far as there is enough."""
    ground = room.ground
    weights = Counter(
        ground.homes.get(node, NOWHERE) for node in (ground.cores[ground.core_of[cpu]].node for cpu in cpus)
    )
    homes = sorted({ground.homes.get(node, node) for node in nodes} | weights.keys())
    units = share_units(want.units, weights, {home: room.memory.get(home, 0) for home in homes})
    for home, taken in units.items():
        room.memory[home] -= taken
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
