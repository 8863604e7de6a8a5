"""All simulated nodes of a daemon: started together, found again by administrators, ended together."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from vmgr.node.process import boot_id, start_ticks
from vsub.engines.local import network
from vsub.engines.local.machine import Layout, Machine
from vsub.engines.local.namespaces import Place, new_network
from vsub.engines.local.network import Subnet
from vsub.engines.local.node import Node, Plan, own_folders
from vsub.engines.local.records import write_whole

END_TIMEOUT_S = 10.0

log = logging.getLogger("vtorque-local")


def hosts(names: Sequence[str], subnet: Subnet, host: str) -> str:
    """The nodes' /etc/hosts."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback", f"{subnet.host} {host}"]
    return "".join(f"{line}\n" for line in lines + [f"{subnet.node(i)} {name}" for i, name in enumerate(names)])


class Nodes:
    """The nodes n1 to nN. `start` makes them, `close` ends them with all that runs there."""

    def __init__(self, layout: Layout) -> None:
        self.machines: tuple[Machine, ...] = ()
        self._layout = layout
        self._link = network.link_name(layout.spool)
        self._nodes: list[Node] = []
        self._places: list[Place] = []
        self._switch: Optional[int] = None

    def start(self, count: int, private: Sequence[Path], volatile: Sequence[Path]) -> None:
        """Make the nodes, each with its own of the folders `private` and, empty at first, `volatile`.

        Raises OSError or ValueError; `close` then undoes what there is.
        """
        own = tuple(own_folders(self._layout.spool, private, volatile))
        names = [f"n{number}" for number in range(1, count + 1)]
        self._layout.nodes.mkdir(mode=0o751, exist_ok=True)
        layouts = [self._layout.node(name) for name in names]
        hosts_file = self._layout.nodes / "hosts"
        hosts_file.touch(mode=0o644)
        for name, layout in zip(names, layouts):
            layout.create_node()
            plan = Plan(name, layout.spool, hosts_file, own)
            plan.create()
            self._nodes.append(Node(plan))
        self._places.extend(node.place() for node in self._nodes)
        self._switch = new_network()
        ends = [(place.node, place.net) for place in self._places]
        subnet = network.connect(self._link, self._switch, ends)
        hosts_file.write_text(hosts(names, subnet, socket.gethostname()))
        for node in self._nodes:
            node.finish()
        shared = self._layout.mom_priv
        self.machines = tuple(
            Machine(name, layout, shared, place) for name, layout, place in zip(names, layouts, self._places)
        )
        self._note(subnet)
        log.info("nodes %s to %s on %s, link %s", names[0], names[-1], subnet.network, self._link)

    def _note(self, subnet: Subnet) -> None:
        boot = boot_id()
        noted = [
            {
                "name": node.name,
                "address": subnet.node(index),
                "pid": node.process,
                "start": start_ticks(node.process),
                "boot": boot,
            }
            for index, node in enumerate(self._nodes)
        ]
        write_whole(self._layout.node_list, json.dumps(noted).encode())

    def close(self) -> None:
        """End the nodes and wait for that; remove the link. What does not go is logged. Ends in bounded time."""
        self._layout.node_list.unlink(missing_ok=True)
        left = {node.process: node.name for node in self._nodes}
        for process in left:
            os.kill(process, signal.SIGKILL)  # a child of ours that was not waited for
        _await_children(left)
        for name in left.values():
            log.error("node %s has not ended after %.0f s: a process of it cannot be killed", name, END_TIMEOUT_S)
        for place in self._places:
            place.close()
        self._places.clear()
        self._nodes.clear()
        if self._switch is not None:
            os.close(self._switch)
            self._switch = None
            network.disconnect(self._link)


def _await_children(left: dict[int, str]) -> None:
    """Wait for children and take out of `left` those that have ended.

    All children are reaped: the first process of a node is gone only when every process of the node is, and some
    of these are children of the daemon.
    """
    deadline = time.monotonic() + END_TIMEOUT_S
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        while left:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            left.pop(pid, None)
            if pid == 0 and signal.sigtimedwait({signal.SIGCHLD}, max(0.0, deadline - time.monotonic())) is None:
                return
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Known(NamedTuple):
    """A node as an administrator finds it: `process` is None when it has ended by itself."""

    name: str
    address: str
    process: Optional[int]


def known(layout: Layout) -> list[Known]:
    """The nodes of a daemon that runs; none when it has no simulated ones."""
    try:
        noted = json.loads(layout.node_list.read_bytes())
    except FileNotFoundError:
        return []
    boot = boot_id()
    return [
        Known(
            node["name"],
            node["address"],
            node["pid"] if node["boot"] == boot and start_ticks(node["pid"]) == node["start"] else None,
        )
        for node in noted
    ]
