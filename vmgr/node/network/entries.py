"""Many entries at a time in the kernel's tables of neighbours: netlink messages written by hand.

A job of 1,000 nodes with 16 guests each has 33,000 of them on every node. pyroute2 waits for the answer to each,
0.35 ms; the kernel itself takes a few microseconds. Numbers are those of <linux/netlink.h>, <linux/rtnetlink.h> and
<linux/neighbour.h>.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Sequence

_HEADER = struct.Struct("=IHHII")
_NEIGHBOUR = struct.Struct("=BxxxiHBx")
_MAC, _IPV4 = struct.Struct("=HH6sxx"), struct.Struct("=HH4s")
_ERROR = struct.Struct("=i")
_BYTES = _HEADER.size + _NEIGHBOUR.size + _MAC.size + _IPV4.size

_NLMSG_ERROR, _RTM_NEWNEIGH = 2, 28
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_CREATE, _NLM_F_APPEND = 0x1, 0x4, 0x400, 0x800
_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_NOARP, _NUD_PERMANENT, _NTF_SELF = 0x40, 0x80, 0x2
_SOL_NETLINK, _NETLINK_CAP_ACK = 270, 10

_BATCH = 1024
"""Messages in one request; all their errors fit into a socket's buffer."""
_ANSWER_BYTES = 1 << 16

_EVERYBODY = bytes(6)
"""The entry of a VXLAN link for what has no entry of its own, broadcast included (`bridge(8)`)."""


def lead(link: int, guests: Iterable[tuple[str, str, str]], peers: Iterable[str]) -> None:
    """Tell a VXLAN link, by its number, which guests there are behind it, and all nodes, to which broadcasts go.

    A guest is its MAC address, its own address and its node's. Acts in the calling thread's network namespace.
    Raises OSError.
    """
    places, neighbours = [], []
    for mac, address, node in guests:
        raw = bytes.fromhex(mac.replace(":", ""))
        places.append(_place(link, raw, node))
        neighbours.append(_entry(link, socket.AF_INET, _NUD_PERMANENT, 0, raw, address))
    _send([*places, *(_place(link, _EVERYBODY, peer) for peer in peers), *neighbours])


def _place(link: int, mac: bytes, node: str) -> bytes:
    return _entry(link, socket.AF_BRIDGE, _NUD_NOARP | _NUD_PERMANENT, _NTF_SELF, mac, node)


def _entry(link: int, family: int, state: int, flags: int, mac: bytes, address: str) -> bytes:
    """A message without its header."""
    return (
        _NEIGHBOUR.pack(family, link, state, flags)
        + _MAC.pack(_MAC.size - 2, _NDA_LLADDR, mac)
        + _IPV4.pack(_IPV4.size, _NDA_DST, socket.inet_aton(address))
    )


def _send(messages: Sequence[bytes]) -> None:
    """Have the kernel add all entries. It answers each error, and the last of a batch in any case."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        kernel.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        kernel.bind((0, 0))
        for start in range(0, len(messages), _BATCH):
            batch = messages[start : start + _BATCH]
            last = len(batch) - 1
            kernel.send(b"".join(_header(number, number == last) + message for number, message in enumerate(batch)))
            _await_answer(kernel, last)


def _header(number: int, wants_answer: bool) -> bytes:
    flags = _NLM_F_REQUEST | _NLM_F_CREATE | _NLM_F_APPEND | (_NLM_F_ACK if wants_answer else 0)
    return _HEADER.pack(_BYTES, _RTM_NEWNEIGH, flags, number, 0)


def _await_answer(kernel: socket.socket, last: int) -> None:
    """Read answers until that to message `last`. Raises OSError for the first that is an error."""
    while True:
        answer = kernel.recv(_ANSWER_BYTES)
        while answer:
            size, kind, _, number, _ = _HEADER.unpack_from(answer)
            if kind != _NLMSG_ERROR or not _HEADER.size <= size <= len(answer):
                raise OSError(errno.EBADMSG, "the kernel answers something else to new neighbours")
            (code,) = _ERROR.unpack_from(answer, _HEADER.size)
            if code:
                raise OSError(-code, f"a neighbour cannot be added: {os.strerror(-code)}")
            if number == last:
                return
            answer = answer[(size + 3) & ~3 :]
