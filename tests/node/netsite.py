"""Nodes and guests for tests of networks: network namespaces, and frames made by hand."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Optional, TypeVar

from vmgr.config import Config
from vmgr.node import record
from vmgr.node.network import links, nft
from vmgr.node.network.plan import NetworkPlan, plan_network
from vmgr.node.network.wires import Wires, connect
from vmgr.schema import check_config

T = TypeVar("T")

BROADCAST = "ff:ff:ff:ff:ff:ff"
ARP, IPV4, IPV6, VLAN = 0x0806, 0x0800, 0x86DD, 0x8100
ICMP, TCP, UDP = 1, 6, 17
VNET_HEADER = bytes(10)


class Node:
    """A network namespace with a thread in it that runs an event loop, as an agent on a node does."""

    def __init__(self, name: str, base: Path, **network: Any) -> None:
        self.name = name
        self.address = f"10.66.0.{name[1:]}"
        tree = {"paths": {"spool": f"{base}/{name}s", "run": f"{base}/{name}"}, "network": network}
        self.config = Config("x", check_config(tree), {})
        self.namespace = links.new_namespace()
        self._locks: list[tuple[int, socket.socket]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._live)
        self._thread.start()

    def _live(self) -> None:
        with links.inside(self.namespace):
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def do(self, work: Callable[[], T]) -> T:
        """Call something in the node's namespace."""

        async def call() -> T:
            return work()

        return self.run(call())

    def place(self, job: str) -> record.Place:
        """The place of a new attempt, held."""
        place = record.new_place(self.config.paths, job)
        self._locks.append(record.create(place, {}))
        return place

    def end_attempts(self) -> None:
        """As when the agents die: nobody holds the attempts' locks."""
        for lock, listener in self._locks:
            os.close(lock)
            listener.close()
        self._locks.clear()

    def wire(self, plan: NetworkPlan, nodes: Sequence[str], place: Optional[record.Place] = None) -> Wires:
        place = place or self.place(f"{len(self._locks)}.s")
        return self.run(connect(plan, nodes.index(self.name), nodes, self.config, place))

    def tables(self) -> set[str]:
        return self.do(lambda: nft.names("inet") | nft.names("netdev"))

    def links(self) -> set[str]:
        return self.do(lambda: {name for _, name in socket.if_nameindex()}) - {"lo", "eth0"}

    def close(self) -> None:
        self.end_attempts()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        os.close(self.namespace)


@contextmanager
def cluster(base: Path, names: Sequence[str], **network: Any) -> Iterator[list[Node]]:
    """Nodes on a switch of their own."""
    with ExitStack() as stack:
        switch = links.new_namespace()
        stack.callback(os.close, switch)
        nodes = []
        for name in names:
            nodes.append(Node(name, base, **network))
            stack.callback(nodes[-1].close)
        in_thread(lambda: _plug(switch, nodes))
        yield nodes


def _plug(switch: int, nodes: Sequence[Node]) -> None:
    with links.inside(switch), links.netlink() as ip:
        ip.link("add", ifname="switch", kind="bridge")
        bridge = links.index_of(ip, "switch")
        links.up(ip, bridge)
        for node in nodes:
            ip.link("add", ifname=node.name, kind="veth", peer={"ifname": "eth0", "net_ns_fd": node.namespace})
            links.up(ip, links.index_of(ip, node.name), master=bridge)
    for node in nodes:
        with links.inside(node.namespace), links.netlink() as ip:
            links.up(ip, links.index_of(ip, "lo"))
            eth0 = links.index_of(ip, "eth0")
            ip.addr("add", index=eth0, address=node.address, prefixlen=24)
            links.up(ip, eth0)


def in_thread(work: Callable[[], T]) -> T:
    """Call something in a thread of its own: no event loop, and it may go where it wants."""
    found: list[T] = []
    failed: list[BaseException] = []

    def call() -> None:
        try:
            found.append(work())
        except BaseException as err:
            failed.append(err)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def plan_for(node: Node, job: str, nodes: Sequence[str], per_node: int = 2, kind: str = "job") -> NetworkPlan:
    return plan_network(kind, job, nodes, per_node, node.config.network)


# frames


def send(tap: int, frame: bytes, header: bytes = VNET_HEADER) -> None:
    os.write(tap, header + frame)


def open_checksum(start: int, offset: int) -> bytes:
    """The header of a frame in which the checksum of all from `start` is still to be written, at `start + offset`.

    VIRTIO_NET_HDR_F_NEEDS_CSUM of <linux/virtio_net.h>.
    """
    return struct.pack("=BBHHHH", 1, 0, 0, 0, start, offset)


