"""A suspended job that goes on: whether what is stored of it is this job's, and who its guests are by it.

Pure checks. What is stored is the user's word: it says how the guests are called and how their machines are laid out,
and where it says what root works out by itself, the two must be the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Optional, Protocol

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import split_reference
from vmgr.jobspec import GuestGroup
from vmgr.node.allocation import Allocation
from vmgr.node.members import Member
from vmgr.node.network.plan import NetworkPlan
from vmgr.topology.model import Cell, Layout

if TYPE_CHECKING:
    from vmgr.suspended.entry import Entry, NodePart, SavedGuest

MIB = 1 << 20
DEVICES_BYTES = 256 * MIB
"""What a saved state may have beside the guest's RAM: memory of devices and firmware, tables."""
OVERHEAD = 1024
"""A qcow2 file takes less than this part of its virtual size for its tables."""


class Stored(Protocol):
    """Where a suspended job lies; see `vmgr.suspended.store`."""

    async def find(self, job_id: str) -> Optional[tuple[Entry, tuple[NodePart, ...]]]: ...

    async def open(self, job_id: str, name: str) -> tuple[int, int]: ...

    async def claim(self, job_id: str) -> bool: ...

    async def drop(self, job_id: str) -> None: ...

    async def remove(self, job_id: str) -> None: ...


class Resumption(NamedTuple):
    """What a job goes on from: its entry, the parts of all of its nodes in their order, and where their files lie."""

    entry: Entry
    parts: tuple[NodePart, ...]
    stored: Stored


class Ask(NamedTuple):
    """The job that is to go on, by what root knows of it."""

    job_id: str
    user: str
    spec_sha256: str
    group: GuestGroup


def check_entry(found: Resumption, ask: Ask, allocation: Allocation) -> None:
    """Refuse an entry that is not of this job, or that another number of nodes wrote. Raises VTorqueError (VT-SUSPEND).

    The image in it is one that the job asks for, so that the policy's word on that holds for it too.
    """
    entry = found.entry
    for what, stored, right in (
        ("job", entry.job_id, ask.job_id),
        ("user", entry.user, ask.user),
        ("SHA-256 of the specification", entry.spec_sha256, ask.spec_sha256),
        ("number of nodes", entry.nodes, len(allocation.nodes)),
        ("number of guests on a node", entry.per_node, ask.group.per_node),
    ):
        if stored != right:
            raise _unfit(ask.job_id, f"the {what} there is {stored}, not {right}")
    if entry.key == allocation.key:
        raise _unfit(ask.job_id, f"it is of this very attempt ({entry.key})")
    if [part.node for part in found.parts] != list(range(entry.nodes)):
        raise _unfit(ask.job_id, f"it has not one part for each of {entry.nodes} nodes")
    (name, revision), asked = split_reference(entry.image), split_reference(ask.group.image)
    if name != asked[0] or (asked[1] is not None and revision != asked[1]):
        raise _unfit(ask.job_id, f"its image is {entry.image}, and the job asks for {ask.group.image}")


def resumed_network(planned: NetworkPlan, found: Resumption, ask: Ask) -> NetworkPlan:
    """The job's network with the names that its guests have had since their boot, whatever node they are on now.

    Ranks, MAC addresses and addresses are as planned. Raises VTorqueError (VT-SUSPEND) for others, and for names that
    are no guests', or not one guest's alone.
    """
    saved = [(part, number, guest) for part in found.parts for number, guest in enumerate(part.guests, start=1)]
    if len(saved) != len(planned.members):
        raise _unfit(ask.job_id, f"it has {len(saved)} guests, not {len(planned.members)}")
    members = []
    for member, (part, number, guest) in zip(planned.members, saved):
        if (part.node, number) != (member.node, member.number):
            raise _unfit(ask.job_id, f"node {member.node} has not {ask.group.per_node} guests there")
        _check_guest(guest, member, ask)
        members.append(member._replace(name=guest.name))
    if len({member.name for member in members}) != len(members):
        raise _unfit(ask.job_id, "two of its guests have the same name")
    return planned._replace(members=tuple(members))


def _check_guest(guest: SavedGuest, member: Member, ask: Ask) -> None:
    """Refuse a guest that is not this member of the job. Its number is part of the names of files of root's."""
    for what, stored, right in (
        ("rank", guest.rank, member.rank),
        ("MAC address", guest.mac, member.mac),
        ("address", guest.address, member.address),
    ):
        if stored != right:
            raise _unfit(ask.job_id, f"the {what} of guest {member.rank} there is {stored}, not {right}")
    if not re.fullmatch(rf"v[A-Za-z0-9-]+-{member.number}", guest.name, re.ASCII):
        raise _unfit(ask.job_id, f"{guest.name} is not how guest {member.number} of a node is called")


