"""The event port between node and guest: one JSON object a line, version 1. What comes from the guest is hostile."""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import json
import re
import socket
from collections.abc import AsyncIterator, Iterable
from typing import NamedTuple, Optional

VERSION = 1
MAX_LINE_BYTES = 16 * 1024
MAX_EVENTS = 1000
ANSWERS, EVENTS_OF_A_BOOT = 4, 32
"""What a guest may say more because it has got an order, or boots once more."""
MAX_OUTPUT_CHARS = 4096
MAX_STRETCHES = 16
MAX_UPTIME_SECONDS = 1e9
THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")


class Stretch(NamedTuple):
    """Something that took the guest its time: from so many seconds before the event until so many before it."""

    name: str
    start_ago: float
    end_ago: float


class Event(NamedTuple):
    """One event of a guest's. `status` is an exit status where the event has one, `text` its output or reason.

    `address` is the IPv4 address that the guest says it has, one that a single host can have; else None. `stretches`
    is what it says of its boot: `uptime`, since the kernel's start, and what it names itself.
    """

    name: str
    status: int
    text: str
    address: Optional[str] = None
    stretches: tuple[Stretch, ...] = ()


def parse_event(line: bytes) -> Optional[Event]:
    """The event in a line, None for anything that is none."""
    try:
        data = json.loads(line)
        if not isinstance(data, dict) or data.get("v") != VERSION or not isinstance(data.get("event"), str):
            return None
        text = data.get("output", data.get("reason", ""))
        decoded = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (ValueError, RecursionError, binascii.Error):
        return None
    status = data.get("status", 0)
    if type(status) is not int or not 0 <= status <= 255:
        status = 255
    output = decoded.decode("utf-8", "replace")[-MAX_OUTPUT_CHARS:]
    stretches = parse_stretches(data.get("uptime"), data.get("spans"))
    return Event(data["event"][:32], status, output, host_address(data.get("address")), stretches)


def parse_stretches(uptime: object, spans: object) -> tuple[Stretch, ...]:
    """What took how long, of `uptime` seconds and a list of name, start and end, each in seconds of uptime.

    Without an uptime there is nothing; what of the list is none of this is left out.
    """
    now = _seconds(uptime)
    if now is None:
        return ()
    found = [Stretch("uptime", now, 0.0)]
    for span in spans[:MAX_STRETCHES] if isinstance(spans, list) else ():
        if isinstance(span, list) and len(span) == 3 and isinstance(span[0], str):
            start, end = _seconds(span[1]), _seconds(span[2])
            if re.fullmatch(r"[a-z][a-z0-9 .-]{0,39}", span[0]) and start is not None and end is not None:
                end = min(end, now)
                found.append(Stretch(span[0], now - min(start, end), now - end))
    return tuple(found)


def _seconds(number: object) -> Optional[float]:
    if type(number) in (int, float) and 0 <= number <= MAX_UPTIME_SECONDS:  # type: ignore[operator]
        return float(number)  # type: ignore[arg-type]
    return None


def host_address(text: object) -> Optional[str]:
    """`text` where it is the IPv4 address of a host other than the reader itself, else None."""
    try:
        address = ipaddress.IPv4Address(text if isinstance(text, str) else "")
    except ValueError:
        return None
    if address in THIS_NETWORK or address.is_loopback or address.is_multicast or address.is_reserved:
        return None
    return str(address)


class GuestPort:
    """The node's end of the port."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._left = MAX_EVENTS

    @classmethod
    async def open(cls, connected: socket.socket) -> GuestPort:
        return cls(*await asyncio.open_unix_connection(sock=connected, limit=MAX_LINE_BYTES))

    async def events(self) -> AsyncIterator[Event]:
        """Events until the guest ends, at most as many as a guest can have reason to send."""
        while self._left > 0:
            self._left -= 1
            try:
                line = await self._reader.readline()
            except (ValueError, OSError):
                return
            if not line:
                return
            event = parse_event(line)
            if event is not None:
                yield event

    def expect(self, more: int) -> None:
        """Let the guest say so much more, up to MAX_EVENTS from now on."""
        self._left = min(MAX_EVENTS, self._left + more)

    def send(self, op: str, **members: object) -> None:
        """Order `op` of the guest, with what `members` say; nothing is waited for, and a dead guest is no error."""
        self.expect(ANSWERS)
        try:
            self._writer.write(json.dumps({"v": VERSION, "op": op, **members}).encode() + b"\n")
        except (OSError, RuntimeError):
            pass

    def send_hosts(self, hosts: Iterable[tuple[str, str]]) -> None:
        """Tell the guest address and name of every guest of the job, for which it waits after its event `up`."""
        lines = "".join(f"{address} {name}\n" for address, name in hosts)
        self.send("hosts", hosts=base64.b64encode(lines.encode()).decode())

    def close(self) -> None:
        self._writer.close()
