"""Networks of guests on real links: two nodes as network namespaces, frames at the taps, forgers on every side."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import netsite as net
import pytest
from netsite import BROADCAST, Guest, Node, arp, cluster, ethernet, ipv4, send, udp, until
from nodesite import REPOSITORY

from vmgr.errors import Code, VTorqueError
from vmgr.node import record
from vmgr.node.network import links, nft, relay, rules
from vmgr.node.network.plan import NetworkPlan
from vmgr.node.network.undo import undo_network
from vmgr.node.network.wires import Wires, connect
from vmgr.node.reap import reap
from vmgr.node.undo import undo
from vmgr.node.user import User

pytestmark = pytest.mark.root

NAMES = ["n1", "n2"]
PORT = 4789
SIOCGSKNS = 0x894C
"""Of <linux/sockios.h>: a descriptor of the network namespace that a tap is of."""


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes' names are known, as on a cluster."""
    look_up = socket.getaddrinfo

    def known(host: Any, *rest: Any, **more: Any) -> Any:
        return look_up(f"10.66.0.{host[1:]}" if host in ("n1", "n2", "n3") else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", known)


@pytest.fixture
def nodes(base: Path) -> Iterator[list[Node]]:
    with cluster(base, ["n1", "n2", "n3"]) as made:
        yield made


class Job:
    """A job with two guests on each of two nodes."""

    def __init__(self, nodes: Sequence[Node], job: str) -> None:
        self.nodes = nodes
        self.plan: NetworkPlan = net.plan_for(nodes[0], job, NAMES)
        self.members = self.plan.members
        self.wires: list[Wires] = [node.wire(self.plan, NAMES) for node in nodes[:2]]
        self.taps = [tap for wires in self.wires for tap in wires.taps]

    def hello(self, rank: int, text: bytes = b"the last one") -> bytes:
        """A frame to all that any guest may send."""
        member = self.members[rank]
        body = ipv4(str(member.address), "255.255.255.255", net.UDP, udp(9, 9, text))
        return ethernet(member.mac, BROADCAST, net.IPV4, body)

    def others_see(self, rank: int) -> list[bytes]:
        """What all guests but one have got, after it has sent a frame to all as the last."""
        send(self.taps[rank], self.hello(rank))
        return until(self.taps[:rank] + self.taps[rank + 1 :], b"the last one")

    def close(self) -> None:
        for node, wires in zip(self.nodes, self.wires):
            node.run(wires.close())


@pytest.fixture
def job(nodes: list[Node]) -> Iterator[Job]:
    made = Job(nodes, "12.s")
    try:
        yield made
    finally:
        made.close()
        for node in nodes[:2]:
            assert node.tables() == set() and node.links() == set()


def test_frames_reach_the_guests_of_all_nodes(job: Job) -> None:
    first, last = job.members[0], job.members[3]
    send(job.taps[0], job.hello(0, b"to all"))
    assert job.others_see(0).count(job.hello(0, b"to all")) == 3
    assert [wires.mtu for wires in job.wires] == [1450, 1450]
    body = ipv4(str(first.address), str(last.address), net.UDP, udp(9, 9, b"x" * (1450 - 28)))
    largest = ethernet(first.mac, last.mac, net.IPV4, body)
    send(job.taps[0], largest)
    assert largest in until([job.taps[3]], b"xxx")


def test_a_node_answers_arp_for_the_guests_of_others(job: Job) -> None:
    first, second, last = job.members[0], job.members[1], job.members[3]
    for member in (second, last):
        send(job.taps[0], arp(first.mac, first.mac, str(first.address), str(member.address)))
    send(job.taps[0], job.hello(0))
    there = until(job.wires[1].taps, b"the last one")
    assert not any(frame[12:14] == struct.pack("!H", net.ARP) for frame in there)
    assert any(frame[12:14] == struct.pack("!H", net.ARP) for frame in until([job.taps[1]], b"the last one"))
    send(job.taps[1], job.hello(1))
    (answer,) = (frame for frame in until([job.taps[0]], b"the last one") if frame[12:14] == struct.pack("!H", net.ARP))
    assert answer[:12] == net.mac(first.mac) + net.mac(last.mac)
    assert answer[20:32] == b"\0\2" + net.mac(last.mac) + socket.inet_aton(str(last.address))
    assert answer[38:42] == socket.inet_aton(str(first.address))


def forged(job: Job) -> dict[str, bytes]:
    """What the guest of rank 0 must not send, each frame with its name at its end."""
    me, other = job.members[0], job.members[1]
    own, foreign = str(me.address), str(other.address)

    def packet(source: str, body: bytes = udp(9, 9, b"")) -> bytes:
        return ipv4(source, "255.255.255.255", net.UDP, body)

    frames = {
        "another's MAC": ethernet(other.mac, BROADCAST, net.IPV4, packet(own)),
        "a MAC of its own choice": ethernet("02:00:00:00:00:99", BROADCAST, net.IPV4, packet(own)),
        "another's address": ethernet(me.mac, BROADCAST, net.IPV4, packet(foreign)),
        "no address": ethernet(me.mac, BROADCAST, net.IPV4, packet("0.0.0.0")),
        "ARP from another MAC": arp(other.mac, me.mac, own, foreign),
        "ARP about another MAC": arp(me.mac, other.mac, own, foreign),
        "ARP about another address": arp(me.mac, me.mac, foreign, own, operation=2),
        "ARP with long addresses": ethernet(
            me.mac, BROADCAST, net.ARP, struct.pack("!HHBBH", 1, net.IPV4, 8, 4, 1) + net.mac(me.mac) + bytes(18)
        ),
        "reverse ARP": ethernet(me.mac, BROADCAST, 0x8035, arp(me.mac, me.mac, own, own, operation=3)[14:]),
        "a VLAN tag": ethernet(me.mac, BROADCAST, net.VLAN, b"\0\5\x08\0" + packet(own)),
        "two VLAN tags": ethernet(me.mac, BROADCAST, 0x88A8, b"\0\5\x81\0\0\5\x08\0" + packet(own)),
        "IPv6": ethernet(me.mac, BROADCAST, net.IPV6, b"\x60" + bytes(5) + b"\x3b\x40" + bytes(32)),
        "a frame of another kind": ethernet(me.mac, BROADCAST, 0x88B5, bytes(46)),
        "a frame of a bridge": ethernet(me.mac, BROADCAST, 20, b"\x42\x42\x03" + bytes(43)),
        "a DHCP server's answer": ethernet(me.mac, BROADCAST, net.IPV4, packet(own, body=udp(67, 68, bytes(16)))),
        "UDP to the VXLAN port": ethernet(me.mac, BROADCAST, net.IPV4, packet(own, body=udp(9, PORT, bytes(16)))),
    }
    return {name: frame + name.encode() for name, frame in frames.items()}


def came(frames: dict[str, bytes], seen: Sequence[bytes]) -> set[str]:
    return {name for name in frames if any(frame.endswith(name.encode()) for frame in seen)}


def test_a_guest_sends_only_as_itself(job: Job) -> None:
    frames = forged(job)
    for frame in frames.values():
        send(job.taps[0], frame)
    assert came(frames, job.others_see(0)) == set()
    namespace = job.wires[0]._namespace
    assert namespace is not None
    with links.inside(namespace):
        nft.run([{"delete": {"table": {"family": "netdev", "name": "vtorque"}}}])
    for frame in frames.values():
        send(job.taps[0], frame)
    assert came(frames, job.others_see(0)) == set(frames)  # so it was that table that kept them


def test_another_job_on_the_same_nodes_sees_no_frame(job: Job, nodes: list[Node], user: User) -> None:
    other = Job(nodes, "13.s")
    try:
        first, theirs = job.members[0], other.members[3]
        sent = [
            job.hello(0, b"to all"),
            ethernet(first.mac, theirs.mac, net.IPV4, job.hello(0, b"to a guest of the other job")[14:]),
        ]
        for frame in sent:
            send(job.taps[0], frame)
        own, foreign = ([frame for frame in each.others_see(0) if frame] for each in (job, other))
        assert [own.count(frame) for frame in sent] == [3, 3]
        assert not set(own) & set(foreign)
        assert not {frame[6:12] for frame in foreign} & {net.mac(member.mac) for member in job.members}
        for each in (job, other):  # now a user sends in the first node's place
            open_table(nodes[0], each.plan)
        for each in (job, other):
            packet = net.vxlan(each.plan.vni, each.hello(0, b"by number"))
            assert inject(nodes[0], user, nodes[1].address, packet) == ""
        own, foreign = (until(each.wires[1].taps, b"by number") for each in (job, other))
        assert own.count(job.hello(0, b"by number")) == foreign.count(other.hello(0, b"by number")) == 2
        assert other.hello(0, b"by number") not in own and job.hello(0, b"by number") not in foreign
    finally:
        other.close()


# the VXLAN port

INJECT = """\
import socket, sys
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
try:
    link.sendto(bytes.fromhex(sys.argv[3]), (sys.argv[1], int(sys.argv[2])))
except PermissionError:
    print("refused")
"""


def inject(node: Node, user: User, target: str, packet: bytes) -> str:
    """Send a packet from a node, as a user who has nothing but a socket."""

    def start() -> str:
        done = subprocess.run(
            ["/usr/bin/python3", "-c", INJECT, target, str(PORT), packet.hex()],
            user=user.uid, group=user.gid, extra_groups=[], capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    return node.do(start)


def open_table(node: Node, plan: NetworkPlan) -> None:
    """Take away what guards the port on a node."""
    node.do(lambda: nft.run([{"delete": {"table": {"family": "inet", "name": plan.table}}}]))


def test_nobody_injects_a_frame(job: Job, nodes: list[Node], user: User) -> None:
    target = nodes[1].address
    by_user, by_stranger = (
        net.vxlan(job.plan.vni, job.hello(0, text)) for text in (b"from a user", b"from a stranger")
    )
    own_node = net.vxlan(job.plan.vni, job.hello(0, b"from the node itself"))

    def attack() -> tuple[list[str], list[bytes]]:
        said = [inject(nodes[0], user, target, by_user), inject(nodes[2], user, target, by_stranger)]
        said.append(inject(nodes[1], user, target, own_node))
        return said, job.others_see(0)

    said, seen = attack()
    assert said == ["refused", "", "refused"]
    assert not any(b"from " in frame for frame in seen)
    open_table(nodes[0], job.plan)
    said, seen = attack()
    assert said[0] == "" and any(frame.endswith(b"from a user") for frame in seen)  # the receiver takes it for a node's
    assert not any(frame.endswith(b"from a stranger") for frame in seen)
    open_table(nodes[1], job.plan)
    said, seen = attack()
    assert said == ["", "", ""]
    for text in (b"from a user", b"from a stranger", b"from the node itself"):
        assert any(frame.endswith(text) for frame in seen), text


# NAT


@pytest.fixture
def outside(base: Path) -> Iterator[list[Node]]:
    with cluster(base, ["n1", "n2", "n3"], job={"nat": True, "ssh_ports": "22000-22009"}) as made:
        made[0].do(lambda: links.set_if_there("ipv4/ip_forward", "1"))
        made[2].do(lambda: links.set_if_there("ipv4/ip_forward", "1"))
        yield made


@pytest.fixture
def wired(outside: list[Node]) -> Iterator[tuple[Node, Wires, NetworkPlan]]:
    node = outside[0]
    plan = net.plan_for(node, "12.s", ["n1"], per_node=1)
    wires = node.wire(plan, ["n1"])
    try:
        yield node, wires, plan
    finally:
        node.run(wires.close())
        node.run(wires.close())
        assert node.links() == set() and node.tables() == set()


@pytest.fixture
def guest(wired: tuple[Node, Wires, NetworkPlan]) -> Iterator[Guest]:
    _, wires, plan = wired
    member = plan.members[0]
    made = Guest(wires.taps[0], member.mac, f"{member.address}/{plan.prefix}", plan.gateways[0], wires.mtu or 1500)
    try:
        yield made
    finally:
        made.close()


def listening(node: Node, kind: int, address: str, port: int = 0, proto: int = 0) -> socket.socket:
    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET, kind, proto)
        made.settimeout(10)
        made.bind((address, port))
        if kind == socket.SOCK_STREAM:
            made.listen()
        return made

    return node.do(make)


def has_something(link: socket.socket) -> bool:
    return bool(select.select([link], [], [], 0)[0])


def test_source_ports_beyond_nat_are_never_trusted_ones(outside: list[Node], wired: Any, guest: Guest) -> None:
    there, here = outside[2], outside[0]
    _, wires, plan = wired
    with listening(there, socket.SOCK_DGRAM, there.address) as server, guest.socket(socket.SOCK_DGRAM, 800) as me:
        me.sendto(b"question", server.getsockname())
        said, source = server.recvfrom(100)
        assert said == b"question" and source[0] == here.address and source[1] >= 1024
        server.sendto(b"answer", source)
        assert me.recv(100) == b"answer"
    with listening(there, socket.SOCK_STREAM, there.address) as server, guest.socket(port=801) as me:
        me.connect(server.getsockname())
        link, source = server.accept()
        with link:
            assert source[0] == here.address and source[1] >= 1024

    def translate_plainly(table: str, link: str) -> None:
        at = {"family": "inet", "table": table, "chain": "postrouting"}
        to_link = {"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": link}}
        nft.run([
            {"flush": {"chain": {"family": "inet", "table": table, "name": "postrouting"}}},
            {"add": {"rule": {**at, "expr": [to_link, {"masquerade": None}]}}},
        ])  # fmt: skip

    here.do(lambda: translate_plainly(plan.table, "eth0"))
    for port, trusted in ((802, False), (803, True)):  # each of the two is enough
        with listening(there, socket.SOCK_DGRAM, there.address) as server, guest.socket(socket.SOCK_DGRAM, port) as me:
            me.sendto(b"question", server.getsockname())
            assert (server.recvfrom(100)[1][1] == port) == trusted
        with links.inside(wires._namespace):
            translate_plainly(rules.JOB_TABLE, "out")


