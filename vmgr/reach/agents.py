"""Node agents, here and on other nodes: their word on their guests, and a connection to the one that is meant.

On another node a program of this installation, run there as the caller (`shell.py`), talks to the agent's socket: so
the agent knows its caller everywhere by peer credentials.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Optional

from vmgr.config import Config, Paths
from vmgr.errors import Code, VTorqueError
from vmgr.node.client import AgentLink, state_of
from vmgr.node.hookargs import place_name
from vmgr.node.record import listed, newest_socket
from vmgr.paths import installation
from vmgr.reach.shell import Stream, is_here, open_on, run_on
from vmgr.reach.target import Target
from vmgr.reach.where import nodes_of_job
from vmgr.trust import check_trusted

GREETING = b'{"vtorque": "link"}\n'
"""What comes before all that is ours: a user's shell may print lines of its own before it starts a program."""
MAX_BEFORE_BYTES = 64 << 10
MOST_AT_ONCE = 64
"""So many nodes are asked at one time."""
LOOK_TIMES = 3
"""So many times `timeouts.reach` all of them together may take."""
ANSWER_SECONDS = 3.0
STATE_SECONDS = 15.0
"""For an agent that somebody wants something of: it may be busy with the boot of its guests."""
_GUEST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")


class Reached(NamedTuple):
    """An agent: its connection, its state when it was reached, its node's name, whether that is this machine.

    `member` is the guest that was asked for, as the agent tells of it; None where only the job was.
    """

    link: AgentLink
    snapshot: dict[str, Any]
    node: str
    is_here: bool
    member: Optional[dict[str, Any]] = None

    @property
    def job_id(self) -> str:
        return str(self.snapshot.get("job_id"))


class Seen(NamedTuple):
    """What agents say, and why the nodes that say nothing do not."""

    snapshots: list[dict[str, Any]]
    problems: list[VTorqueError]


# --- this node


def job_here(paths: Paths, job: str) -> Optional[str]:
    """The whole id of a job that an agent on this node serves, from how a user names it; None when none does."""
    if newest_socket(paths, job) is not None:
        return job
    if "." in job:
        return None
    jobs = {folder.name for folder in listed(paths.run / "jobs") if folder.name.partition(".")[0] == job}
    found = sorted(name for name in jobs if listed(paths.run / "jobs" / name))
    return found[0] if len(found) == 1 else None


async def look_here(paths: Paths, job: Optional[str] = None) -> list[dict[str, Any]]:
    """The states of this node's attempts that the caller may see, or of those of one job."""
    if not (paths.run / "jobs").exists():
        return []
    check_trusted(paths.run / "jobs")
    sockets = sorted((paths.run / "jobs").glob("*/*.sock"))
    if job is not None:
        whole = job_here(paths, job)
        sockets = [each for each in sockets if whole is not None and each.parent.name == place_name(whole)]
    answers = await asyncio.gather(*(state_of(each, ANSWER_SECONDS) for each in sockets))
    return [answer for answer in answers if answer is not None]


# --- other nodes


async def look(config: Config, nodes: Iterable[str], job: Optional[str] = None) -> Seen:
    """Ask all these nodes at once for the states of their attempts, or of those of one job; bounded in time."""
    loop, limit = asyncio.get_running_loop(), LOOK_TIMES * config.timeouts.reach
    pool = ThreadPoolExecutor(MOST_AT_ONCE, thread_name_prefix="node")

    async def one(node: str) -> list[dict[str, Any]]:
        if is_here(node):
            return await look_here(config.paths, job)
        return await loop.run_in_executor(pool, _look_on, config, node, job)

    asked = {node: asyncio.ensure_future(one(node)) for node in nodes}
    try:
        if asked:
            await asyncio.wait(asked.values(), timeout=limit)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for answer in asked.values():
            answer.cancel()
    seen = Seen([], [])
    for node, answer in asked.items():
        try:
            seen.snapshots.extend(await answer)
        except VTorqueError as err:
            seen.problems.append(err)
        except asyncio.CancelledError:
            seen.problems.append(VTorqueError(f"node {node} was not heard within {limit} s", code=Code.CONNECT))
    return seen


def _look_on(config: Config, node: str, job: Optional[str]) -> list[dict[str, Any]]:
    argv = [_vmgr(), "agent-states", *([] if job is None else [job])]
    done = run_on(node, argv, timeout_s=config.timeouts.reach)
    _, greeting, answer = done.out.partition(GREETING)
    if not greeting or done.status:
        raise _unlike(node, done.err.strip() or done.out[-1000:])
    try:
        snapshots = [json.loads(line) for line in answer.splitlines()]
    except (ValueError, RecursionError):
        raise _unlike(node, done.err) from None
    return [snapshot for snapshot in snapshots if isinstance(snapshot, dict)]


def _unlike(node: str, said: bytes) -> VTorqueError:
    lines = said.decode(errors="replace").strip().splitlines()
    return VTorqueError(
        f"node {node} does not answer as vTorque does{': ' + lines[-1][:300] if lines else ''}",
        code=Code.CONNECT,
        hint="is it installed there under the same prefix, and does the site let you run programs there?",
    )


def _vmgr() -> str:
    return f"{installation().prefix}/bin/vmgr"


def open_program(config: Config, node: str, words: Sequence[str]) -> Stream:
    """Start one of `vmgr`'s programs on a node that greet, and take its greeting. Raises VTorqueError; close it."""
    stream = open_on(node, [_vmgr(), *words], timeout_s=config.timeouts.reach)
    try:
        stream.socket.settimeout(config.timeouts.reach)
        _take_greeting(stream)
        stream.socket.settimeout(None)
        return stream
    except BaseException:
        stream.close()
        raise


