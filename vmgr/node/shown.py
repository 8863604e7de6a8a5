"""What an agent tells of each guest of its node to root and the job's owner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from vmgr.node.crew import Crew
from vmgr.node.guestjob import Job


def shown(job: Job, crew: Optional[Crew], ssh_ports: Sequence[int]) -> list[dict[str, Any]]:
    """The guests of this node by rank, those of a `crew` with what is known of them while they are there.

    `port` is that of 127.0.0.1 which leads to the guest's SSH, `cpu_s` the CPU time of its QEMU in seconds, `power`
    `on` or `off`.
    """
    guests: list[dict[str, Any]] = [
        {"rank": member.rank, "name": member.name, "mac": member.mac, "address": member.address} for member in job.own
    ]
    if crew is None:
        return guests
    for index, (guest, address) in enumerate(zip(crew.guests, crew.known_addresses())):
        guests[index].update(
            address=address,
            port=ssh_ports[index] if index < len(ssh_ports) else None,
            cpu_s=guest.cpu_s,
            power=guest.power,
        )
    return guests