def test_other_protocols_do_not_get_out(outside: list[Node], wired: Any, guest: Guest) -> None:
    node, _, plan = wired
    there = outside[2]
    server = listening(there, socket.SOCK_DGRAM, there.address)
    raw = listening(there, socket.SOCK_RAW, there.address, proto=47)
    with server, raw, guest.socket(socket.SOCK_DGRAM) as me, guest.socket(socket.SOCK_RAW, proto=47) as forger:

        def arrives() -> bool:
            forger.sendto(bytes(16), (there.address, 0))
            me.sendto(b"later", server.getsockname())
            assert server.recv(100) == b"later"
            return has_something(raw)

        assert not arrives()
        node.do(lambda: nft.run([{"flush": {"chain": {"family": "inet", "table": plan.table, "name": "forward"}}}]))
        assert arrives()


def test_a_guest_does_not_reach_the_nodes_own_services(
    outside: list[Node], wired: tuple[Node, Wires, NetworkPlan], guest: Guest
) -> None:
    node, _, plan = wired
    there = outside[2]
    server = listening(there, socket.SOCK_DGRAM, there.address)
    with server, listening(node, socket.SOCK_DGRAM, "0.0.0.0") as service, guest.socket(socket.SOCK_DGRAM) as me:
        pair = IPv4Network(record_step(node)["pair"])
        own = [(address, service.getsockname()[1]) for address in (node.address, str(pair[1]), plan.gateways[0])]

        def knock() -> bool:
            for address in own:
                me.sendto(b"knock", address)
            me.sendto(b"later", server.getsockname())
            assert server.recv(100) == b"later"
            return has_something(service)

        assert not knock()
        at = {"family": "inet", "table": plan.table}
        node.do(lambda: nft.run([{"flush": {"chain": {**at, "name": "input"}}}]))
        assert knock()


