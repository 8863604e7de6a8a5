"""What guests are booted for on this node: one attempt of a job, checked and planned."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Optional

from vmgr.config import Mount
from vmgr.images.pool import Image
from vmgr.jobspec import GuestGroup, Spec
from vmgr.node import record
from vmgr.node.allocation import Allocation
from vmgr.node.hookcall import GroupPath
from vmgr.node.members import Member
from vmgr.node.network.plan import NetworkPlan
from vmgr.node.resuming import Resumption
from vmgr.node.user import User
from vmgr.node.workspace import JobNames

if TYPE_CHECKING:
    from vmgr.suspended.entry import NodePart


class Job(NamedTuple):
    """What guests are booted for on this node.

    `mounts` are the guests' shares; in their paths `stands_for` has been put in. `key` is the file of the job's key,
    None where no guest needs it. `own_disk` is the open disk where the image is the user's own. `resumption` is what
    the guests of a suspended job go on from, None for guests that boot. `groups` are the places where the job's control
    groups may be.
    """

    job_id: str
    place: record.Place
    user: User
    spec: Spec
    image: Image
    allocation: Allocation
    network: NetworkPlan
    mounts: tuple[Mount, ...]
    stands_for: JobNames
    key: Optional[bytes]
    own_disk: Optional[int] = None
    resumption: Optional[Resumption] = None
    groups: tuple[GroupPath, ...] = ()

    @property
    def part(self) -> Optional[NodePart]:
        """What is stored of this node's guests, where they go on."""
        return None if self.resumption is None else self.resumption.parts[self.allocation.node_index]

    @property
    def path_key(self) -> str:
        """The attempt whose key stands in the job's paths: this one's, or the one that has been suspended."""
        return self.allocation.key if self.resumption is None else self.resumption.entry.key

    @property
    def group(self) -> GuestGroup:
        return self.spec.groups[0]

    @property
    def own(self) -> list[Member]:
        """The guests of this node, by their number."""
        return list(self.network.own(self.allocation.node_index))

    @property
    def names(self) -> list[str]:
        """The names of all guests of the job, by rank."""
        return [member.name for member in self.network.members]
