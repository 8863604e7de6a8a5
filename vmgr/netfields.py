"""Kinds of settings of the section `network`: addresses, ranges of them, names. As in `fields`, each gives plain data.

`ipaddress` is loaded by those that need it: a configuration that sets none of them is read without.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ipaddress import IPv4Address

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DOMAIN = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
_PEER = re.compile(r"[A-Za-z0-9.-]{0,100}\{node\}[A-Za-z0-9.-]{0,100}")


class Range(NamedTuple):
    """Addresses from `first` to `last`, both in a network of this `prefix` length."""

    first: IPv4Address
    last: IPv4Address
    prefix: int


def ipv4(value: Any) -> str:
    from ipaddress import IPv4Address

    try:
        if isinstance(value, str):
            return str(IPv4Address(value))
    except ValueError:
        pass
    raise ValueError("an IPv4 address is needed")


def ipv4s(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("a list of IPv4 addresses is needed")
    try:
        return [ipv4(item) for item in value]
    except ValueError:
        raise ValueError("a list of IPv4 addresses is needed") from None


def subnets(value: Any) -> str:
    """A network to take subnets from."""
    from ipaddress import IPv4Network

    try:
        if isinstance(value, str) and "/" in value:
            return str(IPv4Network(value))
    except ValueError:
        pass
    raise ValueError("an IPv4 network such as 10.128.0.0/9, its host bits 0, is needed")


def address_range(value: Any) -> str:
    parse_range(value)
    return str(value)


def parse_range(value: Any) -> Range:
    """A range such as `10.1.2.10-10.1.2.40/24`: host addresses of one network. Raises ValueError."""
    from ipaddress import IPv4Address, IPv4Network

    try:
        found = re.fullmatch(r"([0-9.]+)-([0-9.]+)/([0-9]{1,2})", value) if isinstance(value, str) else None
        if found:
            first, last, prefix = IPv4Address(found[1]), IPv4Address(found[2]), int(found[3])
            network = IPv4Network((first, prefix), strict=False)
            ends = {network.network_address, network.broadcast_address} if prefix < 31 else set()
            if first <= last and last in network and not ends & {first, last}:
                return Range(first, last, prefix)
    except ValueError:
        pass
    raise ValueError("a range of host addresses of one network, such as 10.1.2.10-10.1.2.40/24, is needed")


def link_name(value: Any) -> str:
    """The name of a network interface."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,15}", value) or value in (".", ".."):
        raise ValueError("the name of a network interface, up to 15 letters, digits, `-`, `_` and `.`, is needed")
    return value


def domain(value: Any) -> str:
    if not isinstance(value, str) or not _DOMAIN.fullmatch(value):
        raise ValueError("a domain name is needed")
    return value


def is_host(text: str) -> bool:
    """Whether it is a host name or an IPv4 address."""
    return _DOMAIN.fullmatch(text) is not None


def domains(value: Any) -> list[str]:
    return _names(value, "domain names")


def hosts(value: Any) -> list[str]:
    return _names(value, "host names or addresses")


def _names(value: Any, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) and _DOMAIN.fullmatch(item) for item in value):
        raise ValueError(f"a list of {what} is needed")
    return value


def peer(value: Any) -> str:
    """How a node is called where its address is looked up."""
    if not isinstance(value, str) or not _PEER.fullmatch(value):
        raise ValueError('a host name with {node} in it, such as "{node}-ib" (in quotes), is needed')
    return value


def ports(value: Any) -> str:
    parse_ports(value)
    return str(value)


def parse_ports(value: Any) -> range:
    """The ports in `22000-22999`. Raises ValueError."""
    found = re.fullmatch(r"([0-9]{4,5})-([0-9]{4,5})", value) if isinstance(value, str) else None
    if not found or not 1024 <= int(found[1]) <= int(found[2]) <= 65535:
        raise ValueError('a range of ports from 1024 to 65535, such as "22000-22999", is needed')
    return range(int(found[1]), int(found[2]) + 1)
