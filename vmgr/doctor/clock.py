"""Whether the node's clocks can be trusted: attempts are told apart by the time since the boot, seeds by the date."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from typing import NamedTuple, Optional

from vmgr.doctor.finding import Finding, Level, Node, finder

BEFORE = 1_700_000_000
"""No clock that is right shows a time before vTorque was written (2023-11-14)."""

_find = finder("clock")
_UNSYNCHRONISED = 0x40
"""STA_UNSYNC of <linux/timex.h>; `status` stands 40 bytes into `struct timex` on 64-bit Linux (adjtimex(2))."""
_STATUS_AT, _TIMEX_BYTES = 40, 512


class Clocks(NamedTuple):
    """Seconds: the date, and since the boot with and without what the machine slept; `booted` is the boot's date by the
    kernel. `synchronised` is None where the kernel does not say.
    """

    date: float
    since_boot: float
    awake: float
    booted: Optional[int]
    synchronised: Optional[bool]


def check(node: Node) -> Iterator[Finding]:
    yield from judge(read(node))


def read(node: Node) -> Clocks:
    lines = (node.tree.text("proc/stat") or "").splitlines()
    booted = next((line.split()[1] for line in lines if line.startswith("btime ")), "")
    return Clocks(
        time.time(),
        time.clock_gettime(time.CLOCK_BOOTTIME),
        time.monotonic(),
        int(booted) if booted.isdigit() else None,
        _is_synchronised(),
    )


def _is_synchronised() -> Optional[bool]:
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)
    if ctypes.CDLL(None, use_errno=True).adjtimex(timex) < 0:
        return None
    return not int.from_bytes(timex.raw[_STATUS_AT : _STATUS_AT + 4], "little") & _UNSYNCHRONISED


def judge(clocks: Clocks) -> Iterator[Finding]:
    remedy = "set the clock, and keep it by NTP"
    if clocks.date < BEFORE:
        shown = time.strftime("%Y-%m-%d", time.gmtime(clocks.date))
        yield _find(Level.FAILURE, f"the date is {shown}", remedy)
        return
    if clocks.synchronised is False:
        yield _find(Level.NOTE, "the kernel's clock is not kept by NTP", remedy)
    if clocks.since_boot - clocks.awake > 60:
        slept = round(clocks.since_boot - clocks.awake)
        what = f"the node has slept for {slept} s since its boot: its guests' clocks were behind then"
        yield _find(Level.NOTE, what, "keep nodes with guests from going to sleep")
    if clocks.booted is not None and abs(clocks.date - clocks.since_boot - clocks.booted) > 5:
        yield _find(Level.NOTE, "the clock was set while the node ran", "restart what keeps times by the date")
    days = clocks.since_boot / 86400
    yield _find(Level.OK, f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(clocks.date))} UTC, {days:.1f} days up")
