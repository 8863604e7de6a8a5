"""`vmgr doctor`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

import click

from vmgr.commands.table import print_rows
from vmgr.config import load_config
from vmgr.errors import Code, VTorqueError
from vmgr.paths import installation

if TYPE_CHECKING:
    from vmgr.doctor.finding import Finding, Level
    from vmgr.doctor.fleet import Report

NODE_SECONDS = 120


@click.command()
@click.option("--nodes", metavar="SET", help="Of these nodes, such as n[01-16],n20, reached by pdsh.")
@click.option("--rcmd", metavar="TYPE", default="ssh", show_default=True, help="How pdsh reaches them (pdsh -L).")
@click.option(
    "--timeout", type=click.IntRange(1, 3600), default=NODE_SECONDS, show_default=True, metavar="S",
    help="Seconds that a node has to answer.",
)  # fmt: skip
@click.option("--all", "show_all", is_flag=True, help="With --nodes: also what is in order.")
@click.option("--strict", is_flag=True, help="Warnings count as failures.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_context
def doctor(
    context: click.Context,
    nodes: Optional[str],
    rcmd: str,
    timeout: int,
    show_all: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Tell what stands between this node and its first guest.

    It says what to do about it, and needs root. Each finding has a level: ok, note, warning (keeps some guests from
    running), failure (keeps all, or is a danger). KVM is tried by starting a guest's kernel. Nothing on the node is
    changed.

    Ends with 0 when there is no failure, and all nodes answered; else with 1. With --strict a warning counts.

    Example: vmgr doctor
    """
    from vmgr.doctor.finding import Level, worst

    least = Level.WARNING if strict else Level.FAILURE
    if nodes is not None:
        context.exit(_fleet(nodes, rcmd, timeout, least, show_all, as_json))
    findings = _here()
    level = worst(findings)
    if as_json:
        plain = [finding.as_plain() for finding in findings]
        click.echo(json.dumps({"worst": level.text, "findings": plain}, indent=1))
    else:
        for finding in findings:
            click.echo("\n".join(_lines(finding)))
    context.exit(int(level >= least))


def _here() -> list[Finding]:
    from vmgr.doctor.examine import examine
    from vmgr.doctor.finding import Finding, Level, Node

    if os.geteuid() != 0:
        raise VTorqueError("vmgr doctor tries what root does on a node", code=Code.ACCESS, hint="run it as root")
    install = installation()
    try:
        config = load_config(install)
    except VTorqueError as err:
        if err.code not in (Code.CONFIG, Code.TRUST):
            raise
        return [Finding("configuration", Level.FAILURE, err.message, err.hint or "vmgr config check")]
    return examine(Node(install, config))


def _lines(finding: Finding) -> list[str]:
    line = f"{finding.level.text:<8} {finding.subject:<13} {finding.what}"
    return [line] if finding.remedy is None else [line, f"{'':<22} remedy: {finding.remedy}"]


def _fleet(nodes: str, rcmd: str, timeout: int, least: Level, show_all: bool, as_json: bool) -> int:
    from vmgr.doctor.finding import worst
    from vmgr.doctor.fleet import ask
    from vmgr.pdsh import expand

    command = [f"{installation().prefix}/bin/vmgr", "doctor", "--json"]
    with _ending_in_order():
        reports = ask(expand(nodes, rcmd), command, rcmd=rcmd, timeout_s=timeout)
    if as_json:
        click.echo(json.dumps({"nodes": {report.node: _plain(report) for report in reports}}, indent=1))
    else:
        print_rows(("node", "level", "subject", "finding", "remedy"), _rows(reports, show_all), as_json=False)
        silent = [report.node for report in reports if report.problem is not None]
        if silent:
            click.echo(f"no answer from {len(silent)} of {len(reports)} nodes: {', '.join(silent)}")
    bad = any(report.problem is not None or worst(report.findings) >= least for report in reports)
    return int(bad)


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let signals end this program as an exception does, so that what pdsh has started ends with it."""
    before = {
        sig: signal.signal(sig, lambda number, _: sys.exit(128 + number)) for sig in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _plain(report: Report) -> dict[str, Any]:
    from vmgr.doctor.finding import worst

    if report.problem is not None:
        return {"problem": report.problem}
    return {"worst": worst(report.findings).text, "findings": [finding.as_plain() for finding in report.findings]}


def _rows(reports: Sequence[Report], show_all: bool) -> list[tuple[str, str, str, str, str]]:
    """Each node's findings, the worst first; one line for a node on which all is in order."""
    from vmgr.doctor.finding import Level

    rows = []
    for report in reports:
        if report.problem is not None:
            rows.append((report.node, "silent", "-", report.problem, "is it up, and may you run commands there?"))
            continue
        shown = [each for each in report.findings if show_all or each.level is not Level.OK]
        for each in sorted(shown, key=lambda each: -each.level):
            rows.append((report.node, each.level.text, each.subject, each.what, each.remedy or "-"))
        if not shown:
            rows.append((report.node, "ok", "-", f"{len(report.findings)} findings, all in order", "-"))
    return rows
