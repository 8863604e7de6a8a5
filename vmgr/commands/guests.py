"""`vmgr ps` and `vmgr top`: the guests of this node, of a job or of all nodes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Optional

import click

from vmgr.commands.access import is_root
from vmgr.commands.table import echo, print_rows, rows_table, terminal
from vmgr.config import Config, load_config
from vmgr.errors import Code, VTorqueError
from vmgr.paths import installation

if TYPE_CHECKING:
    from vmgr.reach.rows import GuestRow
    from vmgr.suspended.listing import Stored

STORED_SECONDS = 30.0
HEADINGS = ("job", "rank", "node", "image", "vcpus", "ram_mib", "state", "age", "cpu", "address", "reason")
WIDE = ("job", "rank", "node", "user", "guest", *HEADINGS[3:10], "mac", "ssh", "reason")


class Where:
    """Whose guests are looked at: of all nodes, of one job, else of this node or, from a front end, of all jobs."""

    def __init__(self, config: Config, every: bool, job: Optional[str]) -> None:
        self.config, self.every, self.job = config, every, _meant(config, job)
        self._stored: Optional[list[Stored]] = None
        self._stored_until = 0.0

    def look(self) -> tuple[list[GuestRow], list[VTorqueError]]:
        """The guests and suspended jobs, and why some nodes say nothing.

        Raises VTorqueError when nothing can be asked at all.
        """
        from vmgr.reach.rows import with_suspended

        stored = self._suspended()
        try:
            rows, problems = self._look()
        except VTorqueError as err:
            if not stored or self.job is None or err.code is not Code.AGENT:  # a suspended job is on no node
                raise
            rows, problems = [], []
        return with_suspended(rows, stored), problems

    def _suspended(self) -> list[Stored]:
        """The suspended jobs that are looked at, where it can be seen which there are: root's are those of all nodes.

        A look at them holds for a while: each user's takes a process.
        """
        if self.config.suspended.folder is None or (is_root() and not self.every and self.job is None):
            return []
        if self._stored is None or time.monotonic() > self._stored_until:
            from vmgr.suspended.listing import stored_jobs

            try:
                self._stored = stored_jobs(self.config).stored
            except VTorqueError:  # not every front end has that file system
                self._stored = []
            self._stored_until = time.monotonic() + STORED_SECONDS
        return [each for each in self._stored if self.job is None or each.is_of(self.job)]

    def _look(self) -> tuple[list[GuestRow], list[VTorqueError]]:
        from vmgr.reach.agents import look, look_here
        from vmgr.reach.rows import guest_rows

        nodes = self._nodes()
        if nodes is None:
            return guest_rows(asyncio.run(look_here(self.config.paths))), []
        seen = asyncio.run(look(self.config, nodes, self.job))
        if seen.problems and len(seen.problems) == len(set(nodes)):
            _told(seen.problems[:-1])
            raise seen.problems[-1]
        return guest_rows(seen.snapshots), seen.problems

    def _nodes(self) -> Optional[list[str]]:
        """The nodes to ask, None for this one alone."""
        from vmgr.node.record import listed
        from vmgr.reach.agents import job_here, look_here
        from vmgr.reach.shell import is_here
        from vmgr.reach.where import all_nodes, nodes_of_job, running_jobs

        if self.job is not None:
            if job_here(self.config.paths, self.job) is not None:
                told = [snapshot.get("nodes") for snapshot in asyncio.run(look_here(self.config.paths, self.job))]
                if told and isinstance(told[0], list):
                    return [str(node) for node in told[0]]
            return list(nodes_of_job(self.config, self.job).nodes)
        if self.every:
            return all_nodes(self.config)
        here = self.config.paths.run / "jobs"
        if any(map(listed, listed(here))):
            return None
        try:
            if any(map(is_here, all_nodes(self.config))):
                return None
        except VTorqueError:
            if here.exists():
                return None  # it has been a node, and most nodes cannot ask the batch system
            raise
        return [node for job in running_jobs(self.config) for node in job.nodes]


def _meant(config: Config, job: Optional[str]) -> Optional[str]:
    """The job of `--job`, by an id that agents and what is stored know it by. Raises VTorqueError."""
    if job is None:
        return None
    from vmgr.reach.target import parse_target
    from vmgr.reach.where import meant

    return meant(config, parse_target(job).job)


def _told(problems: list[VTorqueError]) -> None:
    for problem in problems:
        print(problem, file=sys.stderr)


@click.command()
@click.option("--all", "every", is_flag=True, help="Ask every node of the batch system.")
@click.option("--job", metavar="JOB", help="The guests of this job, on all of its nodes.")
@click.option("--wide", is_flag=True, help="With user, name, MAC address and SSH port.")
@click.option("--json", "as_json", is_flag=True, help="For programs, with everything.")
def ps(every: bool, job: Optional[str], wide: bool, as_json: bool) -> None:
    """List guests: all of them for root, one's own for a user.

    On a node those of this node; on a front end, or with --all or --job, those of other nodes too, each asked over
    your own SSH. Nodes that cannot be reached are named on standard error. CPU is in percent of one CPU,
    since the start. Suspended jobs, which are on no node, are shown once each; to root with --all or --job.

    Example: vmgr ps --job 12
    """
    rows, problems = Where(load_config(installation()), every, job).look()
    _told(problems)
    if as_json:
        echo(json.dumps([{**row._asdict(), "cpu_percent": row.cpu_percent} for row in rows], indent=1))
        return
    print_rows(WIDE if wide else HEADINGS, [cells(row, wide=wide) for row in rows], as_json=False)


@click.command()
@click.option("--all", "every", is_flag=True, help="Ask every node of the batch system.")
@click.option("--job", metavar="JOB", help="The guests of this job, on all of its nodes.")
@click.option("--wide", is_flag=True, help="With user, name, MAC address and SSH port.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one list of guests a line, once unless --count.")
@click.option(
    "--interval", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True, help="Seconds between two looks."
)
@click.option("--count", type=click.IntRange(1), help="End after so many looks.")
def top(every: bool, job: Optional[str], wide: bool, as_json: bool, interval: float, count: Optional[int]) -> None:
    """Show guests and refresh that, until Ctrl-C; the busiest first.

    In a pipe one table is printed, or as many as --count says. CPU is in percent of one CPU since the look before.

    Example: vmgr top --interval 5
    """
    looks = _Looks(Where(load_config(installation()), every, job), interval)
    if as_json or not sys.stdout.isatty():
        for number in range(count or 1):
            rows, problems = looks.next()
            _told(problems)
            if as_json:
                echo(json.dumps([{**row._asdict(), "cpu_percent": looks.percent(row)} for row in rows]))
                continue
            if number:
                echo("")
            print_rows(WIDE if wide else HEADINGS, [looks.cells(row, wide) for row in rows], as_json=False)
        return
    try:
        _live(looks, wide, count)
    except KeyboardInterrupt:
        pass  # how one leaves it


class _Looks:
    """Looks at guests, one after the other, and the CPU time that each used between two of them."""

    def __init__(self, where: Where, interval_s: float) -> None:
        self._where = where
        self._interval_s = interval_s
        self._last: Optional[float] = None
        self._before: Mapping[tuple[str, Optional[str]], tuple[float, float]] = {}
        self._percent: dict[tuple[str, Optional[str]], float] = {}

    def next(self) -> tuple[list[GuestRow], list[VTorqueError]]:
        """Wait until it is time, and look."""
        if self._last is not None:
            time.sleep(max(0.0, self._last + self._interval_s - time.monotonic()))
        self._last = time.monotonic()
        rows, problems = self._where.look()
        now = {(row.job, row.guest): (row.age_s, row.cpu_s) for row in rows if row.age_s and row.cpu_s is not None}
        self._percent = {
            key: 100 * (cpu - self._before[key][1]) / (age - self._before[key][0])
            for key, (age, cpu) in now.items()
            if key in self._before and age > self._before[key][0] and cpu >= self._before[key][1]
        }
        self._before = now
        return sorted(rows, key=lambda row: -(self.percent(row) or 0)), problems

    def percent(self, row: GuestRow) -> Optional[float]:
        return self._percent.get((row.job, row.guest), row.cpu_percent)

    def cells(self, row: GuestRow, wide: bool) -> list[object]:
        return cells(row, wide=wide, percent=self.percent(row))


def _live(looks: _Looks, wide: bool, count: Optional[int]) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(console=terminal(), screen=count is None, auto_refresh=False) as live:
        number = 0
        while count is None or number < count:
            number += 1
            rows, problems = looks.next()
            table = rows_table(WIDE if wide else HEADINGS, [looks.cells(row, wide) for row in rows])
            head = Text(f"{os.uname().nodename}  {time.strftime('%H:%M:%S')}  {len(rows)} guests", style="bold")
            live.update(Group(head, table, *(Text(str(problem), style="red") for problem in problems)), refresh=True)


def cells(row: GuestRow, *, wide: bool, percent: Optional[float] = None) -> list[object]:
    """What a row shows, under HEADINGS or WIDE; a dash stands for what is not known."""
    cpu = row.cpu_percent if percent is None else percent
    start = [row.job, row.rank, row.node]
    middle = [row.image, row.vcpus, row.ram_mib, row.state, _age(row.age_s), None if cpu is None else f"{cpu:.0f}%"]
    end: list[object] = [row.address]
    if wide:
        start += [row.user, row.guest]
        end += [row.mac, row.port]
    return ["-" if cell is None else cell for cell in (*start, *middle, *end)] + [row.reason]


def _age(seconds: Optional[float]) -> Optional[str]:
    if seconds is None:
        return None
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
