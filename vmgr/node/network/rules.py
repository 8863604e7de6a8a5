"""What the packet filter does for a job's network, as commands for libnftables. Pure functions.

At each tap, where a guest's frames come in (family netdev, hook ingress): only what the guest may send as itself. In
the node's namespace: nothing but the kernel itself sends to the VXLAN port, and only the job's nodes are heard. In the
job's namespace: nobody reaches the node's end, and what goes out gets a source port that nothing trusts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

from vmgr.node.network.nft import Command, Table

JOB_TABLE = "vtorque"
"""The table in the job's namespace, and gone with it."""

ARP, IPV4, IPV6 = 0x0806, 0x0800, 0x86DD
_VNI_OFFSET, _VNI_BITS = 8 * 8 + 32, 24
"""Where the number of the network stands behind the start of the UDP header (RFC 7348)."""
_DHCP_SERVER, _DHCPV6_SERVER = 67, 547
_ROUTER_ADVERTISEMENT, _REDIRECT = 134, 137
_EXTENSIONS = (0, 43, 44, 51, 60, 135, 139, 140)
"""Headers of IPv6 that other headers may follow (IANA, "IPv6 Extension Header Types"), but for ESP."""

MAX_CONNECTIONS = 4096
"""Of a job's guests on one node, at a time, to the outside. The node has one table for all that it forwards."""
_PINGS = {"rate": 100, "per": "second"}

_BEFORE_TRACKING = -300

Expression = dict[str, Any]
ACCEPT: Expression = {"accept": None}
DROP: Expression = {"drop": None}
_PORTS = {"range": [1024, 65535]}


class Nat(NamedTuple):
    """The way out: a pair of links, `outer` on the node with one address, `inner` in the job's namespace."""

    outer: str
    inner: str
    outer_address: str
    inner_address: str


def tap(table: str, device: str, port: int, mac: str, address: Optional[str]) -> list[Command]:
    """The chain for what a guest sends through a tap. Without an `address` it may have any, and ask for one by DHCP.

    No guest answers as a DHCP server or a router of IPv6.

    The type of a frame is read from the frame itself: what the kernel calls its protocol leaves VLAN tags out.
    A first fragment holds at least 8 bytes behind the headers of IP, so ports and types of ICMP are seen, unless IPv6
    has more headers behind that of the fragment: such fragments do not pass.
    """
    rules = [
        [_match(_payload("ether", "saddr"), mac, "!="), DROP],
        [_match(_payload("udp", "dport"), port), DROP],
        [_match(_payload("udp", "sport"), {"set": [_DHCP_SERVER, _DHCPV6_SERVER]}), DROP],
    ]
    arp = [
        _type(ARP),
        _match(_payload("arp", "htype"), 1),
        _match(_payload("arp", "ptype"), IPV4),
        _match(_payload("arp", "hlen"), 6),
        _match(_payload("arp", "plen"), 4),
        _match(_payload("arp", "saddr ether"), mac),
    ]
    if address is not None:
        rules += [
            [*arp, _match(_payload("arp", "saddr ip"), address), ACCEPT],
            [_type(IPV4), _match(_payload("ip", "saddr"), address), ACCEPT],
        ]
    else:
        rules += [
            [_match({"exthdr": {"name": "frag", "field": "nexthdr"}}, {"set": list(_EXTENSIONS)}), DROP],
            [_match(_payload("icmpv6", "type"), {"set": [_ROUTER_ADVERTISEMENT, _REDIRECT]}), DROP],
            [*arp, ACCEPT],
            [_type(IPV4), ACCEPT],
            [_type(IPV6), ACCEPT],
        ]
    chain = {"type": "filter", "hook": "ingress", "dev": device, "prio": 0, "policy": "drop"}
    return _chain("netdev", table, device, chain, rules)