def check_machines(part: NodePart, ask: Ask, *, disk_bytes: Optional[int]) -> None:
    """Refuse machines that are not those that the job asks for, or files that cannot be theirs.

    `disk_bytes` is the virtual size of the image's disk, None for an image without one. Raises VTorqueError
    (VT-SUSPEND).
    """
    group, most = ask.group, state_bound(ask.group.ram_mib)
    for guest in part.guests:
        vcpus, ram_mib = guest.layout.vcpus, guest.layout.ram_mib
        for what, stored, right in (("vCPUs", vcpus, group.vcpus), ("MiB of RAM", ram_mib, group.ram_mib)):
            if stored != right:
                raise _unfit(ask.job_id, f"{guest.name} has {stored} {what} there, not {right}")
        if guest.state_bytes > most:
            raise _unfit(ask.job_id, f"the state of {guest.name} takes {guest.state_bytes} bytes, more than {most}")
        if (guest.overlay_bytes is None) != (disk_bytes is None):
            raise _unfit(ask.job_id, f"{guest.name} has {'no' if disk_bytes is not None else 'a'} disk there")
        if disk_bytes is not None and (guest.overlay_bytes or 0) > overlay_bound(disk_bytes):
            raise _unfit(
                ask.job_id,
                f"the disk of {guest.name} takes {guest.overlay_bytes} bytes, more than {overlay_bound(disk_bytes)}",
            )


def state_bound(ram_mib: int) -> int:
    """Bytes that the state of a guest, or a dump of it, can have: RAM, the tables of its pages, memory of devices."""
    return ram_mib * MIB + ram_mib * MIB // 16 + DEVICES_BYTES


def overlay_bound(virtual_size: int) -> int:
    """Bytes that an overlay of a disk of this size can have."""
    return virtual_size + virtual_size // OVERHEAD + 64 * MIB


def check_accelerator(part: NodePart, accelerator: str) -> None:
    """Refuse a state that the other accelerator wrote. Raises VTorqueError (VT-LAUNCH)."""
    if part.accelerator != accelerator:
        words = {"kvm": "KVM", "tcg": "emulation"}
        raise VTorqueError(
            f"the guests were suspended under {words[part.accelerator]}, and this node has {words[accelerator]}",
            code=Code.LAUNCH,
            hint="have the job run on a node like the one before",
        )


def check_version(stored: str, running: str) -> None:
    """Refuse a state that another QEMU wrote. Both texts begin with a version, of which the first two numbers count.

    The machine type of a guest is that of its QEMU's version. Raises VTorqueError (VT-LAUNCH).
    """
    if _release(stored) != _release(running):
        raise VTorqueError(
            f"the guests were suspended by QEMU {stored[:40]}, and this node has {running[:40]}",
            code=Code.LAUNCH,
            hint="have the job run on a node like the one before",
        )


def _release(version: str) -> Optional[str]:
    match = re.match(r"\d{1,4}\.\d{1,4}(?!\d)", version, re.ASCII)
    return match[0] if match else None


def bound(saved: Layout, planned: Layout) -> Layout:
    """The layout that a guest has had since its boot, its RAM bound as on this node it is planned for a new one.

    Where the two have other cells the RAM lies on the one node that is planned; where those are several it is bound to
    none.
    """
    if [cell[:2] for cell in saved.cells] == [cell[:2] for cell in planned.cells]:
        nodes: Sequence[Optional[int]] = [cell.host_node for cell in planned.cells]
    else:
        planned_nodes = {cell.host_node for cell in planned.cells}
        nodes = [planned_nodes.pop() if len(planned_nodes) == 1 else None] * len(saved.cells)
    cells = tuple(Cell(cell.vcpus, cell.ram_mib, node) for cell, node in zip(saved.cells, nodes))
    return saved._replace(cells=cells)


def told(found: Optional[Resumption]) -> Optional[str]:
    """What a node tells the mother superior of what its guests go on from: the attempt that was suspended, and when."""
    return None if found is None else f"{found.entry.key} {found.entry.when}"


def check_alike(found: Optional[Resumption], node: str, said: object) -> None:
    """Refuse a node that goes on from something else, or starts anew. Raises VTorqueError (VT-SUSPEND)."""
    if said != told(found):
        raise VTorqueError(
            f"{node} does not have the job go on from where the mother superior does",
            code=Code.SUSPEND,
            hint="do all nodes see the same suspended.folder? The job's next start tries again",
        )


async def find(stored: Stored, ask: Ask, allocation: Allocation) -> Optional[Resumption]:
    """What the job goes on from; None where nothing is stored, or the site stores nothing.

    Raises VTorqueError (VT-SUSPEND) for what does not fit; it stays where it is.
    """
    there = await stored.find(ask.job_id)
    if there is None:
        return None
    found = Resumption(*there, stored)
    check_entry(found, ask, allocation)
    return found


def _unfit(job_id: str, reason: str) -> VTorqueError:
    return VTorqueError(
        f"what is stored of the suspended job {job_id} does not fit: {reason}",
        code=Code.SUSPEND,
        hint=f"`vmgr delete suspended --job {job_id}` removes it; the job starts from its beginning then",
    )
