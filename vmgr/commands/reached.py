"""What `vmgr` runs on another node, as the caller, to reach agents and guests there; not for people."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
from typing import Optional

import click

from vmgr.config import Config, load_config
from vmgr.errors import Code, VTorqueError
from vmgr.node.client import listener_of, no_agent
from vmgr.node.record import newest_socket
from vmgr.paths import installation
from vmgr.reach.target import parse_target

_CHUNK = 1 << 16


@click.command("agent-states", hidden=True)
@click.argument("job", required=False)
def agent_states(job: Optional[str]) -> None:
    """Print the states of this node's attempts, one JSON object a line.

    Example: vmgr agent-states
    """
    from vmgr.reach.agents import GREETING, look_here

    snapshots = asyncio.run(look_here(load_config(installation()).paths, job))
    sys.stdout.buffer.write(GREETING + b"".join(json.dumps(each).encode() + b"\n" for each in snapshots))


@click.command("agent-link", hidden=True)
@click.option("--ssh", type=int, metavar="RANK", help="To the SSH of this guest instead of to the agent.")
@click.option("--node", metavar="NODE", help="On another node.")
@click.argument("job")
def agent_link(job: str, ssh: Optional[int], node: Optional[str]) -> None:
    """Connect standard input and output to the agent of a job, after a greeting where it is asked for on its node.

    Example: vmgr agent-link 12.server
    """
    from vmgr.reach.agents import GREETING, open_program

    config, target = load_config(installation()), parse_target(job)
    if node is not None:
        words = ["agent-link", *([] if ssh is None else ["--ssh", str(ssh)]), target.job]
        stream = open_program(config, node, words)
        try:
            _relay(stream.socket)
        finally:
            stream.close()
        return
    connection = _to_agent(config, target.job) if ssh is None else asyncio.run(_to_guest(config, target.job, ssh))
    with connection:
        os.write(1, GREETING)
        _relay(connection)


def _to_agent(config: Config, job_id: str) -> socket.socket:
    path = newest_socket(config.paths, job_id)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if path is not None:
            connection.connect(str(path))
            if listener_of(connection) in (0, os.geteuid()):
                return connection
    except OSError:
        pass
    connection.close()
    raise no_agent(f"no node agent serves job {job_id} on node {os.uname().nodename}")


async def _to_guest(config: Config, job_id: str, rank: int) -> socket.socket:
    """A connection to the SSH of a guest on this node. Raises VTorqueError."""
    from vmgr.reach.agents import agent_on, member_of, ssh_port

    async with agent_on(config, None, job_id) as link:
        link.send("status")
        port = ssh_port(member_of(await link.snapshot(), rank))
    try:
        return socket.create_connection(("127.0.0.1", port), timeout=config.timeouts.reach)
    except OSError as err:
        raise VTorqueError(f"the guest's SSH does not answer: {err}", code=Code.CONNECT) from None


def _relay(connection: socket.socket) -> None:
    """Pass on bytes both ways until the other side has said all."""
    connection.settimeout(None)

    def send() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(0, _CHUNK):
                connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)

    threading.Thread(target=send, daemon=True).start()
    with contextlib.suppress(OSError):
        while data := connection.recv(_CHUNK):
            view = memoryview(data)
            while view:
                view = view[os.write(1, view) :]
