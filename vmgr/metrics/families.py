"""The metrics of a node: their names and meanings, and their text for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Union

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from vmgr import __version__
from vmgr.errors import Code
from vmgr.metrics.live import Live
from vmgr.metrics.totals import BUCKETS, Totals
from vmgr.node.reap import KINDS

Family = Union[CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily]

STATES = (
    "starting", "staging", "booting", "ready", "running", "off", "returning", "suspended", "ending", "ended", "failed",
)  # fmt: skip
"""The states that an agent tells (`vmgr.node.state.Progress`), and that of guests that are switched off; another one is
shown when it comes.
"""


class Metric(NamedTuple):
    """One metric: `kind` is counter, gauge or histogram; `name` that of its samples, of a histogram what comes before
    `_bucket`, `_sum` and `_count`.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str


METRICS = (
    Metric("vtorque_build_info", "gauge", ("version",), "always 1; the version that is installed"),
    Metric("vtorque_kvm_works", "gauge", (), "whether KVM starts a kernel here; absent until it has been tried"),
    Metric("vtorque_guests", "gauge", ("state",), "guests on the node"),
    Metric("vtorque_guest_vcpus", "gauge", (), "vCPUs of these guests, but for failed and ended ones"),
    Metric("vtorque_guest_ram_bytes", "gauge", (), "RAM of the same guests"),
    Metric("vtorque_agents_silent", "gauge", (), "attempts whose agent is there and did not answer"),
    Metric("vtorque_attempts_dead", "gauge", (), "attempts without an agent, which `vmgr node reap` removes"),
    Metric("vtorque_overlay_reserved_bytes", "gauge", (), "what the guests' overlays may grow to"),
    Metric("vtorque_overlay_limit_bytes", "gauge", (), "`images.overlays_max`"),
    Metric("vtorque_ramdisk_reserved_bytes", "gauge", (), "what the guests' ramdisks may grow to"),
    Metric("vtorque_ramdisk_limit_bytes", "gauge", (), "`images.ramdisk_max`"),
    Metric("vtorque_image_cache_bytes", "gauge", (), "size of the node's copies of images; absent without a cache"),
    Metric("vtorque_image_cache_limit_bytes", "gauge", (), "`images.cache.max`; absent without a cache"),
    Metric("vtorque_attempts_ready_total", "counter", ("image",), "attempts whose guests on this node became ready"),
    Metric("vtorque_guests_ready_total", "counter", ("image",), "guests that became ready"),
    Metric("vtorque_attempts_ended_total", "counter", (), "attempts that came to their end without a failure"),
    Metric("vtorque_failures_total", "counter", ("code",), "attempts that failed, by the code of `vmgr errors`"),
    Metric("vtorque_image_cache_hits_total", "counter", (), "files of images that were in the node's cache"),
    Metric("vtorque_image_cache_misses_total", "counter", (), "files of images that had to be copied there"),
    Metric("vtorque_reaped_total", "counter", ("kind",), "things that `vmgr node reap` removed"),
    Metric("vtorque_boot_seconds", "histogram", ("image",), "from a guest's first instruction to ready"),
    Metric("vtorque_start_seconds", "histogram", ("image",), "from the job's prologue to ready guests on this node"),
)  # fmt: skip
"""Everything that `vmgr metrics` tells. A name, once given, keeps its meaning."""

_BY_NAME = {metric.name: metric for metric in METRICS}


def text(totals: Totals, live: Live) -> bytes:
    """The metrics in Prometheus's text format 0.0.4."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Node(totals, live))
    return generate_latest(registry)


class _Node(Collector):
    def __init__(self, totals: Totals, live: Live) -> None:
        self._totals = totals
        self._live = live

    def collect(self) -> Iterator[Family]:
        yield from families(self._totals, self._live)


def families(totals: Totals, live: Live) -> Iterator[Family]:
    """All metrics that have a value."""
    yield _labelled("vtorque_build_info", {__version__: 1})
    if live.kvm is not None:
        yield _plain("vtorque_kvm_works", int(live.kvm))
    yield _labelled("vtorque_guests", {**dict.fromkeys(STATES, 0), **live.guests})
    yield _plain("vtorque_guest_vcpus", live.vcpus)
    yield _plain("vtorque_guest_ram_bytes", live.ram_mib << 20)
    yield _plain("vtorque_agents_silent", live.silent)
    yield _plain("vtorque_attempts_dead", live.dead)
    rooms = [("vtorque_overlay_reserved_bytes", "vtorque_overlay_limit_bytes", live.overlays)]
    rooms.append(("vtorque_ramdisk_reserved_bytes", "vtorque_ramdisk_limit_bytes", live.ramdisks))
    if live.cache is not None:
        rooms.append(("vtorque_image_cache_bytes", "vtorque_image_cache_limit_bytes", live.cache))
    for used, most, room in rooms:
        yield _plain(used, room.used)
        yield _plain(most, room.most)
    yield _labelled("vtorque_attempts_ready_total", totals.ready)
    yield _labelled("vtorque_guests_ready_total", totals.guests)
    yield _plain("vtorque_attempts_ended_total", totals.ended)
    codes = {code.text: 0 for code in Code if code.status >= 70}
    yield _labelled("vtorque_failures_total", {**codes, **totals.failed})
    yield _plain("vtorque_image_cache_hits_total", totals.hits)
    yield _plain("vtorque_image_cache_misses_total", totals.misses)
    yield _labelled("vtorque_reaped_total", {**dict.fromkeys(KINDS, 0), **totals.reaped})
    yield _histogram("vtorque_boot_seconds", totals.boot)
    yield _histogram("vtorque_start_seconds", totals.start)


def _plain(name: str, value: float) -> Family:
    family = _family(_BY_NAME[name])
    family.add_metric((), value)
    return family


def _labelled(name: str, values: Mapping[str, float]) -> Family:
    family = _family(_BY_NAME[name])
    for label, value in sorted(values.items()):
        family.add_metric((label,), value)
    return family


def _family(metric: Metric) -> Union[CounterMetricFamily, GaugeMetricFamily]:
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(metric.name, metric.meaning.replace("`", ""), labels=metric.labels)


def _histogram(name: str, values: Mapping[str, Sequence[float]]) -> Family:
    metric = _BY_NAME[name]
    family = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
    for label, counts in sorted(values.items()):
        buckets, so_far = [], 0.0
        for bound, count in zip((*map(str, map(float, BUCKETS)), "+Inf"), counts):
            so_far += count
            buckets.append((bound, so_far))
        family.add_metric((label,), buckets, sum_value=counts[-1])
    return family