def _take_greeting(stream: Stream) -> None:
    """Read up to the greeting and not a byte further."""
    seen = bytearray()
    while not seen.endswith(GREETING):
        try:
            data = stream.socket.recv(1)
        except OSError as err:
            raise VTorqueError(f"the program on the node says nothing: {err}", code=Code.CONNECT) from None
        if not data:
            stream.wait()
            raise stream.failure(bytes(seen))
        seen += data
        if len(seen) > MAX_BEFORE_BYTES:
            raise VTorqueError("something else than vTorque answers on the node", code=Code.CONNECT)


# --- the agent that is meant


@asynccontextmanager
async def agent_on(config: Config, node: Optional[str], job_id: str) -> AsyncIterator[AgentLink]:
    """A connection to the agent of a job on a node, None being this one. Raises VTorqueError."""
    if node is None or is_here(node):
        if (config.paths.run / "jobs").exists():
            check_trusted(config.paths.run / "jobs")
        link = await AgentLink.open(config.paths, job_id)
    else:
        words = ("agent-link", job_id)
        stream = await asyncio.get_running_loop().run_in_executor(None, open_program, config, node, words)
        connected = socket.socket(fileno=os.dup(stream.socket.fileno()))
        link = await AgentLink.over(connected, stream.close)
    try:
        yield link
    finally:
        link.close()


@asynccontextmanager
async def agent_of(config: Config, target: Target) -> AsyncIterator[Reached]:
    """The agent of the guest that is meant, wherever it is; without a rank that of the job's mother superior.

    `Reached.member` is the guest with the rank, without one the first of the job. Raises VTorqueError: VT-AGENT for a
    job that does not run, VT-ACCESS for another user's, VT-CONNECT when its node cannot be reached, VT-VALUE when it
    has no such rank.
    """
    job_id, node = job_here(config.paths, target.job), None
    if job_id is None:
        placed = nodes_of_job(config, target.job)
        if not placed.nodes:
            raise VTorqueError(f"the nodes of job {placed.job_id} are not known", code=Code.AGENT)
        job_id, node = placed.job_id, placed.nodes[0]
    wanted = target.rank or 0
    async with agent_on(config, node, job_id) as link:
        reached = await _reached(link, node, wanted)
        if reached.member is not None:
            yield reached
            return
        elsewhere = _node_of(reached.snapshot, wanted, target)
    async with agent_on(config, elsewhere, job_id) as link:
        reached = await _reached(link, elsewhere, wanted)
        if reached.member is None:
            raise VTorqueError(f"{target} is not on node {elsewhere}", code=Code.VALUE)
        yield reached


def member_of(snapshot: Optional[dict[str, Any]], rank: int) -> dict[str, Any]:
    """The guest with a rank, from what its node's agent says. Raises VTorqueError (VT-VALUE)."""
    found = next((member for member in members(snapshot or {}) if member["rank"] == rank), None)
    if found is None:
        raise VTorqueError(f"the guest of rank {rank} is not on this node", code=Code.VALUE)
    return found


def ssh_port(member: dict[str, Any]) -> int:
    """The port of the node's 127.0.0.1 that leads to a guest's SSH. Raises VTorqueError (VT-GUEST)."""
    port = member.get("port")
    if member.get("power") in ("off", "ending"):
        raise VTorqueError(
            f"the guest {member['name']} is off", code=Code.GUEST, hint="`vmgr power on` switches it on again"
        )
    if type(port) is not int or not 0 < port < 65536 or member.get("power") == "booting":
        raise VTorqueError(
            f"the guest {member['name']} is not ready", code=Code.GUEST, hint="`vmgr ps` shows how far it is"
        )
    return port


async def _reached(link: AgentLink, node: Optional[str], rank: int) -> Reached:
    link.send("status")
    try:
        snapshot = await asyncio.wait_for(link.snapshot(), STATE_SECONDS)
    except asyncio.TimeoutError:
        raise VTorqueError(
            f"the node agent did not answer within {STATE_SECONDS:g} s", code=Code.AGENT, hint="look at its node"
        ) from None
    if snapshot is None:
        raise VTorqueError("the node agent has ended", code=Code.AGENT, hint="the job is over")
    found = next((member for member in members(snapshot) if member["rank"] == rank), None)
    return Reached(link, snapshot, node or os.uname().nodename, node is None or is_here(node), found)


def members(snapshot: dict[str, Any]) -> list[dict[str, Any]]:
    """The guests that an agent tells of, those that have a rank and a name that is one.

    Names become words of command lines here, and another node may not be what it should be.
    """
    told = snapshot.get("members")
    return [
        member
        for member in (told if isinstance(told, list) else [])
        if isinstance(member, dict)
        and type(member.get("rank")) is int
        and isinstance(member.get("name"), str)
        and _GUEST.fullmatch(member["name"])
    ]


def _node_of(snapshot: dict[str, Any], rank: int, target: Target) -> str:
    """The node of the guest with a rank, from what the agent of another node says. Raises VTorqueError."""
    nodes, per_node = snapshot.get("nodes"), len(members(snapshot))
    if not isinstance(nodes, (list, tuple)) or not per_node:
        raise VTorqueError(
            f"the guests of job {target.job} are not known yet", code=Code.GUEST, hint="`vmgr ps` shows its state"
        )
    if rank >= per_node * len(nodes):
        raise VTorqueError(
            f"job {target.job} has no guest of rank {rank}",
            code=Code.VALUE,
            hint=f"it has 0 to {per_node * len(nodes) - 1}",
        )
    return str(nodes[rank // per_node])
