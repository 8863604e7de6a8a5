"""Ports for servers that cannot be given a listening socket."""

from __future__ import annotations

import contextlib
import random
import socket

BELOW_EPHEMERAL = range(10000, 32768)
"""The kernel gives none of these to a client (net.ipv4.ip_local_port_range), so one that is free now stays free."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has, for TCP and for UDP."""
    while True:
        port = random.choice(BELOW_EPHEMERAL)
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                opened.enter_context(socket.socket(type=kind)).bind(("127.0.0.1", port))
            return port