def adjust(frame: bytes, start: int, checksum_wanted: int) -> bytes:
    """The frame with two bytes more, by which the checksum of all from `start` is the wanted one."""
    total = (~checksum_wanted & 0xFFFF) + checksum(frame[start:])
    return frame + struct.pack("!H", (total & 0xFFFF) + (total >> 16))


def offload_checksums(name: str, there: bool) -> None:
    """Whether a link leaves checksums to what comes behind it (ETHTOOL_STXCSUM), as a network card would write them."""
    value = array.array("I", (0x17, there))
    with socket.socket() as link:
        fcntl.ioctl(link, 0x8946, struct.pack("16sP16x", name.encode(), value.buffer_info()[0]))


def until(taps: Sequence[int], last: bytes, timeout_s: float = 10) -> list[bytes]:
    """What comes out of taps until a frame that ends with `last` has come out of each."""
    seen: list[bytes] = []
    for tap in taps:
        deadline = time.monotonic() + timeout_s
        while not seen or not seen[-1].endswith(last):
            readable, _, _ = select.select([tap], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"{last!r} does not come; {[frame.hex() for frame in seen]} came"
            seen.append(os.read(tap, 65536)[len(VNET_HEADER) :])
        seen.append(b"")
    return seen


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ethernet(source: str, target: str, kind: int, body: bytes) -> bytes:
    return mac(target) + mac(source) + struct.pack("!H", kind) + body


def arp(source: str, sender: str, address: str, wanted: str, operation: int = 1) -> bytes:
    """A request from a frame with MAC `source`, that speaks for `sender` and `address`."""
    body = struct.pack("!HHBBH", 1, IPV4, 6, 4, operation) + mac(sender) + socket.inet_aton(address)
    return ethernet(source, BROADCAST, ARP, body + bytes(6) + socket.inet_aton(wanted))


def ipv4(source: str, target: str, protocol: int, body: bytes, fragment: int = 0) -> bytes:
    """A packet, or a fragment: `fragment` is its place in units of 8 bytes, and 0x2000 when more follow."""
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 7, fragment, 64, protocol, 0)
    head += socket.inet_aton(source) + socket.inet_aton(target)
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def udp(source: int, target: int, body: bytes) -> bytes:
    return struct.pack("!HHHH", source, target, 8 + len(body), 0) + body


def vxlan(vni: int, frame: bytes) -> bytes:
    return struct.pack("!II", 1 << 27, vni << 8) + frame


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def eventually(condition: Callable[[], bool], limit_s: float = 20) -> bool:
    """Whether something that the kernel does by itself is done within the limit."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Guest:
    """A guest with a whole IP stack: a network namespace, whose own tap is joined to the guest's on the node."""

    def __init__(self, tap: int, mac_address: str, address: str, gateway: Optional[str], mtu: int) -> None:
        self.namespace = links.new_namespace()
        self._stop, self._stopped = os.pipe()
        self._outer = tap
        self._inner = in_thread(lambda: self._boot(mac_address, address, gateway, mtu))
        self._thread = threading.Thread(target=self._pump)
        self._thread.start()

    def _boot(self, mac_address: str, address: str, gateway: Optional[str], mtu: int) -> int:
        with links.inside(self.namespace):
            tap = links.tap("eth0")
            with links.netlink() as ip:
                index = links.index_of(ip, "eth0")
                ip.link("set", index=index, address=mac_address)
                ip.addr("add", index=index, address=address.split("/")[0], prefixlen=int(address.split("/")[1]))
                links.up(ip, index, mtu=mtu)
                if gateway is not None:
                    ip.route("add", dst="default", gateway=gateway)
        return tap

    def _pump(self) -> None:
        other = {self._outer: self._inner, self._inner: self._outer}
        while True:
            readable, _, _ = select.select([*other, self._stop], [], [])
            if self._stop in readable:
                return
            for tap in readable:
                os.write(other[tap], os.read(tap, 65536))

    def socket(self, kind: int = socket.SOCK_STREAM, port: int = 0, proto: int = 0) -> socket.socket:
        """A socket in the guest."""

        def make() -> socket.socket:
            with links.inside(self.namespace):
                made = socket.socket(socket.AF_INET, kind, proto)
                made.settimeout(10)
                if kind != socket.SOCK_RAW:
                    made.bind(("", port))
                return made

        return in_thread(make)

    def close(self) -> None:
        os.close(self._stopped)
        self._thread.join()
        os.close(self._stop)
        os.close(self._inner)
        os.close(self.namespace)