def test_a_guest_does_not_reach_its_own_networks_end(wired: tuple[Node, Wires, NetworkPlan], guest: Guest) -> None:
    _, wires, plan = wired
    assert wires._namespace is not None
    with links.inside(wires._namespace):
        service = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        service.bind(("0.0.0.0", 0))
    with service, guest.socket(socket.SOCK_DGRAM) as me, guest.socket(socket.SOCK_RAW, proto=net.ICMP) as pinger:

        def knock() -> bool:
            me.sendto(b"knock", (plan.gateways[0], service.getsockname()[1]))
            pinger.sendto(struct.pack("!BBHHH", 8, 0, 0xF7FF, 0, 0), (plan.gateways[0], 0))
            assert pinger.recv(100)[20:21] == b"\0"  # the echo, so the knock is over
            return has_something(service)

        assert not knock()
        with links.inside(wires._namespace):
            nft.run([{"delete": {"table": {"family": "inet", "name": rules.JOB_TABLE}}}])
        assert knock()


def test_a_guest_reaches_no_services_of_a_cloud(outside: list[Node], wired: Any, guest: Guest) -> None:
    node, _, plan = wired
    there, service = outside[2], "169.254.169.254"

    def address() -> None:
        with links.netlink() as ip:
            ip.addr("add", index=links.index_of(ip, "eth0"), address=service, prefixlen=32)

    def route() -> None:
        with links.netlink() as ip:
            ip.route("add", dst=f"{service}/32", oif=links.index_of(ip, "eth0"))

    there.do(lambda: net.in_thread(address))
    node.do(lambda: net.in_thread(route))
    server = listening(there, socket.SOCK_DGRAM, there.address)
    with server, listening(there, socket.SOCK_DGRAM, service, 80) as cloud, guest.socket(socket.SOCK_DGRAM) as me:

        def arrives() -> bool:
            me.sendto(b"who am I", (service, 80))
            me.sendto(b"later", server.getsockname())
            assert server.recv(100) == b"later"
            return has_something(cloud)

        assert not arrives()
        node.do(lambda: nft.run([{"flush": {"chain": {"family": "inet", "table": plan.table, "name": "forward"}}}]))
        assert arrives()


def test_errors_that_a_guest_makes_up_do_not_reach_the_nodes_connections(
    outside: list[Node], wired: tuple[Node, Wires, NetworkPlan], guest: Guest
) -> None:
    node, _, plan = wired
    there = outside[2]
    server, own = listening(there, socket.SOCK_DGRAM, there.address), listening(node, socket.SOCK_DGRAM, node.address)
    raw = listening(node, socket.SOCK_RAW, node.address, proto=net.ICMP)
    with (
        server,
        own,
        raw,
        guest.socket(socket.SOCK_RAW, proto=net.ICMP) as me,
        guest.socket(socket.SOCK_DGRAM) as other,
    ):
        own.sendto(b"known", server.getsockname())  # so an error about it is related, to the packet filter
        assert server.recv(100) == b"known"
        head = net.udp(own.getsockname()[1], server.getsockname()[1], bytes(8))
        error = struct.pack("!BBHHH", 3, 4, 0, 0, 600) + ipv4(node.address, there.address, net.UDP, head)
        error = error[:2] + struct.pack("!H", net.checksum(error)) + error[4:]

        def arrives() -> bool:
            me.sendto(error, (node.address, 0))
            other.sendto(b"later", server.getsockname())
            assert server.recv(100) == b"later"
            return has_something(raw)

        assert not arrives()
        node.do(lambda: nft.run([{"flush": {"chain": {"family": "inet", "table": plan.table, "name": "input"}}}]))
        assert arrives()


