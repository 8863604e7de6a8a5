"""Who is who among the guests of a job: names, ranks, MAC addresses. Pure functions of the job and its nodes.

Every node works all of it out by itself and comes to the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Optional

from vmgr.node.allocation import guest_name


class Member(NamedTuple):
    """One guest of a job: `number` (from 1) on node `node` (from 0), `rank` (from 0) in the job.

    `address` is its IPv4 address without a prefix length; None where only the site's own network knows it, later.
    """

    name: str
    node: int
    number: int
    rank: int
    mac: str
    address: Optional[str] = None


def plan_members(job_id: str, nodes: Sequence[str], per_node: int, mac_prefix: str) -> tuple[Member, ...]:
    """The guests of a job with `per_node` of them on each of `nodes`, the mother superior first; by rank.

    A MAC address is the site's prefix and a number: the hash of the job's id, and the rank added. So it is stable for a
    job and rank, differs within a job, and between jobs is the same with a chance of the guests' number squared in
    2^40 (for a prefix of one byte).
    """
    prefix = bytes.fromhex(mac_prefix.replace(":", ""))
    bits = 48 - 8 * len(prefix)
    start = int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8], "big")
    members = []
    for node, name in enumerate(nodes):
        for number in range(1, per_node + 1):
            rank = node * per_node + number - 1
            tail = ((start + rank) % (1 << bits)).to_bytes(bits // 8, "big")
            mac = ":".join(f"{byte:02x}" for byte in prefix + tail)
            members.append(Member(guest_name(name, number), node, number, rank, mac))
    return tuple(members)
