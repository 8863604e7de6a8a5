"""Where jobs run: the directories of the batch system and the nodes that it can give to a job.

There is one node, this machine. Simulated nodes will be further `Machine`s with a mom_priv of their own; a
job asks `allocate` for its nodes and the rest of the engine sees only the lines that this returns.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from vsub.engines.local import protocol
from vsub.engines.local.protocol import Refused
from vsub.engines.local.resources import NodeRequest


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

    def output_file(self, prefix: str, stream: str) -> Path:
        """Where standard output ("o") or error ("e") of a job lies while it runs."""
        return self.output / f"{prefix}.{'OU' if stream == 'o' else 'ER'}"

    def create(self) -> None:
        """Make what is missing. Raises PermissionError when others could change what root runs from here."""
        modes = {
            self.spool: 0o755,
            self.mom_priv: 0o751,
            self.jobs: 0o751,
            self.aux: 0o755,
            self.output: 0o711,
            self.undelivered: 0o711,
            self.private: 0o700,
            self.records: 0o700,
        }
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
    """One node: its name and its directories."""

    name: str
    layout: Layout

    def allocate(self, request: NodeRequest) -> list[str]:
        """The lines of the node file for a job. Raises Refused when there are not that many nodes."""
        head, ppn = request.parts[0]
        names = (self.name, self.name.partition(".")[0], "localhost")
        if len(request.parts) != 1 or not (head == "1" or head in names):
            raise Refused(
                protocol.EXCEEDS,
                "cannot locate feasible nodes (the embedded batch system has one node, "
                f"{self.name}, and runs one job at a time)",
            )
        return [self.name] * ppn


def exec_host(lines: list[str]) -> str:
    """A list of nodes as `qstat -f` and the moms write it: `host/0-1+other/0`."""
    counts = {name: lines.count(name) for name in lines}
    return "+".join(f"{name}/0" if count == 1 else f"{name}/0-{count - 1}" for name, count in counts.items())