def hardware_address(name: str) -> str:
    with socket.socket() as link:
        answer = fcntl.ioctl(link, 0x8927, struct.pack("16s24x", name.encode()))  # SIOCGIFHWADDR
    return answer[18:24].hex(":")


def test_open_checksums_change_no_ports_behind_the_filters(
    outside: list[Node], wired: tuple[Node, Wires, NetworkPlan], guest: Guest
) -> None:
    node, wires, plan = wired
    there, member = outside[2], plan.members[0]
    node.do(lambda: net.offload_checksums("eth0", False))  # as a card writes them
    assert wires._namespace is not None
    with links.inside(wires._namespace):
        router = hardware_address("guests")
    server = listening(there, socket.SOCK_DGRAM, there.address)
    with server, listening(there, socket.SOCK_DGRAM, "", PORT) as port, guest.socket(socket.SOCK_DGRAM) as me:

        def sources(ports: tuple[int, int], offset: int, wanted: int) -> set[int]:
            """Send a datagram one of whose ports becomes `wanted`; gives the ports that some came from until then."""
            packet = ipv4(str(member.address), there.address, net.UDP, udp(*ports, bytes(4)))
            frame = net.adjust(ethernet(member.mac, router, net.IPV4, packet)[:-2], 34, wanted)
            send(wires.taps[0], frame, net.open_checksum(34, offset))
            me.sendto(b"later", server.getsockname())
            found = set()
            while True:
                data, source = server.recvfrom(100)
                if data == b"later":
                    return found
                found.add(source[1])

        for is_open in (False, True):
            with links.inside(wires._namespace):
                net.offload_checksums("out", is_open)
            sources((6000 + is_open, 9), 2, PORT)
            assert has_something(port) == is_open
            (source,) = sources((7000 + is_open, server.getsockname()[1]), 0, 800)
            assert (source == 800) == is_open


def connections(node: Node) -> int:
    return node.do(lambda: int(Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text()))


def test_guests_connections_do_not_fill_the_nodes_table(base: Path) -> None:
    with cluster(base, NAMES, job={"nat": True}) as nodes:
        for node in nodes:
            node.do(lambda: links.set_if_there("ipv4/ip_forward", "1"))
        job = Job(nodes, "12.s")
        try:
            first, last = job.members[0], job.members[3]

            def talk() -> list[int]:
                before = [connections(node) for node in nodes]
                for port in range(1000, 1100):
                    body = ipv4(str(first.address), str(last.address), net.UDP, udp(port, 9, b"hello"))
                    send(job.taps[0], ethernet(first.mac, last.mac, net.IPV4, body))
                job.others_see(0)
                return [connections(node) - count for node, count in zip(nodes, before)]

            assert max(talk()) <= 1
            for node in nodes:
                for hook in ("prerouting", "output"):
                    at = {"family": "inet", "table": job.plan.table, "name": f"raw-{hook}"}
                    node.do(lambda at=at: nft.run([{"flush": {"chain": at}}]))  # type: ignore[misc]
            assert min(talk()) > 50
        finally:
            job.close()


@pytest.mark.parametrize(("limit", "arriving"), [(3, 3), (rules.MAX_CONNECTIONS, 8)])
def test_guests_have_so_many_connections_to_the_outside(
    outside: list[Node], monkeypatch: pytest.MonkeyPatch, limit: int, arriving: int
) -> None:
    monkeypatch.setattr(rules, "MAX_CONNECTIONS", limit)
    node, there = outside[0], outside[2]
    plan = net.plan_for(node, "12.s", ["n1"], per_node=1)
    wires = node.wire(plan, ["n1"])
    member = plan.members[0]
    guest = Guest(wires.taps[0], member.mac, f"{member.address}/{plan.prefix}", plan.gateways[0], wires.mtu or 1500)
    try:
        with listening(there, socket.SOCK_DGRAM, there.address) as server:
            links_out = [guest.socket(socket.SOCK_DGRAM) for _ in range(8)]
            links_out[0].sendto(b"question", server.getsockname())
            server.sendto(b"answer", server.recvfrom(100)[1])
            assert links_out[0].recv(100) == b"answer"
            for link in links_out[1:]:
                link.sendto(b"another", server.getsockname())
            links_out[0].sendto(b"later", server.getsockname())  # a connection that is known goes on
            seen = [server.recv(100)]
            while seen[-1] != b"later":
                seen.append(server.recv(100))
            for link in links_out:
                link.close()
        assert len(seen) == arriving
    finally:
        guest.close()
        node.run(wires.close())


def test_a_guest_reaches_no_vxlan_port_through_nat(outside: list[Node], wired: Any, guest: Guest) -> None:
    node, wires, plan = wired
    there = outside[2]
    server = listening(there, socket.SOCK_DGRAM, there.address)
    with (
        server,
        listening(there, socket.SOCK_DGRAM, there.address, PORT) as port,
        guest.socket(socket.SOCK_DGRAM) as me,
    ):

        def arrives() -> bool:
            found = []
            for size in (60, 3000):  # the larger one in fragments
                me.sendto(net.vxlan(plan.vni, bytes(size)), (there.address, PORT))
                me.sendto(b"later", server.getsockname())
                assert server.recv(100) == b"later"
                found.append(has_something(port) and bool(port.recv(65536)))
            assert found[0] == found[1]
            return found[0]

        assert not arrives()
        with links.inside(wires._namespace):
            nft.run([{"delete": {"table": {"family": "netdev", "name": "vtorque"}}}])
        assert not arrives()  # the node's own table
        node.do(lambda: nft.run([{"flush": {"chain": {"family": "inet", "table": plan.table, "name": "forward"}}}]))
        assert arrives()


def record_step(node: Node) -> dict[str, Any]:
    (place,) = record.places(node.config.paths)
    return next(step for step in record.steps(place) if step["do"] == "network")


