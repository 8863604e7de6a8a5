"""Links, addresses and taps in network namespaces: the thin layer over netlink (pyroute2) and ioctl.

All of it acts in the network namespace of the calling thread, and is for a thread of its own: pyroute2, imported only
here, takes 150 ms to load. Numbers are those of <sched.h> and <linux/if_tun.h>; Python 3.9 has no `os.setns`.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Optional

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x8000
_SIOCETHTOOL, _ETHTOOL_STXCSUM = 0x8946, 0x17

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(status: int, what: str) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def open_namespace() -> int:
    """A descriptor of the calling thread's network namespace."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Be in another network namespace meanwhile. Raises OSError."""
    own = open_namespace()
    try:
        _checked(_libc.setns(namespace, _CLONE_NEWNET), "setns")
        try:
            yield
        finally:
            _checked(_libc.setns(own, _CLONE_NEWNET), "setns")
    finally:
        os.close(own)


def new_namespace() -> int:
    """A network namespace that lives as long as a descriptor of it, or of a tap in it. Raises OSError.

    Nothing in it speaks IPv6, and its bridges keep frames from the packet filter for IP even where the node's do not.
    """
    own = open_namespace()
    try:
        _checked(_libc.unshare(_CLONE_NEWNET), "unshare")
        try:
            made = open_namespace()
            try:
                for name in ("all", "default"):
                    set_if_there(f"ipv6/conf/{name}/disable_ipv6", "1")
                for name in ("iptables", "ip6tables", "arptables"):
                    set_if_there(f"bridge/bridge-nf-call-{name}", "0")
            except BaseException:
                os.close(made)
                raise
            return made
        finally:
            _checked(_libc.setns(own, _CLONE_NEWNET), "setns")
    finally:
        os.close(own)


def set_if_there(key: str, value: str) -> None:
    """Set a value below /proc/sys/net of this namespace; one that this kernel has not is left. Raises OSError."""
    path = Path("/proc/sys/net") / key
    if path.exists():
        path.write_text(value)


def netlink() -> Any:
    """A connection to this namespace; use it as a context."""
    from pyroute2 import IPRoute

    return IPRoute()


def is_exists(error: Exception) -> bool:
    """Whether the kernel refused because there is such a thing."""
    return getattr(error, "code", None) == errno.EEXIST


def is_of_netlink(error: Exception) -> bool:
    """Whether this is an error of pyroute2's own, which has no base but that of all."""
    from pyroute2.netlink.exceptions import NetlinkError

    return isinstance(error, NetlinkError)


def is_there(name: str) -> bool:
    """Whether this namespace has a link of this name."""
    try:
        return socket.if_nametoindex(name) > 0
    except OSError:
        return False


def index_of(ip: Any, name: str) -> int:
    """A link's number. Raises OSError."""
    found = ip.link_lookup(ifname=name)
    if not found:
        raise OSError(f"there is no network interface {name}")
    return int(found[0])


def addresses(ip: Any) -> dict[str, int]:
    """The IPv4 addresses of this namespace, and the number of the link that has each."""
    return {addr.get_attr("IFA_LOCAL"): addr["index"] for addr in ip.get_addr(family=socket.AF_INET)}


def mtu_of(ip: Any, index: int) -> int:
    return int(ip.get_links(index)[0].get_attr("IFLA_MTU"))


def routed(ip: Any) -> list[IPv4Network]:
    """Where routes of this namespace lead, but for the default routes."""
    routes = [(route.get_attr("RTA_DST"), route["dst_len"]) for route in ip.get_routes(family=socket.AF_INET)]
    return [IPv4Network((to, length), strict=False) for to, length in routes if to and length]


def tap(name: str) -> int:
    """A new tap, as the descriptor that it lives by: frames with the header of virtio-net (10 bytes) before them.

    Raises OSError.
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except BaseException:
        os.close(fd)
        raise
    return fd


def behind_others(mac: str) -> str:
    """A guest's MAC address, changed for its port on a bridge: high, so that the bridge does not take it for its own.

    A bridge has the lowest address of its ports (net/bridge/br_stp_if.c) where it was not given one. That of a node,
    with the node's own address on it, would change with each guest, and others would not find the node for a while.
    """
    return f"fe{mac[2:]}"


def bridge(ip: Any, name: str) -> int:
    """A bridge that forwards at once; gives its number."""
    ip.link("add", ifname=name, kind="bridge", br_stp_state=0, br_forward_delay=0)
    return index_of(ip, name)


def vxlan(ip: Any, name: str, vni: int, port: int, local: str, namespace: int) -> None:
    """A VXLAN link in `namespace` whose packets go through the calling thread's. It learns nothing by itself.

    ARP does not pass it: it answers for whom it knows.
    """
    ip.link(
        "add", ifname=name, kind="vxlan", vxlan_id=vni, vxlan_port=port, vxlan_local=local, vxlan_learning=False,
        vxlan_proxy=True, net_ns_fd=namespace,
    )  # fmt: skip


def complete_checksums(name: str) -> None:
    """Have checksums that a guest left open written before its packets leave through this link. Raises OSError.

    The header of virtio-net says where in the packet that is to be done, and a guest may say anything: also where its
    address or its ports stand. Otherwise the node's network card does it, after all filters (seen).
    """
    value = array.array("I", (_ETHTOOL_STXCSUM, 0))
    request = struct.pack("16sP16x", name.encode(), value.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        fcntl.ioctl(link, _SIOCETHTOOL, request)


def up(ip: Any, index: int, *, mtu: Optional[int] = None, master: Optional[int] = None) -> None:
    """Set a link's MTU and bridge, then set it up."""
    if mtu is not None:
        ip.link("set", index=index, mtu=mtu)
    if master is not None:
        ip.link("set", index=index, master=master)
    ip.link("set", index=index, state="up")


def sign(ip: Any, index: int, mark: str) -> None:
    """Write on a link whose it is (its alias)."""
    ip.link("set", index=index, IFLA_IFALIAS=mark)


def remove(name: str, mark: Optional[str] = None) -> None:
    """Remove a link, if it is there, and with a mark only one that bears it. Raises OSError.

    A name is looked up first without pyroute2: mostly the link is gone, and this is done in epilogues.
    """
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        return
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with netlink() as ip:
            if mark is None or ip.get_links(index)[0].get_attr("IFLA_IFALIAS") == mark:
                ip.link("del", index=index)
    except NetlinkError as err:
        if err.code != errno.ENODEV:
            raise OSError(err.code, str(err)) from None