def node(table: Table, port: int, vni: int, peers: Sequence[str], nat: Optional[Nat]) -> list[Command]:
    """A job's table in the node's namespace. `peers` are all addresses of the job's nodes, none for a job on one.

    A packet that a program sends has a socket, and so a uid, whoever runs it; one of the kernel's own VXLAN has none.
    Each connection between guests has a source port of its own there: without `notrack` guests could fill the node's
    table of connections with them.
    """
    to_port = _match(_payload("udp", "dport"), port)
    ours = [to_port, _match(_raw("th", _VNI_OFFSET, _VNI_BITS), vni)]
    known = [_match(_payload("ip", "saddr"), {"set": list(peers)}, "!=")] if peers else []
    inputs = [[*ours, *known, DROP]]
    forwards = [[to_port, DROP]]
    commands = _chain(*table[:2], "output", _hook("output"), [[to_port, _match(_meta("skuid"), 0, ">="), DROP]])
    if nat is not None:
        inputs.append([_from(nat.outer), DROP])
        forwards += [
            [_from(nat.outer), _match(_payload("ip", "daddr"), {"prefix": {"addr": "169.254.0.0", "len": 16}}), DROP],
            [_from(nat.outer), _match(_payload("ip", "saddr"), nat.inner_address), _transports(icmp=True), ACCEPT],
            [_from(nat.outer), DROP],
            [_to(nat.outer), _known(), ACCEPT],
            [_to(nat.outer), DROP],
        ]
        outward = [_match(_payload("ip", "saddr"), nat.inner_address), _to(nat.outer, "!=")]
        commands += _chain(*table[:2], "postrouting", _hook("postrouting", "nat", 100), [
            [*outward, _transports(), {"masquerade": {"port": _PORTS}}],
            [*outward, _match(_meta("l4proto"), "icmp"), {"masquerade": None}],
        ])  # fmt: skip
    for hook in ("prerouting", "output"):
        raw = _hook(hook, priority=_BEFORE_TRACKING)
        commands += _chain(*table[:2], f"raw-{hook}", raw, [[*ours, {"notrack": None}]])
    commands += _chain(*table[:2], "input", _hook("input"), inputs)
    commands += _chain(*table[:2], "forward", _hook("forward"), forwards)
    return commands


def job(bridge: str, subnet: str, nat: Optional[Nat]) -> list[Command]:
    """The table in the job's own namespace."""
    address, _, length = subnet.partition("/")
    own = {"prefix": {"addr": address, "len": int(length)}}
    at = ("inet", JOB_TABLE)
    commands: list[Command] = [{"add": {"table": {"family": at[0], "name": at[1]}}}]
    commands += _chain(*at, "input", _hook("input", policy="drop"), [
        [_known(), ACCEPT],
        [_match(_payload("icmp", "type"), "echo-request"), {"limit": _PINGS}, ACCEPT],
    ])  # fmt: skip
    forwards: list[list[Expression]] = []
    if nat is not None:
        outward = [_from(bridge), _to(nat.inner), _match(_payload("ip", "saddr"), own)]
        forwards = [
            [*outward, _state("new"), {"ct count": {"val": MAX_CONNECTIONS, "inv": True}}, DROP],
            [*outward, ACCEPT],
            [_from(nat.inner), _to(bridge), _known(), ACCEPT],
        ]
        snat = {"addr": nat.inner_address, "family": "ip"}
        commands += _chain(*at, "postrouting", _hook("postrouting", "nat", 100), [
            [_to(nat.inner), _transports(), {"snat": {**snat, "port": _PORTS}}],
            [_to(nat.inner), _match(_meta("l4proto"), "icmp"), {"snat": snat}],
        ])  # fmt: skip
    return commands + _chain(*at, "forward", _hook("forward", policy="drop"), forwards)


def create(table: Table) -> list[Command]:
    """A new table with its mark; fails when there is one of that name."""
    return [
        {"create": {"table": {"family": table.family, "name": table.name}}},
        {"add": {"chain": {"family": table.family, "table": table.name, "name": table.mark}}},
    ]


def _chain(
    family: str, table: str, name: str, hook: dict[str, Any], rules: Sequence[Sequence[Expression]]
) -> list[Command]:
    at = {"family": family, "table": table}
    return [
        {"add": {"chain": {**at, "name": name, **hook}}},
        *({"add": {"rule": {**at, "chain": name, "expr": list(rule)}}} for rule in rules),
    ]


def _hook(hook: str, kind: str = "filter", priority: int = 0, policy: str = "accept") -> dict[str, Any]:
    return {"type": kind, "hook": hook, "prio": priority, "policy": policy}


def _match(left: Expression, right: Any, op: str = "==") -> Expression:
    return {"match": {"op": op, "left": left, "right": right}}


def _payload(protocol: str, field: str) -> Expression:
    return {"payload": {"protocol": protocol, "field": field}}


def _raw(base: str, offset: int, bits: int) -> Expression:
    return {"payload": {"base": base, "offset": offset, "len": bits}}


def _meta(key: str) -> Expression:
    return {"meta": {"key": key}}


def _type(ether_type: int) -> Expression:
    return _match(_raw("ll", 96, 16), ether_type)


def _from(link: str) -> Expression:
    return _match(_meta("iifname"), link)


def _to(link: str, op: str = "==") -> Expression:
    return _match(_meta("oifname"), link, op)


def _state(*states: str) -> Expression:
    return _match({"ct": {"key": "state"}}, list(states), "in")


def _known() -> Expression:
    return _state("established", "related")


def _transports(*, icmp: bool = False) -> Expression:
    return _match(_meta("l4proto"), {"set": ["tcp", "udp", *(["icmp"] if icmp else [])]})