def test_the_relay_leads_to_the_guests_ssh(outside: list[Node], wired: Any, guest: Guest) -> None:
    node, wires, plan = wired
    port = node.run(wires.forward(1, plan.members[0].address))
    assert wires.ssh_ports == {1: 22000}
    data = os.urandom(1 << 20)
    with guest.socket(port=22) as sshd:
        sshd.listen()
        for at, address in ((node, ("127.0.0.1", port)), (outside[2], (node.address, 22000))):
            with at.do(lambda: socket.socket()) as client:
                client.settimeout(10)
                client.connect(address)
                link, source = sshd.accept()
                with link:
                    link.settimeout(10)
                    assert source[0] == plan.gateways[0]
                    client.sendall(data[:65536])
                    client.shutdown(socket.SHUT_WR)
                    assert everything(link) == data[:65536]
                    link.sendall(data)  # one end has said all, the other not
                    link.shutdown(socket.SHUT_WR)
                    assert everything(client) == data
    with node.do(lambda: socket.socket()) as client:
        client.settimeout(10)
        client.connect(("127.0.0.1", port))  # nobody listens in the guest now
        assert refused(client)


def test_a_relay_that_closes_breaks_what_it_leads(
    outside: list[Node], wired: Any, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "MAX_CONNECTIONS", 3)
    node, wires, plan = wired
    port = node.run(wires.forward(1, plan.members[0].address))
    with ExitStack() as stack:
        sshd = stack.enter_context(guest.socket(port=22))
        sshd.listen()
        clients, served = [], []
        for _ in range(3):
            clients.append(stack.enter_context(node.do(lambda: socket.socket())))
            clients[-1].settimeout(10)
            clients[-1].connect(("127.0.0.1", port))
            served.append(stack.enter_context(sshd.accept()[0]))
            served[-1].settimeout(10)
            served[-1].sendall(b"SSH-2.0-")
            assert clients[-1].recv(100) == b"SSH-2.0-"
        with node.do(lambda: socket.socket()) as one_more:
            one_more.settimeout(10)
            one_more.connect(("127.0.0.1", port))
            assert refused(one_more)
        node.run(wires._relays[0].close())
        assert all(refused(client) for client in clients)
        with node.do(lambda: socket.socket()) as late, pytest.raises(ConnectionRefusedError):
            late.connect(("127.0.0.1", port))


def everything(link: socket.socket) -> bytes:
    parts = []
    while part := link.recv(65536):
        parts.append(part)
    return b"".join(parts)


def refused(link: socket.socket) -> bool:
    try:
        return link.recv(1) == b""
    except ConnectionResetError:
        return True


def test_nat_needs_forwarding(outside: list[Node]) -> None:
    node = outside[1]
    with pytest.raises(VTorqueError, match=r"forwards no packets.*net\.ipv4\.ip_forward=1") as caught:
        node.wire(net.plan_for(node, "12.s", ["n2"]), ["n2"])
    assert caught.value.code == Code.NODE and node.tables() == set() and node.links() == set()


# refusals, and what is left


def test_a_job_that_ends_while_its_network_is_made_leaves_nothing(nodes: list[Node]) -> None:
    node, plan = nodes[0], net.plan_for(nodes[0], "12.s", NAMES)
    place = node.place("12.s")

    async def start_and_end() -> None:
        connecting = asyncio.ensure_future(connect(plan, 0, NAMES, node.config, place))
        await asyncio.sleep(0)
        connecting.cancel()
        await asyncio.wait([connecting])
        assert connecting.cancelled()

    node.run(start_and_end())
    assert node.tables() == set() and node.links() == set()


def test_user_networking_needs_no_wires(nodes: list[Node]) -> None:
    wires = nodes[0].wire(net.plan_for(nodes[0], "12.s", ["n1"], 1, kind="user"), ["n1"])
    assert wires.taps == () and wires.mtu is None and wires.addresses == wires.gateways == [None]
    nodes[0].run(wires.close())


def test_a_number_in_use_is_refused(job: Job, nodes: list[Node]) -> None:
    plan = net.plan_for(nodes[0], "12.s", NAMES)
    refusals = [
        (plan, f"the number {plan.vni} of the job's network is in use"),
        (plan._replace(vni=7), f"the subnet {plan.subnet} of the job's network is in use"),
        (plan._replace(vni=7, subnet="10.9.0.0/24"), f"the MAC address {plan.members[0].mac} of a guest is in use"),
    ]
    for other, message in refusals:
        with pytest.raises(VTorqueError, match=message) as caught:
            nodes[0].wire(other, NAMES)
        assert caught.value.code == Code.NODE
    assert nodes[0].tables() == {plan.table}
    job.others_see(0)


def test_a_number_of_somebody_elses_is_refused(nodes: list[Node]) -> None:
    node, plan = nodes[0], net.plan_for(nodes[0], "12.s", ["n1", "n2"])
    node.do(lambda: nft.run([{"add": {"table": {"family": "inet", "name": plan.table}}}]))
    with pytest.raises(VTorqueError, match="is in use on this node"):
        node.wire(plan, ["n1", "n2"])
    assert node.tables() == {plan.table}
    open_table(node, plan)

    def foreign() -> None:
        with links.netlink() as ip:
            links.vxlan(ip, "theirs", plan.vni, PORT, node.address, node.namespace)

    node.do(lambda: net.in_thread(foreign))
    with pytest.raises(VTorqueError, match="is in use on this node") as caught:
        node.wire(plan, ["n1", "n2"])
    assert caught.value.code == Code.NODE and node.tables() == set() and node.links() == {"theirs"}


def test_a_subnet_that_the_node_routes_is_refused(nodes: list[Node]) -> None:
    node, plan = nodes[0], net.plan_for(nodes[0], "12.s", ["n1"])

    def route() -> None:
        with links.netlink() as ip:
            ip.route("add", dst="10.128.0.0/9", gateway="10.66.0.3")

    node.do(lambda: net.in_thread(route))
    with pytest.raises(VTorqueError, match=r"overlaps the node's route to 10\.128\.0\.0/9; .*network\.job\.subnets"):
        node.wire(plan, ["n1"])
    assert node.tables() == set()


@pytest.mark.parametrize(
    ("nodes_of_job", "message"),
    [
        (["localhost", "n2"], r"localhost \(network\.job\.peer\) is 127\.0\.0\.1 here"),
        (["n2", "n3"], r"n2 \(network\.job\.peer\) is 10\.66\.0\.2, which is no address of this node"),
        (["n1", "n4.invalid"], r"the address of n4\.invalid \(network\.job\.peer\) is not known"),
        (["n1", "10.66.0.1"], r"two nodes of the job have the address 10\.66\.0\.1"),
    ],
)
def test_nodes_must_be_known_by_their_addresses(nodes: list[Node], nodes_of_job: list[str], message: str) -> None:
    node, plan = nodes[0], net.plan_for(nodes[0], "12.s", nodes_of_job)
    with pytest.raises(VTorqueError, match=message) as caught:
        node.run(connect(plan, 0, nodes_of_job, node.config, node.place("12.s")))
    assert caught.value.code == Code.NODE and node.tables() == set()


