"""What a node has, and what its guests get of it: values without behaviour, shared by reader, planner and picture.

CPUs and NUMA nodes are named by the kernel's numbers, which may have holes. Memory is in MiB.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Optional


class Cpu(NamedTuple):
    """A CPU that is online (a hardware thread).

    `core` and `package` are numbers of this topology's own, from 0, unique on the machine: the kernel's `core_id` is
    not. `node` is None where the machine has no NUMA nodes. `kind` ranks the cores of hybrid machines, 0 the most
    capable; it is 0 everywhere else.
    """

    number: int
    core: int
    package: int
    node: Optional[int]
    kind: int = 0


class NumaNode(NamedTuple):
    """A NUMA node that is online. It may have no CPUs, or no memory.

    `hugepages` holds, by size in KiB, how many there are and how many of them are free.
    """

    number: int
    memory_mib: int
    hugepages: Mapping[int, tuple[int, int]] = {}


class Topology(NamedTuple):
    """A machine: its CPUs and NUMA nodes by number, and the distances between the latter (ACPI's SLIT, 10 is here).

    A machine without NUMA has no `nodes`; `memory_mib` is what it has in all, and `hugepages`, elsewhere empty, are
    as those of a node. `distances` has every pair of nodes.
    """

    cpus: tuple[Cpu, ...]
    nodes: tuple[NumaNode, ...]
    distances: Mapping[tuple[int, int], int]
    memory_mib: int
    hugepages: Mapping[int, tuple[int, int]] = {}


class Allowed(NamedTuple):
    """What a job may use of a machine: CPUs and NUMA nodes (empty on a machine without NUMA).

    `source` names where this is from, for messages: `the cpuset /torque/12.srv`, `the node`.
    """

    cpus: frozenset[int]
    nodes: frozenset[int]
    source: str


class Cell(NamedTuple):
    """A NUMA node of the guest: its vCPUs, its RAM, and the node of the host that this RAM is bound to.

    `host_node` is None where nothing is bound.
    """

    vcpus: tuple[int, ...]
    ram_mib: int
    host_node: Optional[int]


class Layout(NamedTuple):
    """What the guest sees: `sockets * cores * threads` is the number of its vCPUs.

    vCPU n is thread `n % threads` of its core, which is core `n // threads % cores` of its socket. `cells` are the
    guest's NUMA nodes, at least one; `distances` is square, one row a cell.
    """

    sockets: int
    cores: int
    threads: int
    cells: tuple[Cell, ...]
    distances: tuple[tuple[int, ...], ...]

    @classmethod
    def flat(cls, vcpus: int, ram_mib: int) -> Layout:
        """One socket of cores without threads, in one NUMA node that is bound to nothing."""
        return cls(1, vcpus, 1, (Cell(tuple(range(vcpus)), ram_mib, None),), ((10,),))

    @property
    def vcpus(self) -> int:
        return self.sockets * self.cores * self.threads

    @property
    def ram_mib(self) -> int:
        return sum(cell.ram_mib for cell in self.cells)


class Placement(NamedTuple):
    """Where one guest sits: for each vCPU the CPUs that it may run on (one, unless the user mapped it otherwise).

    `emulator` are the CPUs of QEMU's other threads, of vhost and of its file servers, `io` those of its I/O threads,
    `memory` the host's NUMA nodes that its RAM is on (empty where nothing is bound).
    """

    vcpus: tuple[tuple[int, ...], ...]
    emulator: tuple[int, ...]
    io: tuple[int, ...]
    memory: tuple[int, ...]
    layout: Layout
