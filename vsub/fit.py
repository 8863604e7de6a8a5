"""Fits guests and what the job asks of its nodes into each other: pure arithmetic, every sum told.

What the guests of one node need is `host cores + vCPUs * guests + I/O cores` and `host memory + RAM * guests + shared
memory`. Where the user left processors or memory open, they are asked for. Where they are given, vCPUs and RAM that
are only defaults shrink to fit, or grow to what was asked for; explicit requests that do not fit are refused, or
raised where the site says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional

from vmgr.checks import Checker, Features
from vmgr.config import Resources
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image
from vmgr.jobspec import GuestGroup
from vmgr.policy import Bounds
from vmgr.request import Request
from vmgr.units import format_size_mib
from vsub.hostrequest import Given, HostRequest, Nodes, Tasks

MIB = 1 << 20
PER_PROCESS = ("pmem", "pvmem", "--mem-per-cpu")
"""Resources that bound each process of the job, of which there are as many as processors."""


class Fitted(NamedTuple):
    """Guests and nodes that fit.

    `nodes` is None where what the job asks for itself is right, `memory` holds the memory to ask for in MiB, by
    resource. `tasks` stands for both where the job asks with `-L`. `notes` are for the user.
    """

    group: GuestGroup
    nodes: Optional[Nodes]
    tasks: Optional[Tasks]
    memory: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]


class _Side(NamedTuple):
    """One of the two amounts, processors or memory (MiB), with what the policy says of its share in a guest."""

    key: str
    value: int
    is_default: bool
    bounds: Bounds
    lowest: int
    guests: int
    fixed: int
    arithmetic: Callable[[int], str]
    show: Callable[[int], str]

    def need(self, value: int) -> int:
        return self.fixed + value * self.guests

    def room(self, given: int) -> int:
        """What each guest may have at most."""
        return (given - self.fixed) // self.guests


def fit(
    group: GuestGroup, features: Features, asked: HostRequest, image: Image, request: Request, checker: Checker
) -> Fitted:
    """Fit `group` and `asked` into each other. Raises VTorqueError (VT-RESOURCE) with the sum that is too large."""
    keep = checker.config.resources
    notes: list[str] = []
    cores = _cores(group, features, request, checker, keep)
    memory = _memory(group, features, image, request, checker, keep)
    given_cores = None if _all_cores(asked) else asked.cores
    vcpus = _settle(cores, given_cores, checker, notes)
    need = cores.need(vcpus)
    nodes = _with_cores(asked, need, raised=given_cores is not None and need > given_cores.amount)
    given_memory = _memory_per_node(asked, nodes)
    ram = _settle(memory, min(given_memory.values()) if given_memory else None, checker, notes)
    fitted = group._replace(vcpus=vcpus, ram_mib=ram)
    wanted = _memory_wanted(memory.need(ram), given_memory, nodes)
    told = min(given_memory.values()).text if given_memory else None
    for name, mib in wanted:
        if given_memory and given_memory[name].text != told:
            notes.append(f"{given_memory[name].text} is raised to {mib}mb too")
    if asked.tasks is not None:
        return Fitted(fitted, None, _fit_tasks(asked, asked.tasks, nodes, wanted), (), tuple(notes))
    if asked.form == "procs":
        place = asked.option.source if asked.option else ""
        notes.append(f"{asked.option} ({place}) is asked for as nodes={nodes}, because a guest is on one node")
    unchanged = nodes == asked.nodes and asked.form != "procs"
    return Fitted(fitted, None if unchanged else nodes, None, wanted, tuple(notes))


def _cores(group: GuestGroup, features: Features, request: Request, checker: Checker, keep: Resources) -> _Side:
    io = features.iocm.min_cores if features.iocm else 0

    def arithmetic(vcpus: int) -> str:
        total = keep.host_cores + vcpus * group.per_node + io
        return (
            f"{keep.host_cores} host cores + {vcpus} vCPUs * {group.per_node} guests + {io} I/O cores = "
            f"{total} processors on each node"
        )

    bounds = checker.policy.bounds("vcpus")
    return _Side(
        key="vcpus", value=group.vcpus, is_default="vcpus" not in request, bounds=bounds, lowest=bounds.min,
        guests=group.per_node, fixed=keep.host_cores + io, arithmetic=arithmetic, show=str,
    )  # fmt: skip


def _memory(
    group: GuestGroup, features: Features, image: Image, request: Request, checker: Checker, keep: Resources
) -> _Side:
    shared = features.unclot_mib or 0

    def arithmetic(ram: int) -> str:
        total = keep.host_memory + ram * group.per_node + shared
        return (
            f"{format_size_mib(keep.host_memory)} host memory + {format_size_mib(ram)} RAM * {group.per_node} guests + "
            f"{format_size_mib(shared)} shared memory = {format_size_mib(total)} on each node"
        )

    bounds = checker.policy.bounds("ram")
    return _Side(
        key="ram", value=group.ram_mib, is_default="ram" not in request, bounds=bounds,
        lowest=max(bounds.min, image.min_ram_mib), guests=group.per_node, fixed=keep.host_memory + shared,
        arithmetic=arithmetic, show=format_size_mib,
    )  # fmt: skip


def _all_cores(asked: HostRequest) -> bool:
    return asked.tasks is not None and asked.tasks.setting("lprocs") == "all"


def _settle(side: _Side, given: Optional[Given], checker: Checker, notes: list[str]) -> int:
    """The value that a guest gets. One above the room that was given is to be asked for; a note says so."""
    if given is None:
        return side.value
    room = side.room(given.amount)
    if side.is_default and room >= side.lowest:
        grown = max(side.value, side.bounds.max) if checker.policy.flag("grow_defaults") else side.value
        return min(room, grown)
    value = side.lowest if side.is_default else side.value
    if side.need(value) <= given.amount:
        return value
    what = f"{side.key}={side.show(value)}{checker.source(side.key)}" + (", the least," if side.is_default else "")
    if checker.policy.flag("raise_requests"):
        notes.append(f"{given.text} is raised: {what} needs {side.arithmetic(value)}")
        return value
    least = f"ask for at least {side.show(side.need(value))} on each node"
    raise VTorqueError(
        f"{what} needs {side.arithmetic(value)}, and {given.text} gives {side.show(given.amount)}",
        code=Code.RESOURCE,
        hint=least + (f", or for {side.key}={side.show(room)}" if room >= side.lowest else ""),
    )


def _with_cores(asked: HostRequest, need: int, *, raised: bool) -> Nodes:
    """The nodes, with processors for the guests where nobody said how many, or where they are raised."""
    chunks = tuple(
        chunk.with_ppn(need)
        if (chunk.ppn is None and need > 1) or (raised and chunk.ppn is not None and chunk.ppn < need)
        else chunk
        for chunk in asked.nodes.chunks
    )
    return asked.nodes._replace(chunks=chunks)


def _processors(nodes: Nodes) -> int:
    """Processors on the node that has the fewest."""
    return min(chunk.ppn or 1 for chunk in nodes.chunks)


def _memory_per_node(asked: HostRequest, nodes: Nodes) -> dict[str, Given]:
    """What each of the job's own bounds leaves on a node, in MiB, by resource."""
    found = {}
    for name, given in asked.memory.items():
        each = given.amount * _processors(nodes) if name in PER_PROCESS else given.amount // nodes.number
        found[name] = given._replace(amount=each // MIB)
    return found


def _memory_wanted(need: int, given: dict[str, Given], nodes: Nodes) -> tuple[tuple[str, int], ...]:
    """The memory to ask for: all of it where nobody said how much, and what was too little."""
    if not given:
        return (("mem", need * nodes.number),)
    small = [name for name, amount in given.items() if amount.amount < need]
    each = -(-need // _processors(nodes))
    return tuple((name, each if name in PER_PROCESS else need * nodes.number) for name in small)


def _fit_tasks(asked: HostRequest, tasks: Tasks, nodes: Nodes, wanted: tuple[tuple[str, int], ...]) -> Tasks:
    ppn = nodes.chunks[0].ppn
    if ppn is not None and nodes != asked.nodes and not _all_cores(asked):
        tasks = tasks.with_setting("lprocs", str(ppn))
    for _, mib in wanted:
        tasks = tasks.with_setting("memory", f"{mib}mb")
    return tasks
