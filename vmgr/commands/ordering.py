"""Giving an order to a guest, and showing what it answers while it is carried out."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from typing import Any, Optional

import click

from vmgr.commands.progress import Progress, progress
from vmgr.config import load_config
from vmgr.errors import Code, VTorqueError, printable
from vmgr.node.client import AgentLink
from vmgr.node.control import MAX_REQUEST_BYTES
from vmgr.paths import installation


def parse_guest(text: str) -> tuple[str, Optional[int]]:
    """The job and the rank in `JOB[:RANK]`. Raises VTorqueError (VT-VALUE)."""
    job, colon, rank = text.partition(":")
    if not job or "/" in job or (colon and not (rank.isascii() and rank.isdigit() and len(rank) <= 8)):
        raise VTorqueError(
            f"{text[:80]!r} names no guest", code=Code.VALUE, hint="JOB or JOB:RANK is needed, such as 12.server:1"
        )
    return job, int(rank) if colon else None


def give(guest: str, op: str, *, quiet: bool = False, **members: object) -> dict[str, Any]:
    """Give the order `op` to the guest `JOB[:RANK]` and show, unless `quiet`, how far it is; gives its last answer.

    Members that are None are left out. Raises VTorqueError as `AgentLink.order` does.
    """
    job, rank = parse_guest(guest)
    wanted = {key: value for key, value in {**members, "rank": rank}.items() if value is not None}
    if len(json.dumps({"op": op, **wanted})) >= MAX_REQUEST_BYTES:
        raise VTorqueError("the file's path or the description is too long", code=Code.VALUE)
    with ExitStack() as shown:
        return asyncio.run(_give(job, op, wanted, None if quiet else shown.enter_context(progress())))


async def _give(job: str, op: str, members: dict[str, object], shown: Optional[Progress]) -> dict[str, Any]:
    link = await AgentLink.open(load_config(installation()).paths, job)
    last: dict[str, Any] = {}
    step = None
    try:
        async for last in link.order(op, **members):
            if "warning" in last:
                click.echo(f"vmgr: {printable(str(last['warning']))}", err=True)
            if "doing" in last and shown is not None:
                if last["doing"] != step:
                    step = last["doing"]
                    shown.step(str(step))
                if type(last.get("so_far")) is int:
                    total = last.get("total")
                    shown.done(last["so_far"], total if type(total) is int else None)
    finally:
        link.close()
    return last


def show(answer: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print what was made: `text`, or all of the answer."""
    click.echo(json.dumps(answer) if as_json else text)
