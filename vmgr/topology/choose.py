"""The CPUs of a node's guests: several ways to seat them, of which the rules (docs/placement.md) choose the best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Optional

from vmgr.topology.nearest import Nodes, fewest_nearest
from vmgr.topology.pick import Stock, Want, pick_cpus, take_memory
from vmgr.topology.room import Core, Ground, Room


class Seat(NamedTuple):
    """A guest's CPUs, one for each vCPU in no order yet, and the units of memory that it has of each node."""

    cpus: tuple[int, ...]
    units: Mapping[int, int]


def seat_guests(
    ground: Ground, free: Mapping[int, Sequence[int]], clean: frozenset[int], guests: int, vcpus: int, units: int
) -> Sequence[Seat]:
    """Seats for guests that are all alike; there must be CPUs and memory for all of them."""
    best: Optional[tuple[tuple[int, ...], Sequence[Seat]]] = None
    for wants in _ways(clean, guests, vcpus, units):
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


def _ways(clean: frozenset[int], guests: int, vcpus: int, units: int) -> Iterator[Sequence[Want]]:
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
    ground = room.ground
    guests = [list(seat.cpus) for seat in seats]
    spare: dict[tuple[int, int], list[int]] = {}
    for number in sorted(room.clean & room.free.keys(), reverse=True):
        core = ground.cores[number]
        spare.setdefault((core.node, core.kind), []).append(number)

    def spare_for(cpu: int) -> list[int]:
        core = ground.cores[ground.core_of[cpu]]
        return spare.get((core.node, core.kind), [])

    going = guests
    while going:
        still = []
        for cpus in going:
            load = Counter(ground.core_of[cpu] for cpu in cpus)
            crowded = [cpu for cpu in cpus if load[ground.core_of[cpu]] > 1 and spare_for(cpu)]
            if crowded:
                taken = room.free[spare_for(crowded[-1]).pop()][0]
                room.take(taken)
                cpus.remove(crowded[-1])
                cpus.append(taken)
                still.append(cpus)
        going = still
    return [Seat(tuple(cpus), seat.units) for cpus, seat in zip(guests, seats)]


def _seat(room: Room, want: Want) -> Optional[Seat]:
    """A guest's seat, taken from the room: cores of one kind where they suffice, the most capable first."""
    kinds = sorted({core.kind for core in room.ground.cores.values()})
    for pool in [(kind,) for kind in kinds] + ([tuple(kinds)] if len(kinds) > 1 else []):
        seat = _seat_on(room, want, pool)
        if seat is not None:
            return seat
    return None


def _stocks(room: Room, kinds: tuple[int, ...]) -> dict[int, Stock]:
    stocks: dict[int, Stock] = {}
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
        stocks[node] = Stock(own, [len(room.free[core.number]) for core in own], others.get(node, []))
    return stocks


def _seat_on(room: Room, want: Want, kinds: tuple[int, ...]) -> Optional[Seat]:
    ground = room.ground
    stocks = _stocks(room, kinds)

    def memory(nodes: Nodes) -> int:
        return sum(room.memory.get(node, 0) for node in nodes)

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
    cpus = pick_cpus(room, want, {node: stocks[node] for node in nodes if node in stocks}, count)
    for cpu in cpus:
        room.take(cpu)
    return Seat(tuple(cpus), take_memory(room, want, nodes, cpus))


def _least(stocks: Mapping[int, Stock], want: Want) -> int:
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
