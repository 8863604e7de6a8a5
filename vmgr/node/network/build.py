"""Making a job's network on a node: what is decided under the node's lock, then links, taps and packet filter.

Runs in a thread of its own, because it goes into network namespaces and waits for the kernel.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, NamedTuple, Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vmgr.logs import LOGGER
from vmgr.node import record
from vmgr.node.members import Member
from vmgr.node.network import claims, entries, leases, links, nft, rules
from vmgr.node.network.claims import Claim
from vmgr.node.network.leases import Lease
from vmgr.node.network.plan import NetworkPlan
from vmgr.node.network.undo import undo_network

LOCK = "network"
VXLAN_BYTES = 50
"""What VXLAN over IPv4 puts before a frame's contents: IP 20, UDP 8, VXLAN 8, Ethernet 14 (RFC 7348)."""

BRIDGE, WIRE, INNER = "guests", "wire", "out"
"""Links in the job's namespace: the bridge, the way to the other nodes, the way out."""


class Built(NamedTuple):
    """What was made: taps, the guests' MTU, their addresses where they are not in the plan, the job's namespace."""

    taps: tuple[int, ...]
    mtu: Optional[int]
    leases: Sequence[Optional[Lease]]
    namespace: Optional[int]


class Underlay(NamedTuple):
    """What carries a job's network: this node's address, the addresses of each node, the guests' MTU."""

    local: str
    peers: tuple[tuple[str, ...], ...]
    mtu: int


