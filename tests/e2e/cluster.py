"""Installations with simulated nodes, whatever their batch system."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import psutil

from .conftest import CONFIG, Site, User, eventually

NODES = ("n1", "n2", "n3")
FOUR = "-l", "nodes=2:ppn=2", "-vm", "vms_per_node=2"
EVERYWHERE = CONFIG.replace("local: {{", "local: {{nodes: 3, ").replace(
    "  img: {{default: micro}}",
    "  img: {{default: micro}}\n  nodes: {{max: 3}}\n  vms_per_node: {{max: 3}}",
)


def nodes_of(text: str) -> tuple[str, ...]:
    """The simulated nodes of a configuration, if it has any."""
    count = re.search(r"^local: \{\{nodes: (\d+), ", text, re.MULTILINE)
    return tuple(f"n{number}" for number in range(1, int(count[1]) + 1)) if count else ()


class Cluster(Site):
    """An installation with simulated nodes, each with its own record, overlays and sockets."""

    def __init__(self, prefix: Path, root: Path, nodes: tuple[str, ...]) -> None:
        super().__init__(prefix, root)
        self.nodes = nodes

    @property
    def node(self) -> str:
        return self.nodes[0]

    @property
    def node_root(self) -> Path:
        return self.own(self.node)

    def entering(self, *command: str, user: Optional[User] = None) -> list[str]:
        enter = [str(self.prefix / "libexec" / "vtorque-local"), "enter", self.node]
        return [*enter, *super().entering(*command, user=user)]

    def wait_for(self, job_id: str, stage: str) -> None:
        eventually(lambda: any(self.reached(node, job_id, stage) for node in self.nodes), f"{job_id}: {stage}")

    def address(self, node: str) -> str:
        """A node's address."""
        return self.enter(node, "getent", "ahostsv4", node).split()[0]

    @property
    def outside(self) -> str:
        """The address of the machine itself, which is no node."""
        return re.sub(r"\d+$", "1", self.address(self.nodes[0]))

    def tables(self, node: str) -> list[str]:
        """The tables in a node's packet filter that jobs have made."""
        return re.findall(r"table .*vtorque-.*", self.enter(node, "nft", "list", "tables"))

    def left_behind(self) -> list[str]:
        left = [
            f"process {process}"
            for what in ("qemu-system", "libexec/vtorque-")
            for process in self.processes(what)
            if not self._belongs(process)
        ]
        for node in self.nodes:
            for place in ("spool/jobs", "spool/ended", "overlays"):
                left += [str(path) for path in (self.own(node) / place).glob("*")]
            left += [str(path) for path in (self.root / "local" / "nodes" / node / "mom_priv" / "jobs").glob("*")]
            looks = f"find {self.run}/jobs {self.run}/tombstones -mindepth 1 -maxdepth 1 2>/dev/null"
            seen = self.enter(node, "sh", "-c", f"{looks}; ip -o link; nft list tables")
            found = re.findall(rf"^{self.run}/.*|^\d+: (?:vt[^:@]+)|^table .*vtorque-.*", seen, re.MULTILINE)
            left += [f"{node} {what}" for what in found]
        return left

    def enter(self, node: str, *command: str) -> str:
        """What a command in a node says."""
        local = str(self.prefix / "libexec" / "vtorque-local")
        done = subprocess.run([local, "enter", node, *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def offline(self, node: str) -> Iterator[None]:
        """A node gets no jobs meanwhile."""
        local = str(self.prefix / "libexec" / "vtorque-local")
        subprocess.run([local, "offline", node], check=True, timeout=60)
        try:
            yield
        finally:
            subprocess.run([local, "online", node], check=True, timeout=60)

    def own(self, node: str) -> Path:
        """What a node has in place of the installation's folder, where that is each node's own."""
        return self.root / "local" / "nodes" / node / "own" / str(self.root)[1:]

    def log(self, node: str = "") -> str:
        """The log of a node, by default the first."""
        path = self.own(node or self.node) / "log" / "node.log"
        return path.read_text() if path.exists() else ""

    def logs(self) -> dict[str, str]:
        return {node: self.log(node) for node in self.nodes}

    def wait_on(self, node: str, job_id: str, stage: str) -> None:
        """Wait until a node's log says that a job has passed a stage there."""
        eventually(lambda: self.reached(node, job_id, stage), f"{job_id} on {node}: {stage}")

    def reached(self, node: str, job_id: str, stage: str) -> bool:
        return f"job {self.whole(job_id)}: {stage} after" in self.log(node)


@contextmanager
def hanging(cluster: Cluster, user: User, where: Path) -> Iterator[None]:
    """A FUSE file system of the user's over a folder, on every node, whose servers are stopped."""
    source = user.home / "behind"
    source.mkdir()
    enter = [str(cluster.prefix / "libexec" / "vtorque-local"), "enter"]
    command = ["bindfs", "-f", "-o", "nonempty,allow_other", str(source), str(where)]
    servers = [subprocess.Popen([*enter, node, *command]) for node in NODES]
    try:
        mounted = f"grep -q {where} /proc/mounts && echo mounted || :"
        eventually(
            lambda: all(cluster.enter(node, "sh", "-c", mounted) for node in NODES), "the FUSE mounts", limit_s=20
        )
        inside = [child for server in servers for child in psutil.Process(server.pid).children()]
        assert len(inside) == len(NODES)
        for process in inside:
            process.suspend()
        yield
    finally:
        for server in servers:
            server.kill()
            server.wait()
        for node in NODES:
            cluster.enter(node, "sh", "-c", f"umount -l {where} || :")