def test_a_job_on_one_node_needs_no_address_of_it(nodes: list[Node]) -> None:
    """Its guests reach each other, and nothing carries their network."""
    node, plan = nodes[0], net.plan_for(nodes[0], "12.s", ["n4.invalid"], 2)
    wires = node.run(connect(plan, 0, ["n4.invalid"], node.config, node.place("12.s")))
    first, second = plan.members
    packet = ipv4(str(first.address), str(second.address), net.UDP, udp(9, 9, b"hello"))
    frame = ethernet(first.mac, second.mac, net.IPV4, packet)
    send(wires.taps[0], frame)
    assert frame in until([wires.taps[1]], b"hello")
    assert wires.mtu is None and node.links() == set()
    node.run(wires.close())
    assert node.tables() == set()


AGENT = """\
import asyncio, json, sys
from vmgr.config import Config
from vmgr.node import record
from vmgr.node.network.plan import plan_network
from vmgr.node.network.wires import connect
from vmgr.schema import check_config

async def live():
    tree = json.loads(sys.argv[1])
    config = Config("x", check_config(tree), {})
    place = record.new_place(config.paths, "12.s")
    lock, listener = record.create(place, {})
    nodes = sys.argv[2:]
    wires = await connect(plan_network("job", "12.s", nodes, 2, config.network), 0, nodes, config, place)
    print("connected", flush=True)
    await asyncio.sleep(600)

asyncio.run(live())
"""


def test_what_a_killed_agent_leaves_is_undone(outside: list[Node]) -> None:
    node = outside[0]
    addresses = [node.address]
    plan = net.plan_for(node, "12.s", addresses)
    paths = {key: str(value) for key, value in node.config.paths._asdict().items()}
    tree = json.dumps({"paths": paths, "network": {"job": {"nat": True}}})
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{AGENT}"
    agent = node.do(lambda: subprocess.Popen([sys.executable, "-c", code, tree, *addresses], stdout=subprocess.PIPE))
    assert agent.stdout is not None
    with agent.stdout:
        assert agent.stdout.readline() == b"connected\n"
        assert node.links() == {f"vt{plan.name}"}
        agent.send_signal(signal.SIGKILL)
        agent.wait()
    assert net.eventually(lambda: node.links() == set())

    def again() -> None:
        with links.netlink() as ip:  # refused as long as there is a link with this number
            links.vxlan(ip, "again", plan.vni, PORT, node.address, node.namespace)
            ip.link("del", index=links.index_of(ip, "again"))

    node.do(lambda: net.in_thread(again))
    assert node.tables() == {plan.table}
    (place,) = record.places(node.config.paths)
    said = node.do(lambda: net.in_thread(lambda: reap(node.config)))
    assert said == [f"attempt 12.s {place.attempt}"]
    assert node.tables() == set() and not place.folder.exists()


def test_an_older_attempts_undoing_spares_a_newer_one_of_the_same_job(nodes: list[Node]) -> None:
    node, plan = nodes[0], net.plan_for(nodes[0], "12.s", ["n1"])
    node.run(node.wire(plan, ["n1"]).close())
    step = record_step(node)
    (old,) = record.places(node.config.paths)
    undo(old)
    new = old._replace(folder=old.folder.with_name(f"{old.attempt}-again"))
    record.make_folder(new.folder, 0o700)
    wires = node.wire(plan, ["n1"], new)
    node.do(lambda: undo_network(step))
    assert node.tables() == {plan.table}
    node.run(wires.close())
    assert node.tables() == set()


def test_the_janitor_removes_tables_that_no_record_names(nodes: list[Node], job: Job) -> None:
    node = nodes[0]
    mine = nft.mark_of(record.places(node.config.paths)[0])
    tables = [nft.Table("inet", "vtorque-00ff00", mine), nft.Table("netdev", "vtorque-00ff01", "of-0badcafe-1")]

    def add() -> None:
        for table in tables:
            nft.run(rules.create(table))

    node.do(add)
    assert node.do(lambda: reap(node.config, dry_run=True)) == ["packet filter inet vtorque-00ff00"]
    assert node.do(lambda: reap(node.config)) == ["packet filter inet vtorque-00ff00"]
    assert node.tables() == {job.plan.table, "vtorque-00ff01"}  # of another spool: somebody else's
    node.do(lambda: nft.remove(tables[1]))


def test_the_janitor_removes_links_that_no_record_names(nodes: list[Node], job: Job) -> None:
    node = nodes[0]
    mine = nft.mark_of(record.places(node.config.paths)[0])

    def add() -> None:
        with links.netlink() as ip:
            for name, mark in (("vt00ff00-1", mine), ("vt00ff01-1", "of-0badcafe-1"), ("vt00ff02-1", None)):
                ip.link("add", ifname=name, kind="veth", peer={"ifname": f"p{name[6:]}"})
                if mark is not None:
                    links.sign(ip, links.index_of(ip, name), mark)

    node.do(lambda: net.in_thread(add))
    try:
        before = node.links()
        assert node.do(lambda: net.in_thread(lambda: reap(node.config, dry_run=True))) == ["link vt00ff00-1"]
        assert node.do(lambda: net.in_thread(lambda: reap(node.config))) == ["link vt00ff00-1"]
        assert before - node.links() == {"vt00ff00-1", "p00-1"}, "nor anybody else's"
        assert node.do(lambda: net.in_thread(lambda: reap(node.config))) == []
    finally:
        for name in ("vt00ff01-1", "vt00ff02-1"):
            node.do(lambda name=name: net.in_thread(lambda: links.remove(name)))


# a bridge of the site's

SITE = {"name": "br0", "addresses": "pool", "pool": {"n1": "10.66.0.20-10.66.0.23/24"}, "gateway": "10.66.0.22"}