class Builder:
    """The making of one job's network on node `index`; what undoes it is put on `stack`."""

    def __init__(
        self,
        plan: NetworkPlan,
        index: int,
        nodes: Sequence[str],
        config: Config,
        place: record.Place,
        stack: ExitStack,
    ) -> None:
        self.plan = plan
        self.index = index
        self.nodes = nodes
        self.config = config
        self.place = place
        self.stack = stack
        self.own = plan.own(index)
        self.port = config.network.job.port
        self.mark = nft.mark_of(place)

    def build(self) -> Built:
        """Make everything. Raises VTorqueError (VT-NODE, VT-STAGE; VT-TRUST for the site's program)."""
        if not nft.is_there():
            raise VTorqueError(
                f"network={self.plan.kind} needs {nft.LIBRARY}, which this node has not", code=Code.NODE,
                hint="the administrator can install the package libnftables1",
            )  # fmt: skip
        try:
            with links.netlink() as ip:
                return self._job(ip) if self.plan.kind == "job" else self._bridge(ip)
        except OSError as err:
            raise VTorqueError(f"the job's network cannot be made: {err}", code=Code.STAGE) from err
        except Exception as err:
            if links.is_of_netlink(err):
                raise VTorqueError(f"the job's network cannot be made: {err}", code=Code.STAGE) from err
            raise

    # what is decided under the node's lock

    def _others(self) -> list[Claim]:
        """What all other attempts have claimed: a dead one's is claimed until it is undone."""
        others = [other for other in record.places(self.config.paths) if other.folder != self.place.folder]
        found = []
        for step in (step for other in others for step in record.steps(other) if step.get("do") == "network"):
            try:
                found.append(claims.claim_of(step))
            except (KeyError, TypeError, ValueError) as err:
                LOGGER.warning("another attempt's network cannot be read, and is passed over: %s: %s", step, err)
        return found

    def _claim(self, claim: Claim, others: Sequence[Claim], routes: Sequence[IPv4Network]) -> None:
        """Write the claim to the record, unless something of it is in use. The caller holds the node's lock."""
        claims.check(claim, others, routes)
        for family, name in claim.tables:
            if name in nft.names(family):
                raise self._number_in_use()
        for name in claim.links:
            if links.is_there(name):
                raise self._number_in_use()
        step = claim.step()
        record.append(self.place, step)
        self.stack.callback(undo_network, step)

    def _number_in_use(self) -> VTorqueError:
        return VTorqueError(
            f"the number {self.plan.vni} of the job's network is in use on this node", code=Code.NODE,
            hint="submit again, later or for other nodes",
        )  # fmt: skip

    # network=bridge

    def _bridge(self, ip: Any) -> Built:
        """Ports on the site's bridge, each with a tap behind it in a namespace of the job's own.

        The job's user can take a tap's descriptor from QEMU, and whoever has it may give the tap another MAC address
        (seen). A tap on the site's own bridge could so be given the router's, and the node's packets to it.
        """
        name = self.config.network.bridge.name
        assert name is not None
        if not ip.link_lookup(ifname=name, kind="bridge"):
            raise VTorqueError(
                f"this node has no bridge {name} (network.bridge.name)", code=Code.NODE, hint="ask the administrator"
            )
        site = links.index_of(ip, name)
        mtu = links.mtu_of(ip, site)
        found = self._claim_bridge()
        table = nft.Table("netdev", self.plan.table, self.mark)
        nft.run(rules.create(table))
        namespace = self._new_namespace()
        taps = []
        for member, lease in zip(self.own, found):
            port, inner = self._port(member), f"port{member.number}"
            index = self._pair(ip, port, inner, namespace, address=links.behind_others(member.mac))
            with links.inside(namespace):
                taps.append(self._tap_behind(member.number, inner, mtu))
            address = None if lease is None else lease.address.partition("/")[0]
            nft.run(rules.tap(table.name, port, self.port, member.mac, address))
            links.up(ip, index, mtu=mtu, master=site)
        return Built(tuple(taps), mtu, found, None)

    def _port(self, member: Member) -> str:
        """The name of a guest's port on the site's bridge."""
        return f"vt{self.plan.name}-{member.number}"

    def _tap_behind(self, number: int, port: str, mtu: int) -> int:
        """A guest's tap, joined to a port, in the namespace in which the thread is."""
        fd = self._tap(f"tap{number}")
        with links.netlink() as ip:
            bridge = links.bridge(ip, f"guest{number}")
            for name in (f"tap{number}", port):
                links.up(ip, links.index_of(ip, name), mtu=mtu, master=bridge)
            links.up(ip, bridge, mtu=mtu)
        return fd

    def _claim_bridge(self) -> Sequence[Optional[Lease]]:
        bridge = self.config.network.bridge
        found: Sequence[Optional[Lease]] = [None] * len(self.own)
        if bridge.addresses == "command" and bridge.command is not None:
            found = leases.ask(bridge.command, self.nodes[self.index], len(self.own))
        with record.node_lock(self.config.paths, LOCK):
            others = self._others()
            if bridge.addresses == "pool":
                used = {address for other in others for address in other.addresses}
                found = leases.from_pool(bridge.pool, bridge.gateway, self.nodes[self.index], len(self.own), used)
            claim = Claim(
                mark=self.mark,
                vni=self.plan.vni,
                subnet=None,
                macs=tuple(member.mac for member in self.own),
                addresses=tuple(lease.address.partition("/")[0] for lease in found if lease is not None),
                pair=None,
                tables=(("netdev", self.plan.table),),
                links=tuple(map(self._port, self.own)),
            )
            self._claim(claim, others, ())
        return found

    # network=job

    def _job(self, ip: Any) -> Built:
        """An Ethernet of the job's own, in a namespace of its own; on one node nothing needs to carry it."""
        underlay = self._underlay(ip) if len(self.nodes) > 1 else None
        nat = self._claim_job(ip)
        table = nft.Table("inet", self.plan.table, self.mark)
        peers = sorted({address for addresses in underlay.peers for address in addresses}) if underlay else []
        nft.run([*rules.create(table), *rules.node(table, self.port, self.plan.vni, peers, nat)])
        namespace = self._new_namespace()
        if nat is not None:
            self._way_out(ip, nat, namespace)
        if underlay is not None:
            try:
                links.vxlan(ip, WIRE, self.plan.vni, self.port, underlay.local, namespace)
            except Exception as err:
                if links.is_exists(err):
                    raise self._number_in_use() from err
                raise
        with links.inside(namespace):
            taps = self._fill(underlay, nat)
        return Built(taps, underlay.mtu if underlay else None, [None] * len(self.own), namespace)

    def _claim_job(self, ip: Any) -> Optional[rules.Nat]:
        plan = self.plan
        with record.node_lock(self.config.paths, LOCK):
            others, routes = self._others(), links.routed(ip)
            pair, nat = None, None
            if self.config.network.job.nat:
                self._check_forwarding()
                pair = claims.choose_pair(plan.vni, others, routes)
                nat = rules.Nat(f"vt{plan.name}", INNER, str(pair[1]), str(pair[2]))
            claim = Claim(
                mark=self.mark,
                vni=plan.vni,
                subnet=plan.subnet,
                macs=tuple(member.mac for member in self.own),
                addresses=(),
                pair=None if pair is None else str(pair),
                tables=(("inet", plan.table),),
                links=() if nat is None else (nat.outer,),
            )
            self._claim(claim, others, routes)
        return nat

    def _check_forwarding(self) -> None:
        if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() != "1":
            raise VTorqueError(
                "this node forwards no packets, which network.job.nat needs", code=Code.NODE,
                hint="the administrator can set net.ipv4.ip_forward=1, or network.job.nat: false",
            )  # fmt: skip

    def _way_out(self, ip: Any, nat: rules.Nat, namespace: int) -> None:
        """A pair of links, one end in the node's namespace."""
        index = self._pair(ip, nat.outer, nat.inner, namespace)
        ip.addr("add", index=index, address=nat.outer_address, prefixlen=30)
        links.up(ip, index)

    def _fill(self, underlay: Optional[Underlay], nat: Optional[rules.Nat]) -> tuple[int, ...]:
        """Put bridge and taps into the job's namespace, in which the thread is."""
        plan, mtu = self.plan, underlay.mtu if underlay else None
        assert plan.subnet is not None
        nft.run(rules.job(BRIDGE, plan.subnet, nat))
        nft.run([{"add": {"table": {"family": "netdev", "name": rules.JOB_TABLE}}}])
        with links.netlink() as ip:
            bridge = links.bridge(ip, BRIDGE)
            if underlay is not None:
                self._lead_out(ip, underlay, bridge)
            taps = []
            for member in self.own:
                name = f"tap{member.number}"
                taps.append(self._tap(name))
                nft.run(rules.tap(rules.JOB_TABLE, name, self.port, member.mac, member.address))
                links.up(ip, links.index_of(ip, name), mtu=mtu, master=bridge)
            ip.addr("add", index=bridge, address=plan.gateways[self.index], prefixlen=plan.prefix)
            links.up(ip, bridge, mtu=mtu)
            if nat is not None:
                inner = links.index_of(ip, nat.inner)
                ip.addr("add", index=inner, address=nat.inner_address, prefixlen=30)
                links.up(ip, inner)
                ip.route("add", dst="default", gateway=nat.outer_address)
                links.set_if_there("ipv4/ip_forward", "1")
        return tuple(taps)

    def _lead_out(self, ip: Any, underlay: Underlay, bridge: int) -> None:
        """Join the way to the other nodes with the bridge, and tell it where which guest is."""
        wire = links.index_of(ip, WIRE)
        remote = [member for member in self.plan.members if member.node != self.index]
        firsts = [addresses[0] for addresses in underlay.peers]
        entries.lead(
            wire,
            ((member.mac, str(member.address), firsts[member.node]) for member in remote),
            (address for node, address in enumerate(firsts) if node != self.index),
        )
        links.up(ip, wire, mtu=underlay.mtu, master=bridge)

    # what both are made of

    def _new_namespace(self) -> int:
        namespace = links.new_namespace()
        self.stack.callback(os.close, namespace)
        self.stack.callback(_empty, namespace)
        return namespace

    def _pair(self, ip: Any, outer: str, inner: str, namespace: int, **own: str) -> int:
        """Two joined links, `outer` in the node's namespace with its `own` attributes, signed; gives its number.

        What comes out of `outer` is what goes on: nothing changes it any more behind a filter there.
        """
        ip.link("add", ifname=outer, kind="veth", peer={"ifname": inner, "net_ns_fd": namespace}, **own)
        with links.inside(namespace):
            links.complete_checksums(inner)
        index = links.index_of(ip, outer)
        links.sign(ip, index, self.mark)
        links.set_if_there(f"ipv6/conf/{outer}/disable_ipv6", "1")
        return index

    def _tap(self, name: str) -> int:
        fd = links.tap(name)
        self.stack.callback(os.close, fd)
        return fd

    def _underlay(self, ip: Any) -> Underlay:
        """Look up the nodes' addresses, for no longer than a boot may take. Raises VTorqueError (VT-NODE)."""
        limit_s, begun = self.config.timeouts.boot, time.monotonic()
        peers = []
        for node in self.nodes:
            peers.append(self._look_up(node))
            if time.monotonic() - begun > limit_s:
                raise VTorqueError(
                    f"the addresses of {len(self.nodes)} nodes (network.job.peer) were not known within {limit_s} s",
                    code=Code.NODE, hint="does the site's name service answer?",
                )  # fmt: skip
        own = links.addresses(ip)
        name = self.config.network.job.peer.format(node=self.nodes[self.index])
        local = next((address for address in peers[self.index] if address in own), None)
        if local is None:
            raise VTorqueError(
                f"{name} (network.job.peer) is {', '.join(peers[self.index])}, which is no address of this node",
                code=Code.NODE, hint="the nodes must be known by addresses at which they reach each other",
            )  # fmt: skip
        firsts = [addresses[0] for addresses in peers]
        if len(set(firsts)) < len(firsts):
            twice = next(address for address in firsts if firsts.count(address) > 1)
            raise VTorqueError(f"two nodes of the job have the address {twice} (network.job.peer)", code=Code.NODE)
        return Underlay(local, tuple(peers), links.mtu_of(ip, own[local]) - VXLAN_BYTES)

    def _look_up(self, node: str) -> tuple[str, ...]:
        """The IPv4 addresses of a node, without those of its loopback. Raises VTorqueError (VT-NODE)."""
        name = self.config.network.job.peer.format(node=node)
        try:
            found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_DGRAM)
        except (OSError, UnicodeError) as err:
            raise VTorqueError(
                f"the address of {name} (network.job.peer) is not known: {err}", code=Code.NODE
            ) from None
        addresses = tuple(dict.fromkeys(str(info[4][0]) for info in found))
        usable = tuple(address for address in addresses if not IPv4Address(address).is_loopback)
        if not usable:
            raise VTorqueError(
                f"{name} (network.job.peer) is {addresses[0]} here, by which no other node reaches it", code=Code.NODE,
                hint="the nodes must be known by addresses at which they reach each other",
            )  # fmt: skip
        return usable


def _empty(namespace: int) -> None:
    """Remove what is in a namespace now: the kernel does it later, and not as long as a tap is open."""
    with links.inside(namespace):
        for _, name in socket.if_nameindex():
            if name != "lo":
                links.remove(name)
