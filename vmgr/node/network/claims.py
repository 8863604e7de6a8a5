"""What attempts on this node have claimed of its network, by their records: pure functions of recorded steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network
from typing import Any, NamedTuple, Optional

from vmgr.errors import Code, VTorqueError

LINK_LOCAL = IPv4Network("169.254.0.0/16")
_HINT = "submit again, later or for other nodes"


class Claim(NamedTuple):
    """The recorded step of an attempt: all that is to be undone, and all that no other attempt may use.

    `tables` are family and name of tables of the packet filter, `links` names of links, both in the node's namespace
    and bearing `mark`. `pair` is the network of the two links to the outside.
    """

    mark: str
    vni: int
    subnet: Optional[str]
    macs: tuple[str, ...]
    addresses: tuple[str, ...]
    pair: Optional[str]
    tables: tuple[tuple[str, str], ...]
    links: tuple[str, ...]

    def step(self) -> dict[str, Any]:
        return {"do": "network", **self._asdict()}


def claim_of(step: dict[str, Any]) -> Claim:
    """The claim in a recorded step. Raises KeyError, TypeError, ValueError for what is none."""
    return Claim(
        mark=str(step["mark"]),
        vni=int(step["vni"]),
        subnet=None if step["subnet"] is None else str(step["subnet"]),
        macs=tuple(map(str, step["macs"])),
        addresses=tuple(map(str, step["addresses"])),
        pair=None if step["pair"] is None else str(step["pair"]),
        tables=tuple((str(family), str(name)) for family, name in step["tables"]),
        links=tuple(map(str, step["links"])),
    )


def check(claim: Claim, others: Iterable[Claim], routes: Iterable[IPv4Network]) -> None:
    """Refuse a claim to what another attempt has, or to addresses that the node routes elsewhere.

    Raises VTorqueError (VT-NODE), which tells nothing of the other job.
    """
    others = list(others)
    subnet = None if claim.subnet is None else IPv4Network(claim.subnet)
    for other in others:
        if other.vni == claim.vni:
            raise _used(f"the number {claim.vni} of the job's network")
        if subnet is not None and other.subnet is not None and subnet.overlaps(IPv4Network(other.subnet)):
            raise _used(f"the subnet {subnet} of the job's network")
        for what, own, theirs in (
            ("MAC address", claim.macs, other.macs),
            ("address", claim.addresses, other.addresses),
        ):
            twice = set(own) & set(theirs)
            if twice:
                raise _used(f"the {what} {min(twice)} of a guest")
    if len(set(claim.addresses)) < len(claim.addresses):
        raise VTorqueError("two guests would have the same address", code=Code.NODE, hint="ask the administrator")
    if subnet is not None:
        for route in routes:
            if subnet.overlaps(route):
                raise VTorqueError(
                    f"the subnet {subnet} of the job's network overlaps the node's route to {route}", code=Code.NODE,
                    hint="the administrator can set network.job.subnets to addresses that the site does not use",
                )  # fmt: skip


def _used(what: str) -> VTorqueError:
    return VTorqueError(f"{what} is in use on this node", code=Code.NODE, hint=_HINT)


def choose_pair(vni: int, others: Iterable[Claim], routes: Sequence[IPv4Network]) -> IPv4Network:
    """A network of two addresses, free on this node, for the way out of a job's network. Raises VTorqueError (VT-NODE).

    The first and last 256 addresses of the range are reserved (RFC 3927), and 169.254.169.0/24 is where clouds have
    their services.
    """
    taken = [IPv4Network(other.pair) for other in others if other.pair is not None]
    taken += [route for route in routes if route != LINK_LOCAL]
    count = 1 << (30 - LINK_LOCAL.prefixlen)
    for number in range(count):
        at = int(LINK_LOCAL.network_address) + (vni + number) % count * 4
        pair = IPv4Network((at, 30))
        if (at >> 8 & 0xFF) not in (0, 169, 255) and not any(pair.overlaps(other) for other in taken):
            return pair
    raise VTorqueError(f"no addresses in {LINK_LOCAL} are free for NAT", code=Code.NODE, hint=_HINT)
