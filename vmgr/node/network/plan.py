"""Who is who in the network of a job's guests: addresses, number and subnet of the network, and what guests are told.

Pure functions of the job, its nodes and the configuration: every node works all of it out and comes to the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from ipaddress import IPv4Network
from typing import Literal, NamedTuple, Optional

from vmgr.config import Network
from vmgr.errors import Code, VTorqueError
from vmgr.node.members import Member, plan_members

Kind = Literal["user", "bridge", "job"]

USER_ADDRESS = "10.0.2.15"
"""What QEMU's user networking gives to its only guest."""

_ARRAY_MEMBER = re.compile(r"(\d+)-(\d+)(?=\.|\Z)")


class GuestNet(NamedTuple):
    """A guest's network: the device with the MAC address `mac`, and what it is given.

    `address` is IPv4 with prefix length (`10.1.0.2/16`), None for DHCP. `mtu` is in bytes, None for the device's own.
    Name servers, domains and time servers that are given win over those of DHCP.
    """

    mac: str
    address: Optional[str] = None
    gateway: Optional[str] = None
    mtu: Optional[int] = None
    dns: tuple[str, ...] = ()
    domain: Optional[str] = None
    search: tuple[str, ...] = ()
    ntp: tuple[str, ...] = ()


class NetworkPlan(NamedTuple):
    """The network of a job.

    `members` are all of its guests by rank. `vni` is the network's number (24 bits, never 0; RFC 7348). Only a network
    of the job's own has a `subnet`, and `gateways`: an address in it for each node itself.
    """

    kind: Kind
    members: tuple[Member, ...]
    vni: int
    subnet: Optional[str]
    gateways: tuple[str, ...]

    @property
    def name(self) -> str:
        """The number as it stands in names: six hexadecimal digits."""
        return f"{self.vni:06x}"

    @property
    def table(self) -> str:
        """The name of its tables of the packet filter in the node's namespace."""
        return f"vtorque-{self.name}"

    @property
    def prefix(self) -> int:
        """The length of the subnet's prefix."""
        return 32 if self.subnet is None else int(self.subnet.rpartition("/")[2])

    def own(self, node: int) -> tuple[Member, ...]:
        """The guests of a node, by their number."""
        return tuple(member for member in self.members if member.node == node)


def plan_network(kind: str, job_id: str, nodes: Sequence[str], per_node: int, network: Network) -> NetworkPlan:
    """The network of a job with `per_node` guests on each of `nodes`, the mother superior first.

    Raises VTorqueError (VT-NODE) for a network that the configuration has not, or that is too small.
    """
    name = _ARRAY_MEMBER.sub(r"\1[\2]", job_id, count=1) if _ARRAY_MEMBER.match(job_id) else job_id
    digest = hashlib.sha256(name.encode()).digest()  # its first 8 bytes number the MAC addresses
    vni = 1 + int.from_bytes(digest[8:16], "big") % ((1 << 24) - 1)
    guests = plan_members(name, nodes, per_node, network.mac_prefix)
    if kind == "job":
        subnet = _subnet(int.from_bytes(digest[16:24], "big"), len(guests), len(nodes), network)
        base, end = int(subnet.network_address), int(subnet.broadcast_address)
        members = tuple(guest._replace(address=_dotted(base + 1 + guest.rank)) for guest in guests)
        gateways = tuple(_dotted(end - 1 - node) for node in range(len(nodes)))
        return NetworkPlan("job", members, vni, str(subnet), gateways)
    if kind == "bridge":
        if network.bridge.name is None:
            raise VTorqueError(
                "network=bridge is not possible here: network.bridge.name is not set", code=Code.NODE,
                hint="choose another network, or ask the administrator",
            )  # fmt: skip
        return NetworkPlan("bridge", guests, vni, None, ())
    if kind != "user":
        raise VTorqueError(f"network={kind} is not known here", code=Code.NODE, hint="user, bridge and job are")
    return NetworkPlan("user", tuple(guest._replace(address=USER_ADDRESS) for guest in guests), vni, None, ())


def guest_net(
    plan: NetworkPlan,
    member: Member,
    network: Network,
    *,
    address: Optional[str] = None,
    gateway: Optional[str] = None,
    mtu: Optional[int] = None,
) -> GuestNet:
    """What one guest is told.

    `address` (with its prefix length), `gateway` and `mtu` are what the connected wires say: the bridge's guests have
    an address from there or from DHCP. All others' addresses stand in the plan.
    """
    told = (network.dns, network.domain, network.search, network.ntp)
    if plan.kind == "job":
        router = plan.gateways[member.node] if network.job.nat else None
        return GuestNet(member.mac, f"{member.address}/{plan.prefix}", router, mtu, *told)
    if plan.kind == "bridge" and address is not None:
        return GuestNet(member.mac, address, gateway or network.bridge.gateway, mtu, *told)
    return GuestNet(member.mac, None, None, mtu, *told)


def _subnet(number: int, guests: int, nodes: int, network: Network) -> IPv4Network:
    """The subnet `number`, counted round, of the smallest that have room for guests, nodes and the two ends."""
    whole = IPv4Network(network.job.subnets)
    bits = (guests + nodes + 1).bit_length()
    if bits > 32 - whole.prefixlen:
        raise VTorqueError(
            f"{guests} guests on {nodes} nodes do not fit into {whole} (network.job.subnets)", code=Code.NODE,
            hint="ask for fewer",
        )  # fmt: skip
    count = 1 << (32 - whole.prefixlen - bits)
    return IPv4Network((int(whole.network_address) + ((number % count) << bits), 32 - bits))


def _dotted(address: int) -> str:
    """An address as text, without an object for each of thousands of addresses."""
    return ".".join(str(byte) for byte in address.to_bytes(4, "big"))
