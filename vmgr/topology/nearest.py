"""The fewest nodes that are enough, and of these the nearest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import Any, Callable, Optional

MAX_SETS = 3000
"""Sets of one size that are all looked at; of more only those are that grow around each node."""

Nodes = tuple[int, ...]


def fewest_nearest(
    nodes: Sequence[int],
    is_enough: Callable[[Nodes], bool],
    cost: Callable[[Nodes], Any],
    distance: Callable[[int, int], int],
    *,
    least: int = 1,
) -> Optional[Nodes]:
    """The smallest set of `nodes` (ascending) that is enough, the one with the least `cost` if there are several.

    `least` is a size that no set is below. None when even all are not enough. The answer is exact up to MAX_SETS sets
    of a size; on machines with more nodes than that it is the best of the sets that consist of a node and the nodes
    nearest to it.
    """
    if not is_enough(tuple(nodes)):
        return None
    for size in range(max(least, 1), len(nodes) + 1):
        if comb(len(nodes), size) > MAX_SETS:
            return _grown(nodes, is_enough, cost, distance)
        enough = [chosen for chosen in combinations(nodes, size) if is_enough(chosen)]
        if enough:
            return min(enough, key=cost)
    return None


def _grown(
    nodes: Sequence[int],
    is_enough: Callable[[Nodes], bool],
    cost: Callable[[Nodes], Any],
    distance: Callable[[int, int], int],
) -> Nodes:
    found = []
    for seed in nodes:
        around = sorted(nodes, key=lambda node: (node != seed, distance(seed, node), node))
        low, high = 1, len(around)
        while low < high:  # more nodes never make it less
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(tuple(sorted(around[:middle]))) else (middle + 1, high)
        found.append(tuple(sorted(around[:low])))
    return min(found, key=lambda chosen: (len(chosen), cost(chosen)))
