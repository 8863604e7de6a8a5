"""Whether the networks that guests may ask for can be made: tried in a network namespace, which goes with the check."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, NamedTuple, Optional

from vmgr.config import Bridge, JobNetwork
from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.errors import VTorqueError
from vmgr.node.allocation import short
from vmgr.node.network import links, nft
from vmgr.topology.tree import Tree
from vmgr.trust import check_trusted

_find = finder("network")
_UP = 0x1
"""IFF_UP of <linux/if.h>, in /sys/class/net/NAME/flags."""


class Tried(NamedTuple):
    """One thing that was made, or why not."""

    what: str
    problem: Optional[str]


def check(node: Node) -> Iterator[Finding]:
    network, allowed = node.config.network, node.config.policy["network"]["allowed"]
    if network.bridge.name is not None:
        yield from judge_bridge(network.bridge, node.tree)
    elif "bridge" in allowed:
        yield _find(
            Level.WARNING, "policy.network.allowed has bridge, and network.bridge.name is not set",
            "set it, or leave bridge out of policy.network.allowed",
        )  # fmt: skip
    if set(allowed) & {"job", "bridge"}:
        yield from judge_tried(attempt(network.job.port))
        if node.config.hypervisor.vhost and not node.tree.at("dev/vhost-net").exists():
            yield _find(Level.NOTE, "there is no /dev/vhost-net: QEMU serves the taps itself", "modprobe vhost_net")
    if "job" in allowed:
        yield from judge_peer(*_own_addresses(network.job))
        if network.job.nat:
            yield from judge_forwarding(node.tree.text("proc/sys/net/ipv4/ip_forward"))
    if not set(allowed) - {"user"}:
        yield _find(Level.OK, "guests have network=user, which needs nothing of the node")


def judge_bridge(bridge: Bridge, tree: Tree) -> Iterator[Finding]:
    """The site's bridge, which is the site's to make."""
    place, key = f"sys/class/net/{bridge.name}", f"{bridge.name} (network.bridge.name)"
    if not tree.at(place).exists():
        yield _find(
            Level.FAILURE, f"there is no network interface {key}", "make the bridge, with the node's uplink in it"
        )
        return
    if not tree.at(f"{place}/bridge").is_dir():
        yield _find(Level.FAILURE, f"{key} is no bridge", "name the bridge, not a port of it")
        return
    flags = tree.text(f"{place}/flags") or "0x0"
    ports = _names(tree.at(f"{place}/brif"))
    if not int(flags, 16) & _UP:
        yield _find(Level.FAILURE, f"the bridge {key} is down", f"ip link set {bridge.name} up")
    elif not ports:
        yield _find(Level.WARNING, f"the bridge {key} has no port: guests on it reach nobody", "put the uplink into it")
    else:
        yield _find(Level.OK, f"the bridge {key} is up, with {', '.join(ports)}; MTU {tree.text(f'{place}/mtu')}")
    if bridge.addresses == "command" and bridge.command is not None:
        yield from _command(bridge.command)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208
    except OSError:
        return []


def _command(command: str) -> Iterator[Finding]:
    try:
        check_trusted(command)
    except VTorqueError as err:
        yield _find(Level.FAILURE, f"network.bridge.command: {err.message}", err.hint or "set it to the site's program")
        return
    if not os.access(command, os.X_OK):
        yield _find(Level.FAILURE, f"network.bridge.command: {command} cannot be run", f"chmod +x {command}")


def attempt(port: int) -> list[Tried]:
    """Make, in a new network namespace, what networks of guests are made of. Needs root; nothing is left of it."""
    tried = [Tried("packet filter", None if nft.is_there() else f"{nft.LIBRARY} is not installed")]
    try:
        namespace = links.new_namespace()
    except OSError as err:
        return [*tried, Tried("network namespace", str(err))]
    try:
        with links.inside(namespace):
            tried += _attempt_inside(port, namespace)
    finally:
        os.close(namespace)
    return tried


def _attempt_inside(port: int, namespace: int) -> Iterator[Tried]:
    taps: list[int] = []
    with links.netlink() as ip:
        pair = {"ifname": "check0", "kind": "veth", "peer": {"ifname": "check1"}}
        steps: list[tuple[str, Callable[[], Any]]] = [
            ("bridge", lambda: links.bridge(ip, "check")),
            ("pair of links", lambda: ip.link("add", **pair)),
            ("VXLAN link", lambda: links.vxlan(ip, "wire", 77, port, "127.0.0.1", namespace)),
            ("tap", lambda: taps.append(links.tap("tap1"))),
        ]
        if nft.is_there():
            table = {"family": "inet", "name": "vtorque-check"}
            steps.append(("table of the packet filter", lambda: nft.run([{"add": {"table": table}}])))
        for what, make in steps:
            yield Tried(what, _problem(make))
    for fd in taps:
        os.close(fd)


def _problem(make: Callable[[], Any]) -> Optional[str]:
    try:
        make()
    except OSError as err:
        return str(err)
    except Exception as err:
        if links.is_of_netlink(err):
            return str(err)
        raise
    return None


_REMEDIES = {
    "packet filter": "apt-get install libnftables1",
    "network namespace": "a kernel with CONFIG_NET_NS, and root's rights in it",
    "bridge": "modprobe bridge",
    "pair of links": "modprobe veth",
    "VXLAN link": "modprobe vxlan; jobs of several nodes need it",
    "tap": "modprobe tun",
    "table of the packet filter": "modprobe nf_tables",
}


def judge_tried(tried: Collection[Tried]) -> Iterator[Finding]:
    """A failure for each thing that cannot be made."""
    for what, problem in tried:
        if problem is not None:
            yield _find(Level.FAILURE, f"no {what} can be made: {problem}", _REMEDIES[what])
    made = [each.what for each in tried if each.problem is None]
    if made:
        yield _find(Level.OK, f"can be made: {', '.join(made)}")


def _own_addresses(job: JobNetwork) -> tuple[str, Sequence[str], Collection[str]]:
    """The name by which other nodes look this one up, the addresses that this gives, and those that the node has."""
    name = job.peer.format(node=short(os.uname().nodename))
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        found = []
    with links.netlink() as ip:
        own = links.addresses(ip)
    return name, list(dict.fromkeys(str(info[4][0]) for info in found)), own


def judge_peer(name: str, addresses: Sequence[str], own: Collection[str]) -> Iterator[Finding]:
    """What jobs of several nodes need: the node's name leads to an address of it that others reach."""
    remedy = "name the nodes in the site's name service or in /etc/hosts, or set network.job.peer"
    usable = [address for address in addresses if not IPv4Address(address).is_loopback]
    then = "jobs of several nodes have no network of their own here"
    if not addresses:
        yield _find(Level.WARNING, f"the address of {name} (network.job.peer) is not known: {then}", remedy)
    elif not usable:
        yield _find(Level.WARNING, f"{name} (network.job.peer) is {addresses[0]} here: {then}", remedy)
    elif not set(usable) & set(own):
        yield _find(
            Level.WARNING, f"{name} (network.job.peer) is {', '.join(usable)}, no address of this node: {then}", remedy
        )
    else:
        yield _find(Level.OK, f"{name} (network.job.peer) is {usable[0]}")


def judge_forwarding(text: Optional[str]) -> Iterator[Finding]:
    if text != "1":
        yield _find(
            Level.FAILURE, "this node forwards no packets, which network.job.nat needs",
            "sysctl net.ipv4.ip_forward=1, or network.job.nat: false",
        )  # fmt: skip
