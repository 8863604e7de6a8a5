"""Addresses of guests on the site's bridge that do not come from DHCP: from the site's program, or from a pool."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv4Interface
from typing import NamedTuple, Optional, Union

from vmgr.errors import Code, VTorqueError
from vmgr.netfields import parse_range
from vmgr.node.process import dies_with
from vmgr.trust import check_trusted

MAX_OUTPUT_BYTES = 4096
COMMAND_SECONDS = 10.0
"""For all guests of a node together."""

_LINE = re.compile(r"([0-9.]{7,15}/[0-9]{1,2})(?:[ \t]+([0-9.]{7,15}))?")


class Lease(NamedTuple):
    """A guest's address with its prefix length, and its router where that is known from here."""

    address: str
    gateway: Optional[str]


def parse_lease(output: bytes) -> Lease:
    """What the site's program prints: one line, `address/prefix` and perhaps a router in that network.

    Raises ValueError.
    """
    found = _LINE.fullmatch(output.decode("ascii", "replace").strip(" \t\r\n"))
    if found is None:
        raise ValueError("one line `address/prefix [gateway]` is needed")
    interface = IPv4Interface(found[1])
    network = interface.network
    ends = (network.network_address, network.broadcast_address) if network.prefixlen < 31 else ()
    unusable = interface.is_loopback or interface.is_multicast or interface.is_unspecified
    if network.prefixlen == 0 or interface.ip in ends or unusable:
        raise ValueError(f"{found[1]} is no address of a host")
    gateway = IPv4Address(found[2]) if found[2] else None
    if gateway is not None and (gateway not in network or gateway == interface.ip):
        raise ValueError(f"the gateway {gateway} is not another host in {network}")
    return Lease(str(interface), None if gateway is None else str(gateway))


def ask(command: str, node: str, guests: int) -> Sequence[Lease]:
    """Run the site's program, as root, for each guest of a node. Raises VTorqueError (VT-NODE, VT-TRUST)."""
    check_trusted(command)
    deadline = time.monotonic() + COMMAND_SECONDS
    return [_ask(command, [node, str(guests), str(number)], deadline) for number in range(1, guests + 1)]


def _ask(command: str, arguments: list[str], deadline: float) -> Lease:
    called = " ".join(arguments)
    try:
        child = subprocess.Popen(
            [command, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd="/", env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            start_new_session=True, preexec_fn=dies_with(os.getpid()),
        )  # fmt: skip
    except OSError as err:
        raise _failed(command, f"cannot be run: {err.strerror}") from None
    assert child.stdout is not None
    with child.stdout:
        try:
            output = _read(child.stdout.fileno(), deadline)
            status = child.wait(max(0.0, deadline - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            raise _failed(command, f"({called}) does not end within {COMMAND_SECONDS:g} s") from None
        except ValueError as err:
            raise _failed(command, f"({called}) {err}") from None
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)  # what it left running, too
            except ProcessLookupError:
                pass
            child.wait()
    if status:
        raise _failed(command, f"({called}) ends with status {status}")
    try:
        return parse_lease(output)
    except ValueError as err:
        raise _failed(command, f"({called}): {err}") from None


def _read(fd: int, deadline: float) -> bytes:
    """All that a program prints. Raises TimeoutError, and ValueError when it is too much."""
    output = b""
    while True:
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        part = os.read(fd, MAX_OUTPUT_BYTES + 1)
        output += part
        if len(output) > MAX_OUTPUT_BYTES:
            raise ValueError(f"prints more than {MAX_OUTPUT_BYTES} bytes")
        if not part:
            return output


def _failed(command: str, what: str) -> VTorqueError:
    return VTorqueError(f"{command} (network.bridge.command) {what}", code=Code.NODE, hint="ask the administrator")


def from_pool(
    pool: Union[str, dict[str, str], None], gateway: Optional[str], node: str, count: int, used: Collection[str]
) -> Sequence[Lease]:
    """The first `count` addresses for guests of a node that are not in `used` (without prefix length).

    Raises VTorqueError (VT-NODE).
    """
    if isinstance(pool, dict):
        pool = next((pool[pattern] for pattern in pool if fnmatchcase(node, pattern)), None)
    if pool is None:
        raise VTorqueError(f"network.bridge.pool has no addresses for {node}", code=Code.NODE)
    first, last, prefix = parse_range(pool)
    found: list[Lease] = []
    for number in range(int(first), int(last) + 1):
        address = str(IPv4Address(number))
        if len(found) < count and address not in used and address != gateway:
            found.append(Lease(f"{address}/{prefix}", gateway))
        if len(found) == count:
            return found
    raise VTorqueError(
        f"of the addresses {pool} (network.bridge.pool) only {len(found)} are free for {count} guests", code=Code.NODE,
        hint="wait for another job's end, or ask for fewer guests",
    )  # fmt: skip
