"""Where jobs run: the directories of the batch system and the nodes that it can give to a job.

There is one node, this machine, or there are simulated ones, each a `Machine` with directories and namespaces of
its own. A job asks `allocate` for its nodes and finds them again by the names in its `exec_host`.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Optional

from vsub.engines.local import protocol
from vsub.engines.local.protocol import Refused
from vsub.engines.local.resources import NodeRequest

if TYPE_CHECKING:
    from vsub.engines.local.namespaces import Place


class Layout(NamedTuple):
    """The spool directory. What users' processes must reach can be searched, not listed, by all."""

    spool: Path

    @property
    def mom_priv(self) -> Path:
        """Hooks; also their working directory."""
        return self.spool / "mom_priv"

    @property
    def jobs(self) -> Path:
        """Scripts of started jobs, `<jobid>.SC`."""
        return self.mom_priv / "jobs"

    @property
    def aux(self) -> Path:
        """Node files."""
        return self.spool / "aux"

    @property
    def output(self) -> Path:
        """Output files of running jobs."""
        return self.spool / "spool"

    @property
    def undelivered(self) -> Path:
        """Output files that could not be delivered."""
        return self.spool / "undelivered"

    @property
    def private(self) -> Path:
        """The server's state."""
        return self.spool / "server_priv"

    @property
    def records(self) -> Path:
        """Jobs, `<jobid>.json` with the script as submitted beside it."""
        return self.private / "jobs"

    @property
    def node_list(self) -> Path:
        """The simulated nodes that run."""
        return self.private / "nodes.json"

    @property
    def offline(self) -> Path:
        """The names of the nodes that get no jobs for now."""
        return self.private / "offline.json"

    @property
    def nodes(self) -> Path:
        """What belongs to simulated nodes, a directory each."""
        return self.spool / "nodes"

    def node(self, name: str) -> Layout:
        """The spool directory of a simulated node."""
        return Layout(self.nodes / name)

    def output_file(self, prefix: str, stream: str) -> Path:
        """Where standard output ("o") or error ("e") of a job lies while it runs."""
        return self.output / f"{prefix}.{'OU' if stream == 'o' else 'ER'}"

    def create(self) -> None:
        """Make what is missing. Raises PermissionError when others could change what root runs from here."""
        self.create_node()
        self._make_all({self.private: 0o700, self.records: 0o700})

    def create_node(self) -> None:
        """Make what a mom needs. Raises PermissionError as `create` does."""
        self._make_all(
            {
                self.spool: 0o755,
                self.mom_priv: 0o751,
                self.jobs: 0o751,
                self.aux: 0o755,
                self.output: 0o711,
                self.undelivered: 0o711,
            }
        )

    def _make_all(self, modes: dict[Path, int]) -> None:
        for directory, mode in modes.items():
            try:
                directory.mkdir(mode=mode, parents=directory == self.spool)
                directory.chmod(mode)
            except FileExistsError:
                pass
            require_private(directory)


def require_private(directory: Path) -> None:
    """Raise PermissionError unless this is a directory of root's that nobody else can write."""
    seen = os.stat(directory, follow_symlinks=False)
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != 0 or seen.st_mode & 0o022:
        raise PermissionError(f"{directory} must be a directory that belongs to root and that only root can write")


class Machine(NamedTuple):
    """One node: its name, its directories, where its hooks lie, and the namespaces of a simulated one."""

    name: str
    layout: Layout
    hooks: Path
    place: Optional[Place] = None


class Cluster(NamedTuple):
    """This machine, called `host`, as the batch system: the server's directories and the nodes."""

    host: str
    layout: Layout
    machines: tuple[Machine, ...]
    offline: frozenset[str] = frozenset()
    """The names of nodes that get no jobs for now."""

    @classmethod
    def of(cls, host: str, layout: Layout, simulated: tuple[Machine, ...] = ()) -> Cluster:
        """The simulated nodes or, when there are none, this machine as the only node."""
        return cls(host, layout, simulated or (Machine(host, layout, layout.mom_priv),))

    def allocate(self, request: NodeRequest, *, now: bool = False) -> list[str]:
        """The lines of the node file for a job, the mother superior's first; `now`: on nodes that are not offline.

        Raises Refused when there are not that many nodes, or not the named ones, or one is named twice.
        """
        away = self.offline if now else frozenset()
        named = [self._known(head) for head, _ in request.parts if not head.isdigit()]
        free = [machine.name for machine in self.machines if machine.name not in {*named, *away}]
        lines: list[str] = []
        enough = None not in named and len(set(named)) == len(named) and away.isdisjoint(filter(None, named))
        for head, ppn in request.parts:
            count = int(head) if head.isdigit() else 0
            enough = enough and count <= len(free)
            names, free = (free[:count], free[count:]) if count else ([self._known(head) or ""], free)
            lines.extend(name for name in names for _ in range(ppn))
        if not enough:
            raise Refused(
                protocol.EXCEEDS,
                f"cannot locate feasible nodes (the embedded batch system has {self._described()}, "
                "and runs one job at a time)",
            )
        return lines

    def can_start(self, request: NodeRequest) -> bool:
        """Whether the job waits for no node that is offline; one that could not start anyway need not wait."""
        return not self.offline or self._fits(request, now=True) or not self._fits(request, now=False)

    def _fits(self, request: NodeRequest, *, now: bool) -> bool:
        try:
            self.allocate(request, now=now)
        except Refused:
            return False
        return True

    def _known(self, name: str) -> Optional[str]:
        """The node that a job names; a single one has other names as well."""
        names = {machine.name: machine.name for machine in self.machines}
        if len(self.machines) == 1:
            names.update({self.host.partition(".")[0]: self.machines[0].name, "localhost": self.machines[0].name})
        return names.get(name)

    def _described(self) -> str:
        names = [machine.name for machine in self.machines]
        return f"one node, {names[0]}" if len(names) == 1 else f"{len(names)} nodes, {names[0]} to {names[-1]}"

    def of_job(self, exec_host: str) -> tuple[Machine, ...]:
        """The nodes of a job, the mother superior first; one that has none yet counts as being on the first."""
        names = [part.partition("/")[0] for part in exec_host.split("+")] if exec_host else []
        return tuple(map(self._named, names)) or self.machines[:1]

    def _named(self, name: str) -> Machine:
        """A node, also one of an earlier daemon with another number of nodes: its directories, on this machine."""
        for machine in self.machines:
            if machine.name == name:
                return machine
        simulated = re.fullmatch(r"n\d{1,2}", name, re.ASCII) and self.layout.node(name).spool.is_dir()
        layout = self.layout.node(name) if simulated else self.layout
        return Machine(name, layout, self.layout.mom_priv)


def exec_host(lines: list[str]) -> str:
    """A list of nodes as `qstat -f` and the moms write it: `host/0-1+other/0`."""
    counts = {name: lines.count(name) for name in lines}
    return "+".join(f"{name}/0" if count == 1 else f"{name}/0-{count - 1}" for name, count in counts.items())
