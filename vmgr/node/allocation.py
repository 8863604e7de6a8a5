"""Which nodes a job has, by the batch system's own word: never by anything that the job's user could have written.

Slurm tells its hooks (`given`). On TORQUE a job of several nodes has the file `mom_priv/jobs/<prefix>.JB` on each of
them once every sister's `prologue.parallel` has returned. It holds `exec_host`, and a `cookie` that is the same on all
nodes and new after a requeue: the attempt. A job of one node has no such file during its prologue; its node stands in
the node file. (Observed on TORQUE 6.1.3; the file is XML, in which a user's text is escaped.)
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.node.folders import COMES_OR_GOES, changes
from vmgr.topology.cpulist import parse_cpus

MAX_FILE_BYTES = 1 << 22
MAX_NODES = 100_000
KEY_DIGITS = 16
LOOK_AGAIN_SECONDS = 5.0
"""How often the file is looked at beside the events that tell of it."""

_NODE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")
_EXEC_HOST = re.compile(r"<exec_host[^<>]*>([^<>]*)</exec_host>")
_COOKIE = re.compile(r"<cookie[^<>]*>\s*([0-9A-Fa-f]{16,64})\s*</cookie>")


class Allocation(NamedTuple):
    """The nodes of one attempt of a job, the mother superior first, and this node's place among them.

    `key` names the attempt, alike on all of its nodes. `slots` are the numbers of the slots that the job has on this
    node; empty where the batch system does not tell them beforehand.
    """

    nodes: tuple[str, ...]
    node_index: int
    key: str
    slots: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        """This node's name, up to its first dot."""
        return short(self.nodes[self.node_index])


class TaskFile(NamedTuple):
    """What counts in a `.JB` file."""

    nodes: tuple[str, ...]
    cookie: str
    exec_host: str


def is_node(name: str) -> bool:
    """Whether this can be the name of a node."""
    return _NODE.fullmatch(name) is not None


def short(node: str) -> str:
    """A node's name up to its first dot."""
    return node.partition(".")[0]


def guest_name(node: str, number: int) -> str:
    """The name of guest `number` (from 1) of a node."""
    return f"v{short(node)}-{number}"


def parse_exec_host(text: str) -> Optional[tuple[str, ...]]:
    """The nodes in a list such as `n1/0-3+n2/0+n2/1`, each once, in order; None for what is no such list."""
    nodes = dict.fromkeys(part.partition("/")[0] for part in text.strip().split("+"))
    if not 1 <= len(nodes) <= MAX_NODES or not all(_NODE.fullmatch(node) for node in nodes):
        return None
    return tuple(nodes)


def parse_task_file(data: bytes) -> Optional[TaskFile]:
    """The nodes and the cookie in a `.JB` file; None for one that is not, or not yet, whole."""
    text = data.decode("utf-8", "replace")
    hosts, cookies = _EXEC_HOST.findall(text), _COOKIE.findall(text)
    if len(hosts) != 1 or len(cookies) != 1:
        return None
    nodes = parse_exec_host(hosts[0])
    return None if nodes is None else TaskFile(nodes, cookies[0].lower(), hosts[0].strip())


def parse_slots(exec_host: str, node: str) -> frozenset[int]:
    """The numbers of a node's slots in a list such as `n1/0-3,6+n2/0`; empty where it has none, or too many."""
    slots: set[int] = set()
    for part in exec_host.split("+"):
        name, _, listed = part.partition("/")
        if name == node:
            slots |= parse_cpus(listed) or frozenset()
    return frozenset(slots)


def parse_node_file(data: bytes) -> Optional[tuple[str, ...]]:
    """The nodes of a node file, one a line and as often as it has processors, each once; None for what is none."""
    return parse_exec_host("+".join(data.decode("utf-8", "replace").split()))


def given(nodes: tuple[str, ...], index: int, key: str) -> Allocation:
    """The allocation that the batch system has told the hook. Raises VTorqueError (VT-NODE) for one without sense."""
    return _checked(Allocation(nodes, index, key))


async def find(
    task_file: Optional[str], node_file: Optional[str], index: int, attempt: str, *, timeout_s: float
) -> Allocation:
    """The allocation of the attempt whose prologue ran on node `index` of it.

    `attempt` becomes the key of a job of one node. Waits until the batch system has written what it writes about a
    job of several nodes. Raises VTorqueError (VT-NODE).
    """
    if index == 0:
        nodes = parse_node_file(_read(Path(node_file)) or b"") if node_file else (os.uname().nodename,)
        if nodes is None:
            raise VTorqueError(f"the node file {node_file} names no nodes", code=Code.NODE)
        if len(nodes) == 1:
            return _checked(Allocation(nodes, 0, attempt))
    if task_file is None:
        raise VTorqueError("the batch system names no file about the nodes of this job", code=Code.NODE)
    path = Path(task_file)
    try:
        found = await asyncio.wait_for(_appears(path), timeout_s)
    except asyncio.TimeoutError:
        raise VTorqueError(
            f"{path} does not tell the nodes of the job within {timeout_s:g} s",
            code=Code.NODE,
            hint="did a sister's prologue fail?",
        ) from None
    if not 0 <= index < len(found.nodes):
        raise VTorqueError(f"{path} names {len(found.nodes)} nodes, and this would be number {index}", code=Code.NODE)
    slots = parse_slots(found.exec_host, found.nodes[index])
    return _checked(Allocation(found.nodes, index, found.cookie[:KEY_DIGITS], slots))


async def over(task_file: str, key: str) -> None:
    """Return when the file about the attempt `key` is gone, or tells of another attempt: then this one is over."""
    path = Path(task_file)
    async for _ in changes(path.parent, COMES_OR_GOES, LOOK_AGAIN_SECONDS):
        data = _read(path)
        found = None if data is None else parse_task_file(data)
        if data is None or (found is not None and found.cookie[:KEY_DIGITS] != key):
            return


async def _appears(path: Path) -> TaskFile:
    async for _ in changes(path.parent, COMES_OR_GOES, LOOK_AGAIN_SECONDS):
        found = parse_task_file(_read(path) or b"")
        if found is not None:
            return found
    raise AssertionError


def _read(path: Path) -> Optional[bytes]:
    """A file of the batch system's, None where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb") as stream:
        info = os.fstat(fd)
        return stream.read(MAX_FILE_BYTES) if stat.S_ISREG(info.st_mode) and info.st_uid == 0 else b""


def _checked(allocation: Allocation) -> Allocation:
    """Refuse nodes whose guests would have the same names."""
    names = [short(node) for node in allocation.nodes]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise VTorqueError(f"two nodes of the job are called {twice} up to the first dot", code=Code.NODE)
    return allocation
