"""The network of simulated nodes: a switch in a network namespace of its own, and a link to it from everybody.

Only descriptors of the daemon hold that namespace, so when the daemon is gone the kernel removes the switch and all
links, the host's among them. Where the host filters what its bridges carry, this one is not concerned.

Everything here runs in short-lived children: pyroute2 takes a sixth of a second to load, and 20 MB.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, NoReturn

from vsub.engines.local import namespaces

SUBNETS = ipaddress.IPv4Network("10.77.0.0/16")
"""The address ranges of 256 addresses that are tried lie in here."""

_SWITCH = "switch"
_UPLINK = "host"
_NODE_LINK = "eth0"


class Subnet(NamedTuple):
    """Addresses: the host's end is number 1, node n1 number 2 and so on."""

    network: ipaddress.IPv4Network

    @property
    def host(self) -> str:
        return str(self.network[1])

    def node(self, index: int) -> str:
        return str(self.network[index + 2])


def link_name(spool: Path) -> str:
    """The host's link to the nodes of the daemon of a spool: 15 characters, as long as Linux allows."""
    return f"vtlocal{hashlib.sha256(os.fsencode(spool)).hexdigest()[:8]}"


def choose(link: str, used: Iterable[ipaddress.IPv4Network]) -> Subnet:
    """The first range of addresses that is free, from where the link's name says. Raises OSError."""
    taken = list(used)
    ranges: list[ipaddress.IPv4Network] = list(SUBNETS.subnets(new_prefix=24))
    first = int(link[-8:], 16) % len(ranges)
    for network in ranges[first:] + ranges[:first]:
        if not any(network.overlaps(other) for other in taken):
            return Subnet(network)
    raise OSError(f"no addresses for nodes: every range of 256 in {SUBNETS} is in use on this machine")


def _run_body(body: Callable[[], Any], tell: int) -> NoReturn:
    status = 1
    try:
        namespaces.die_with_parent()
        os.write(tell, json.dumps({"result": body()}).encode())
        status = 0
    except BaseException as error:
        os.write(tell, json.dumps({"error": str(error) or type(error).__name__}).encode())
    finally:
        os._exit(status)


def _in_child(body: Callable[[], Any]) -> Any:
    """What `body` gives, as plain data, run in a child. Raises OSError with what went wrong there."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run_body(body, tell)
    os.close(tell)
    with open(told, "rb") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    answer = json.loads(text) if text else {"error": "the child that sets up the nodes' network was killed"}
    if "error" in answer:
        raise OSError(f"the nodes' network: {answer['error']}")
    return answer["result"]


def _used(routes: Iterable[Any]) -> list[ipaddress.IPv4Network]:
    """The ranges of addresses that routes lead to, but for the default routes."""
    found = [(route.get_attr("RTA_DST"), route["dst_len"]) for route in routes]
    return [ipaddress.IPv4Network((to, length), strict=False) for to, length in found if to and length]


def _delete(ip: Any, link: str) -> None:
    for index in ip.link_lookup(ifname=link):
        try:
            ip.link("del", index=index)
        except Exception as error:  # pyroute2's own, which has no base but this one's
            if getattr(error, "code", None) not in (19,):  # ENODEV: the kernel was faster
                raise


def _connect(link: str, switch: int, nodes: Sequence[tuple[str, int]]) -> str:
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        _delete(ip, link)
        subnet = choose(link, _used(ip.get_routes(family=2)))
        ip.link("add", ifname=link, kind="veth", peer={"ifname": _UPLINK, "net_ns_fd": switch})
        _address(ip, link, subnet.host)
    namespaces.setns(switch, namespaces.NEWNET)
    with IPRoute() as ip:
        ip.link("add", ifname=_SWITCH, kind="bridge")
        bridge = ip.link_lookup(ifname=_SWITCH)[0]
        ip.link("set", index=bridge, state="up")
        for name, descriptor in nodes:
            ip.link("add", ifname=name, kind="veth", peer={"ifname": _NODE_LINK, "net_ns_fd": descriptor})
        for name in (_UPLINK, *(name for name, _ in nodes)):
            ip.link("set", index=ip.link_lookup(ifname=name)[0], master=bridge, state="up")
    for index, (_, descriptor) in enumerate(nodes):
        namespaces.setns(descriptor, namespaces.NEWNET)
        with IPRoute() as ip:
            ip.link("set", index=ip.link_lookup(ifname="lo")[0], state="up")
            _address(ip, _NODE_LINK, subnet.node(index))
            ip.route("add", dst="default", gateway=subnet.host)
    return str(subnet.network)


def _address(ip: Any, link: str, address: str) -> None:
    index = ip.link_lookup(ifname=link)[0]
    ip.addr("add", index=index, address=address, prefixlen=24)
    ip.link("set", index=index, state="up")


def connect(link: str, switch: int, nodes: Sequence[tuple[str, int]]) -> Subnet:
    """Connect host and nodes through a switch in the network namespace `switch`; the nodes are name and namespace.

    A link of this name that an earlier daemon left is removed first. Raises OSError.
    """
    return Subnet(ipaddress.IPv4Network(_in_child(lambda: _connect(link, switch, nodes))))


def disconnect(link: str) -> None:
    """Remove the host's link, if it is still there. Raises OSError."""

    def body() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as ip:
            _delete(ip, link)

    if Path(f"/sys/class/net/{link}").exists():
        _in_child(body)