@pytest.fixture
def site(base: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Node, socket.socket]]:
    """A node with a bridge, and a socket that hears every frame on the site's Ethernet."""
    with cluster(base, ["n1"], bridge=request.param) as (node,):

        def make() -> None:
            with links.netlink() as ip:
                ip.link("add", ifname="br0", kind="bridge", br_stp_state=0, br_forward_delay=0)
                ip.link("add", ifname="port", kind="veth", peer={"ifname": "site"})
                bridge = links.index_of(ip, "br0")
                links.up(ip, links.index_of(ip, "port"), master=bridge)
                links.up(ip, links.index_of(ip, "site"))
                links.up(ip, bridge)

        node.do(lambda: net.in_thread(make))
        wire = node.do(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
        with wire:
            wire.bind(("site", 0))
            wire.settimeout(10)
            yield node, wire


def heard(wire: socket.socket, last: bytes) -> list[bytes]:
    frames = []
    while not frames or not frames[-1].endswith(last):
        frames.append(wire.recv(65536))
    return frames


ROUTER_ADVERTISEMENT = b"\x86\0\0\0" + bytes(12)


def of_a_guest(mac: str, address: str) -> dict[str, bytes]:
    """Frames of a guest that calls itself so, each with its name at its end."""

    def v4(source: str, sport: int, dport: int) -> bytes:
        return ethernet(mac, BROADCAST, net.IPV4, ipv4(source, "255.255.255.255", net.UDP, udp(sport, dport, b"")))

    def v6(protocol: int, body: bytes) -> bytes:
        head = struct.pack("!IHBB", 6 << 28, len(body), protocol, 255)
        return ethernet(mac, BROADCAST, net.IPV6, head + bytes(15) + b"\1" + bytes(15) + b"\2" + body)

    def fragment6(kind: int, body: bytes) -> bytes:
        """The first fragment of a packet of IPv6."""
        return v6(44, struct.pack("!BBHI", kind, 0, 1, 7) + body)

    first = ipv4(address, "255.255.255.255", net.UDP, udp(9, PORT, bytes(16)), fragment=0x2000)
    frames = {
        "IPv4": v4(address, 9, 9),
        "ARP": arp(mac, mac, address, "10.66.0.1"),
        "DHCP question": v4("0.0.0.0", 68, 67),
        "IPv6": v6(net.UDP, udp(9, 9, bytes(8))),
        "DHCP answer": v4(address, 67, 68),
        "DHCPv6 answer": v6(net.UDP, udp(547, 546, bytes(8))),
        "router advertisement": v6(58, ROUTER_ADVERTISEMENT),
        "UDP to the VXLAN port": v4(address, 9, PORT),
        "UDP over IPv6 to the VXLAN port": v6(net.UDP, udp(9, PORT, bytes(8))),
        "fragment to the VXLAN port": ethernet(mac, BROADCAST, net.IPV4, first),
        "fragment of IPv6": fragment6(net.UDP, udp(9, 9, bytes(8))),
        "fragment of IPv6 to the VXLAN port": fragment6(net.UDP, udp(9, PORT, bytes(8))),
        "fragment of a router advertisement": fragment6(58, ROUTER_ADVERTISEMENT),
        "fragment that hides its port": fragment6(60, struct.pack("!BB6s", net.UDP, 0, b"\1\4")),
        "ARP about another MAC": arp(mac, "02:00:00:00:00:99", address, "10.66.0.1"),
        "VLAN": ethernet(mac, BROADCAST, net.VLAN, b"\0\5\x08\0" + v4(address, 9, 9)[14:]),
    }
    return {name: frame + name.encode() for name, frame in frames.items()}


@pytest.mark.parametrize("site", [{"name": "br0"}], indirect=True)
def test_a_guest_with_dhcp_asks_but_does_not_answer(site: tuple[Node, socket.socket]) -> None:
    node, wire = site
    plan = net.plan_for(node, "12.s", ["n1"], kind="bridge")
    wires = node.wire(plan, ["n1"])
    try:
        assert wires.addresses == [None, None] and wires.mtu == 1500
        frames = of_a_guest(plan.members[0].mac, "10.66.0.77")
        wrong = {f"{name}, forged": frame[:6] + net.mac(plan.members[1].mac) + frame[12:] + b", forged"
                 for name, frame in frames.items()}  # fmt: skip
        for frame in [*wrong.values(), *frames.values(), frames["IPv4"] + b", the last one"]:
            send(wires.taps[0], frame)
        seen = heard(wire, b", the last one")
        assert came({**frames, **wrong}, seen) == {"IPv4", "ARP", "DHCP question", "IPv6", "fragment of IPv6"}
        node.do(lambda: nft.run([{"delete": {"table": {"family": "netdev", "name": plan.table}}}]))
        for frame in [*wrong.values(), *frames.values(), frames["IPv4"] + b", the last one"]:
            send(wires.taps[0], frame)
        untagged = {name for name in {**frames, **wrong} if not name.startswith("VLAN")}
        assert came({**frames, **wrong}, heard(wire, b", the last one")) >= untagged
    finally:
        node.run(wires.close())


@pytest.mark.parametrize("site", [{"name": "br0"}], indirect=True)
def test_a_bridge_keeps_its_address(site: tuple[Node, socket.socket]) -> None:
    """It takes the lowest of its ports', and the node would get another one with each guest."""
    node, _ = site

    def address(high: str = "") -> str:
        with links.netlink() as ip:
            if high:
                ip.link("set", index=links.index_of(ip, "port"), address=high)
            return str(ip.get_links(links.index_of(ip, "br0"))[0].get_attr("IFLA_ADDRESS"))

    first = "fc:ff:ff:ff:ff:ff"  # higher than any that the kernel makes up, but one in 64
    assert node.do(lambda: net.in_thread(lambda: address(first))) == first
    wires = node.wire(net.plan_for(node, "12.s", ["n1"], kind="bridge"), ["n1"])
    try:
        assert node.do(lambda: net.in_thread(address)) == first
    finally:
        node.run(wires.close())
    assert node.do(lambda: net.in_thread(address)) == first


@pytest.mark.parametrize("site", [SITE], indirect=True)
def test_guests_have_addresses_of_the_pool_and_keep_to_them(site: tuple[Node, socket.socket]) -> None:
    node, wire = site
    plan, other = (net.plan_for(node, job, ["n1"], kind="bridge") for job in ("12.s", "13.s"))
    wires = node.wire(plan, ["n1"])
    try:
        assert wires.addresses == ["10.66.0.20/24", "10.66.0.21/24"] and wires.gateways == ["10.66.0.22"] * 2
        with pytest.raises(VTorqueError, match="only 1 are free for 2 guests") as caught:
            node.wire(other, ["n1"])  # .22 is the gateway's, .23 is left
        assert caught.value.code == Code.NODE
        mac = plan.members[0].mac
        own, foreign = of_a_guest(mac, "10.66.0.20"), of_a_guest(mac, "10.66.0.21")

        def pass_through() -> tuple[set[str], set[str]]:
            for frame in (*foreign.values(), *own.values(), own["IPv4"] + b", the last one"):
                send(wires.taps[0], frame)
            seen = [frame for frame in heard(wire, b", the last one") if frame[12:14] != b"\x81\0"]
            return {name for name in own if own[name] in seen}, {name for name in foreign if foreign[name] in seen}

        assert pass_through() == ({"IPv4", "ARP"}, set())
        node.do(lambda: nft.run([{"delete": {"table": {"family": "netdev", "name": plan.table}}}]))
        untagged = set(own) - {"VLAN"}
        assert pass_through() == (untagged, untagged)
    finally:
        node.run(wires.close())


@pytest.mark.parametrize("site", [SITE], indirect=True)
def test_open_checksums_change_no_address_behind_the_filter(site: tuple[Node, socket.socket]) -> None:
    node, wire = site
    plan = net.plan_for(node, "12.s", ["n1"], kind="bridge")
    wires = node.wire(plan, ["n1"])
    try:
        node.do(lambda: net.offload_checksums("port", False))  # as the node's card writes them
        mac = plan.members[0].mac
        body = ipv4("10.66.0.20", "255.255.255.255", net.UDP, udp(9, 9, b"forged"))
        frame = net.adjust(ethernet(mac, BROADCAST, net.IPV4, body), 20, 0xC0A8)
        last = ethernet(mac, BROADCAST, net.IPV4, ipv4("10.66.0.20", "255.255.255.255", net.UDP, udp(9, 9, b"last")))

        def addresses() -> set[bytes]:
            send(wires.taps[0], frame, net.open_checksum(20, 6))
            send(wires.taps[0], last)
            return {seen[26:30] for seen in heard(wire, b"last") if b"forged" in seen}

        assert addresses() == set()
        namespace = fcntl.ioctl(wires.taps[0], SIOCGSKNS)
        try:
            with links.inside(namespace):
                net.offload_checksums("port1", True)
        finally:
            os.close(namespace)
        assert addresses() == {bytes([0xC0, 0xA8, 0, 20])}
    finally:
        node.run(wires.close())


HOLD = """\
import errno, fcntl, sys
for request, argument in ((0x894C, 0), (0x400454CA, b"tap9".ljust(16, b"\\0") + b"\\2\\x50".ljust(24, b"\\0"))):
    try:
        fcntl.ioctl(int(sys.argv[1]), request, argument)
        print("done", end=" ")
    except OSError as err:
        print(errno.errorcode[err.errno], end=" ")
"""


@pytest.mark.parametrize("site", [SITE], indirect=True)
def test_who_holds_a_tap_gets_no_namespace_and_no_other_tap(site: tuple[Node, socket.socket], user: User) -> None:
    node, _ = site
    wires = node.wire(net.plan_for(node, "12.s", ["n1"], kind="bridge"), ["n1"])

    def hold(**who: Any) -> list[str]:
        argv = ["/usr/bin/python3", "-c", HOLD, str(wires.taps[0])]
        return subprocess.run(
            argv, pass_fds=[wires.taps[0]], capture_output=True, text=True, check=True, **who
        ).stdout.split()

    try:
        assert hold(user=user.uid, group=user.gid, extra_groups=[]) == ["EPERM", "EEXIST"]
        assert hold() == ["done", "EEXIST"]
    finally:
        node.run(wires.close())


SCRIPT = "#!/bin/sh\necho 10.66.0.1$3/24 10.66.0.1\n"


@pytest.mark.parametrize("site", [{"name": "br0", "addresses": "command", "command": "/nonexistent"}], indirect=True)
def test_the_sites_program_gives_addresses(site: tuple[Node, socket.socket], base: Path) -> None:
    node, _ = site
    plan = net.plan_for(node, "12.s", ["n1"], kind="bridge")
    command = base / "addresses"
    network = node.config.network
    node.config.__dict__["network"] = network._replace(bridge=network.bridge._replace(command=str(command)))
    for script, message in (
        ("#!/bin/sh\nexit 3\n", r"\(n1 2 1\) ends with status 3"),
        ("#!/bin/sh\necho no\n", r"\(n1 2 1\): one line `address/prefix"),
        ("#!/bin/sh\nexec yes\n", "prints more than 4096 bytes"),
        ("#!/bin/sh\necho 10.66.0.9/24\n", "two guests would have the same address"),
    ):
        command.write_text(script)
        command.chmod(0o755)
        with pytest.raises(VTorqueError, match=message) as caught:
            node.wire(plan, ["n1"])
        assert caught.value.code == Code.NODE
    command.write_text(SCRIPT)
    command.chmod(0o777)
    with pytest.raises(VTorqueError, match="is writable by others") as caught:
        node.wire(plan, ["n1"])
    assert caught.value.code == Code.TRUST and node.tables() == set()
    command.chmod(0o755)
    wires = node.wire(plan, ["n1"])
    assert wires.addresses == ["10.66.0.11/24", "10.66.0.12/24"] and wires.gateways == ["10.66.0.1"] * 2
    node.run(wires.close())


@pytest.mark.parametrize("site", [SITE], indirect=True)
def test_who_holds_a_tap_changes_nothing_on_the_node(site: tuple[Node, socket.socket]) -> None:
    node, _ = site
    plan = net.plan_for(node, "12.s", ["n1"], kind="bridge")
    wires = node.wire(plan, ["n1"])
    own = {f"vt{plan.name}-1", f"vt{plan.name}-2"}
    assert own < node.links()
    held = os.dup(wires.taps[0])
    try:
        router = "02:00:00:00:77:01"  # both need no privilege of the descriptor's holder
        fcntl.ioctl(held, 0x8924, struct.pack("16sH6s8x", b"tap1", 1, net.mac(router)))  # SIOCSIFHWADDR
        fcntl.ioctl(held, 0x400454CB, 1)  # TUNSETPERSIST

        def known() -> set[str]:
            with links.netlink() as ip:
                return {entry.get_attr("NDA_LLADDR") for entry in ip.fdb("dump")}

        assert router not in node.do(lambda: net.in_thread(known))
        node.run(wires.close())
        assert not own & node.links() and node.tables() == set()
    finally:
        os.close(held)
    assert not own & node.links()


@pytest.mark.parametrize("site", [{"name": "br7"}], indirect=True)
def test_a_bridge_that_is_not_there_is_refused(site: tuple[Node, socket.socket]) -> None:
    node, _ = site
    with pytest.raises(VTorqueError, match=r"no bridge br7 \(network\.bridge\.name\)") as caught:
        node.wire(net.plan_for(node, "12.s", ["n1"], kind="bridge"), ["n1"])
    assert caught.value.code == Code.NODE and node.tables() == set()
