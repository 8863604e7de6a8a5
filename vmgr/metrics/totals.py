"""Sums of what happened on a node: plain values, and how an event changes them.

An event is a mapping with its kind under `e`:

    ready    the guests of an attempt are ready: `image`, `guests`, `boot_s` (from their first instruction; null for
             guests that had been suspended), `start_s` (from the prologue), `hits` and `misses` of the node's cache of
             images
    failed   an attempt has failed: `code`
    ended    an attempt has ended by itself, or with its job
    reaped   the janitor has removed something: `kinds`, a count for each kind of thing

Events of a kind, or with values, that nobody knows are passed over: another version may have written them.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vmgr.errors import Code

BUCKETS = (1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 300, 600)
"""Upper bounds in seconds; `micro` takes one or two under KVM, a large image under emulation minutes."""

MAX_NAMES = 64
"""So many images, or kinds of things, are told apart; what comes later is counted as `other`."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,79}")
OTHER = "other"


class Totals(NamedTuple):
    """Counts since the node has its spool. A histogram is the counts of its buckets, the last one for all above, then
    the sum of the seconds. `folded` is the id of the last journal in it.
    """

    folded: str = ""
    ready: Mapping[str, int] = {}
    guests: Mapping[str, int] = {}
    failed: Mapping[str, int] = {}
    ended: int = 0
    hits: int = 0
    misses: int = 0
    reaped: Mapping[str, int] = {}
    boot: Mapping[str, tuple[float, ...]] = {}
    start: Mapping[str, tuple[float, ...]] = {}


_EMPTY = (0.0,) * (len(BUCKETS) + 2)


def fold(totals: Totals, events: Iterable[Any]) -> Totals:
    """The totals with these events."""
    for event in events:
        if isinstance(event, dict):
            try:
                totals = _add(totals, event)
            except (KeyError, TypeError, ValueError, OverflowError):
                continue
    return totals


def _add(totals: Totals, event: Mapping[str, Any]) -> Totals:
    kind = event["e"]
    if kind == "ready":
        image, start_s = str(event["image"]), _seconds(event["start_s"])
        boot = totals.boot
        if event["boot_s"] is not None:
            boot = _observed(boot, image, _seconds(event["boot_s"]))
        return totals._replace(
            ready=_more(totals.ready, image, 1),
            guests=_more(totals.guests, image, _count(event["guests"])),
            hits=totals.hits + _count(event["hits"]),
            misses=totals.misses + _count(event["misses"]),
            boot=boot,
            start=_observed(totals.start, image, start_s),
        )
    if kind == "failed":
        return totals._replace(failed=_more(totals.failed, Code.named(event["code"]).text, 1))
    if kind == "ended":
        return totals._replace(ended=totals.ended + 1)
    if kind == "reaped":
        reaped = totals.reaped
        for word, count in dict(event["kinds"]).items():
            reaped = _more(reaped, word, _count(count))
        return totals._replace(reaped=reaped)
    return totals


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise ValueError("no count")
    return value


def _seconds(value: Any) -> float:
    number = float(value)
    if not 0 <= number < 1e9:
        raise ValueError("no time")
    return number


def _known(counts: Mapping[str, Any], name: str) -> str:
    if name in counts or (len(counts) < MAX_NAMES and _NAME.fullmatch(name)):
        return name
    return OTHER


def _more(counts: Mapping[str, int], name: str, count: int) -> dict[str, int]:
    name = _known(counts, name)
    return {**counts, name: counts.get(name, 0) + count}


def _observed(histograms: Mapping[str, tuple[float, ...]], name: str, seconds: float) -> dict[str, tuple[float, ...]]:
    name = _known(histograms, name)
    counts = list(histograms.get(name, _EMPTY))
    counts[bisect_left(BUCKETS, seconds)] += 1
    counts[-1] += seconds
    return {**histograms, name: tuple(counts)}


def from_plain(data: Any) -> Totals:
    """The totals in plain data, as `_asdict` gives it. Raises ValueError for what is none."""
    if not isinstance(data, dict) or set(data) != set(Totals._fields):
        raise ValueError("not the totals of this version")
    for key in ("ready", "guests", "failed", "reaped"):
        if not isinstance(data[key], dict):
            raise ValueError(f"{key} is no table")
        for count in data[key].values():
            _whole(count)
    for key in ("ended", "hits", "misses"):
        _whole(data[key])
    histograms = {}
    for key in ("boot", "start"):
        if not isinstance(data[key], dict):
            raise ValueError(f"{key} is no table")
        histograms[key] = {str(name): _histogram(counts) for name, counts in data[key].items()}
    return Totals(**{**data, **histograms, "folded": str(data["folded"])})


def _whole(value: Any) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")


def _histogram(counts: Any) -> tuple[float, ...]:
    if not isinstance(counts, list) or len(counts) != len(_EMPTY):
        raise ValueError("a histogram with other buckets")
    if not all(isinstance(count, (int, float)) and count >= 0 for count in counts):
        raise ValueError("a histogram with no counts in it")
    return tuple(map(float, counts))
