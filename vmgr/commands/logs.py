"""`vmgr logs`: what the agents of a job have logged, and its guests' consoles."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional

import click

from vmgr.commands.table import echo
from vmgr.config import Config, load_config
from vmgr.errors import Code, VTorqueError
from vmgr.paths import installation
from vmgr.reach.target import parse_target

if TYPE_CHECKING:
    from vmgr.report.find import Found
    from vmgr.report.loglines import Record

_CHUNK = 64 << 10


class Wanted(NamedTuple):
    """What of a job is to be shown: its log, or the console of the guest with a rank; and what comes as well."""

    job_id: str
    rank: Optional[int]
    follow: bool

    @property
    def what(self) -> str:
        return "log" if self.rank is None else f"console of guest {self.rank}"

    @property
    def words(self) -> list[str]:
        """How another node is asked for what it has of it."""
        words = ["logs", "--here", self.job_id]
        words += [] if self.rank is None else ["--console", str(self.rank)]
        return [*words, "--follow"] if self.follow else words


@click.command()
@click.argument("job", metavar="JOB")
@click.option("--node", metavar="NODE", help="Of this node; without it, of all nodes of the job.")
@click.option("--here", is_flag=True, help="Only what this node has.")
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes, until the job ends; of one node.")
@click.option(
    "--console", "rank", type=click.IntRange(0), is_flag=False, flag_value=0, metavar="[RANK]",
    help="The console of this guest (0) instead.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="For programs, one object a line.")
def logs(job: str, node: Optional[str], here: bool, follow: bool, rank: Optional[int], as_json: bool) -> None:
    """Show what the node agents have logged of a job.

    It is there during the job and after it. Root sees all jobs, a user the user's own. Lines of several nodes are in
    the order of their times, each with its node. What a console says to its terminal, such as colours, is left out.

    Example: vmgr logs 12.server --follow
    """
    target = parse_target(job)
    if target.rank is not None:
        raise VTorqueError(
            f"{job} is one guest of a job", code=Code.VALUE, hint=f"write {target.job} --console {target.rank}"
        )
    if here and node:
        raise VTorqueError("--here and --node contradict each other", code=Code.USAGE, hint="leave one out")
    from vmgr.reach.shell import is_here
    from vmgr.report.find import find, whole

    config = load_config(installation())
    wanted = Wanted(whole(config, target.job) if here or node else target.job, rank, follow)
    if here:
        nodes = [os.uname().nodename]
    elif node:
        nodes = [node]
    else:
        found = find(config, target.job)
        wanted = wanted._replace(job_id=found.job_id)
        nodes = _wanted_nodes(found, wanted)
    if len(nodes) > 1:
        _show_merged(config, wanted, nodes, as_json)
    elif is_here(nodes[0]):
        _show_here(config, wanted, _teller(nodes[0], wanted, as_json))
    else:
        _show_there(config, wanted, nodes[0], _teller(nodes[0], wanted, as_json))


def _wanted_nodes(found: Found, wanted: Wanted) -> list[str]:
    """The nodes that have it: that of the guest, this one or the first one to follow, else all. Raises VTorqueError."""
    from vmgr.reach.shell import is_here

    nodes = list(found.nodes)
    if wanted.rank is not None:
        per_node = max(1, len(found.lead.guests) if found.lead else 1)
        if wanted.rank >= per_node * len(nodes):
            raise VTorqueError(
                f"job {found.job_id} has no guest of rank {wanted.rank}",
                code=Code.VALUE,
                hint=f"it has 0 to {per_node * len(nodes) - 1}",
            )
        return [nodes[wanted.rank // per_node]]
    return [next(filter(is_here, nodes), nodes[0])] if wanted.follow else nodes


def _show_here(config: Config, wanted: Wanted, tell: Callable[[str], None]) -> None:
    from vmgr.report import loglines
    from vmgr.report.gather import job_file, open_kept

    path = job_file(config, wanted.job_id, ".log" if wanted.rank is None else _console_suffix(config, wanted))
    fd = open_kept(path, wanted.job_id, wanted.what)
    try:
        if wanted.follow:
            loglines.follow(fd, path, config.paths, wanted.job_id, tell)
        else:
            loglines.read(fd, tell)
    finally:
        os.close(fd)


def _console_suffix(config: Config, wanted: Wanted) -> str:
    """What the console of a guest of this node is called. Raises VTorqueError (VT-VALUE) when the guest is not here."""
    from vmgr.report.gather import found_here
    from vmgr.report.timeline import newest

    parts = newest(found_here(config, wanted.job_id))
    ranks = [guest.rank for part in parts for guest in part.guests] or [0]
    if wanted.rank not in ranks:
        raise VTorqueError(
            f"guest {wanted.rank} of job {wanted.job_id} is not on this node",
            code=Code.VALUE,
            hint=f"{', '.join(map(str, ranks))} may be here",
        )
    number = ranks.index(wanted.rank) + 1
    return ".console" if number == 1 else f".{number}.console"


def _show_there(config: Config, wanted: Wanted, node: str, tell: Callable[[str], None]) -> None:
    """What another node shows. Raises VTorqueError."""
    from vmgr.reach.shell import Completed, open_on, run_on
    from vmgr.report.gather import refusal
    from vmgr.report.loglines import Lines

    argv, limit = [f"{installation().prefix}/bin/vmgr", *wanted.words], config.timeouts.reach
    lines = Lines(tell)
    if not wanted.follow:
        done = run_on(node, argv, timeout_s=limit)
        lines.feed(done.out)
    else:
        stream = open_on(node, argv, timeout_s=limit)
        try:
            while data := stream.socket.recv(_CHUNK):
                lines.feed(data)
            done = Completed(stream.wait(), b"", stream.errors())
        finally:
            stream.close()
    lines.end()
    if done.status != 0:
        raise refusal(node, done)


def _show_merged(config: Config, wanted: Wanted, nodes: list[str], as_json: bool) -> None:
    """The logs of several nodes; those that give none are named on standard error, and it is a failure if none does."""
    from concurrent.futures import ThreadPoolExecutor

    from vmgr.reach.shell import is_here
    from vmgr.report.gather import AT_ONCE
    from vmgr.report.loglines import merged, records

    def fetch(node: str) -> list[Record]:
        lines: list[str] = []
        if is_here(node):
            _show_here(config, wanted, lines.append)
        else:
            _show_there(config, wanted, node, lines.append)
        return list(records(node.partition(".")[0], lines))

    logs, problems = [], []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for node, asked in [(node, pool.submit(fetch, node)) for node in nodes]:
            try:
                logs.append(asked.result())
            except VTorqueError as err:
                problems.append(err)
                click.echo(f"vmgr: {node}: {err}", err=True)
    if not logs:
        raise problems[0]
    for record in merged(logs):
        _tell_record(record, as_json, named=True)


def _teller(node: str, wanted: Wanted, as_json: bool) -> Callable[[str], None]:
    """What prints the lines of one node."""
    from vmgr.report.loglines import records

    name = node.partition(".")[0]
    if wanted.rank is not None:
        rank = wanted.rank
        return lambda line: echo(json.dumps({"node": name, "rank": rank, "line": line}) if as_json else line)

    def tell(line: str) -> None:
        for record in records(name, [line]):
            _tell_record(record, as_json, named=False)

    return tell


def _tell_record(record: Record, as_json: bool, *, named: bool) -> None:
    if as_json:
        echo(json.dumps({"node": record.node, "time": record.time, "level": record.level, "text": record.text}))
    else:
        echo(f"{record.node}: {record.line}" if named else record.line)
