"""A job's network on one node: made, used and taken away by the node's agent, as root.

A network of the job's own lives in a network namespace without a name, held only by descriptors: the agent's, and
QEMU's of the taps. When those are gone the kernel removes all of it. What lies in the node's own namespace stands in
the record before it is made.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Callable, Optional, TypeVar

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.logs import LOGGER
from vmgr.netfields import parse_ports
from vmgr.node import record
from vmgr.node.network.plan import NetworkPlan
from vmgr.node.network.relay import Relay

if TYPE_CHECKING:
    from vmgr.node.network.build import Built

_T = TypeVar("_T")


async def connect(plan: NetworkPlan, index: int, nodes: Sequence[str], config: Config, place: record.Place) -> Wires:
    """Make the network of a job for the guests of node `index` of `nodes`.

    Raises VTorqueError: VT-NODE when this node refuses, VT-STAGE when something cannot be made. Then nothing is left,
    or it is logged and stands in the record.
    """
    guests = len(plan.own(index))
    if plan.kind == "user":
        return Wires(config, guests)
    from vmgr.node.network.build import Builder  # the common job has no such network

    worker = Worker()
    stack = ExitStack()
    try:
        built = await worker.do(Builder(plan, index, nodes, config, place, stack).build)
    except BaseException:
        try:
            await worker.do(stack.close)
        except OSError as err:
            LOGGER.error("of a network that could not be made is left: %s", err)
        finally:
            worker.end()
        raise
    return Wires(config, guests, worker, built, stack)


class Worker:
    """A thread of its own, which may go into other network namespaces."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="network")

    async def do(self, work: Callable[[], _T]) -> _T:
        """Do something in the thread. When this is cancelled the work is still waited for."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    def end(self) -> None:
        self._pool.shutdown(wait=True)


class Wires:
    """A job's network on one node.

    `taps` has a descriptor for each of the node's guests, by their number, none at all for QEMU's own networking;
    `close` closes them. `addresses` are those that the bridge's guests have other than by DHCP, with prefix lengths,
    and `gateways` their routers. `mtu` is what guests may send, None where they need not be told. `ssh_ports` are the
    ports, by number of the guest, on which `forward` listens to the outside.
    """

    def __init__(
        self,
        config: Config,
        guests: int,
        worker: Optional[Worker] = None,
        built: Optional[Built] = None,
        stack: Optional[ExitStack] = None,
    ) -> None:
        leases = [None] * guests if built is None else built.leases
        self.taps = () if built is None else built.taps
        self.mtu = None if built is None else built.mtu
        self.addresses: list[Optional[str]] = [lease and lease.address for lease in leases]
        self.gateways: list[Optional[str]] = [lease and lease.gateway for lease in leases]
        self.ssh_ports: dict[int, int] = {}
        self._guests = guests
        self._namespace = None if built is None else built.namespace
        self._outside = parse_ports(config.network.job.ssh_ports) if config.network.job.ssh_ports else range(0)
        self._worker = worker
        self._stack = stack
        self._relays: list[Relay] = []

    async def forward(self, number: int, address: str) -> int:
        """Listen on a free port of 127.0.0.1, which is given, for connections to SSH of guest `number` at `address`.

        In a network of the job's own also on a free port of `network.job.ssh_ports`, on all of the node's addresses.
        Raises VTorqueError (VT-NODE).
        """
        relay = Relay(str(IPv4Address(address.partition("/")[0])), self._socket, self._guests)
        self._relays.append(relay)
        try:
            port = await relay.listen("127.0.0.1", 0)
        except OSError as err:
            raise VTorqueError(f"no port for the guest's SSH: {err}", code=Code.NODE) from None
        if self._namespace is not None and self._outside:
            self.ssh_ports[number] = await self._listen_outside(relay)
        return port

    async def _listen_outside(self, relay: Relay) -> int:
        for port in self._outside:
            try:
                return await relay.listen("0.0.0.0", port)
            except OSError:
                continue  # somebody has it
        raise VTorqueError(
            f"no port from {self._outside[0]} to {self._outside[-1]} (network.job.ssh_ports) is free", code=Code.NODE
        )

    async def _socket(self) -> socket.socket:
        make = functools.partial(socket.socket, socket.AF_INET, socket.SOCK_STREAM)
        if self._namespace is None:
            return make()
        if self._worker is None:
            raise OSError("the network is closed")
        namespace = self._namespace

        def there() -> socket.socket:
            from vmgr.node.network.links import inside

            with inside(namespace):
                return make()

        return await self._worker.do(there)

    async def close(self) -> None:
        """Take everything away; idempotent. Raises VTorqueError (VT-STAGE); the record still names what is left."""
        relays, self._relays = self._relays, []
        await asyncio.gather(*(relay.close() for relay in relays))
        worker, stack, self._worker, self._stack = self._worker, self._stack, None, None
        self.taps = ()
        if worker is None or stack is None:
            return
        try:
            await worker.do(stack.close)
        except OSError as err:
            raise VTorqueError(f"the job's network is not all gone: {err}", code=Code.STAGE) from None
        finally:
            worker.end()
