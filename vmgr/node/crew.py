"""A node's running guests and what they share: one handle to reach them, and to end them all."""

from __future__ import annotations

import asyncio
from typing import NamedTuple, Optional

from vmgr.errors import VTorqueError
from vmgr.logs import LOGGER
from vmgr.node.guest import RunningGuest
from vmgr.node.keys import HostKey
from vmgr.node.members import Member
from vmgr.node.network.wires import Wires
from vmgr.topology.model import Layout


class Crew(NamedTuple):
    """A node's running guests, in the order of their numbers, the host key that they share, and their network.

    `layouts` are what each of them sees of CPUs and memory. The private half of the host key of guests that go on is
    theirs alone.
    """

    members: tuple[Member, ...]
    guests: tuple[RunningGuest, ...]
    host_key: HostKey
    wires: Wires
    layouts: tuple[Layout, ...] = ()

    async def addresses(self) -> list[str]:
        """The guests' addresses: planned, given by the site, or said by the guests while they become ready."""
        found = []
        for member, guest, lease in zip(self.members, self.guests, self.wires.addresses):
            known = member.address or (lease and lease.partition("/")[0])
            found.append(known or await guest.address())
        return found

    def known_addresses(self) -> list[Optional[str]]:
        """The same as far as they are known by now; None also where QEMU's own networking has none of the network's."""
        planned = [lease and lease.partition("/")[0] for lease in self.wires.addresses]
        return [
            member.address or lease or guest.said_address
            for member, guest, lease in zip(self.members, self.guests, planned)
        ]

    async def open_ssh(self) -> list[int]:
        """Open what leads to SSH of the guests, from outside too; the port of 127.0.0.1 for each of them.

        Raises VTorqueError (VT-NODE).
        """
        through_qemu = [guest.ssh_port for guest in self.guests if guest.ssh_port is not None]
        if len(through_qemu) == len(self.guests):
            return through_qemu
        addresses = await self.addresses()
        return [await self.wires.forward(*each) for each in enumerate(addresses, start=1)]

    def ssh_ports(self) -> dict[str, int]:
        """The ports of this node that lead to SSH of guests from outside, by name of the guest."""
        return {self.members[number - 1].name: port for number, port in self.wires.ssh_ports.items()}

    async def kill(self) -> None:
        """End all of them at once and give everything back that they held; what is left stands in the record."""
        await asyncio.gather(*(guest.kill() for guest in self.guests), return_exceptions=True)
        try:
            await self.wires.close()
        except VTorqueError as err:
            LOGGER.warning("%s", err)
