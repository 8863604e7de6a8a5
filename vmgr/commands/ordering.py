"""Giving an order to a guest, and showing what it answers while it is carried out."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any, Optional

import click

from vmgr.config import load_config
from vmgr.errors import Code, VTorqueError
from vmgr.node.client import AgentLink
from vmgr.node.control import MAX_REQUEST_BYTES
from vmgr.paths import installation

_LINE_SECONDS = 5.0


def parse_guest(text: str) -> tuple[str, Optional[int]]:
    """The job and the rank in `JOB[:RANK]`. Raises VTorqueError (VT-VALUE)."""
    job, colon, rank = text.partition(":")
    if not job or "/" in job or (colon and not (rank.isascii() and rank.isdigit() and len(rank) <= 8)):
        raise VTorqueError(
            f"{text[:80]!r} names no guest", code=Code.VALUE, hint="JOB or JOB:RANK is needed, such as 12.server:1"
        )
    return job, int(rank) if colon else None


def give(guest: str, op: str, *, as_json: bool, **members: object) -> dict[str, Any]:
    """Give the order `op` to the guest `JOB[:RANK]` and show how it is carried out; gives its last answer.

    Raises VTorqueError as `AgentLink.order` does.
    """
    job, rank = parse_guest(guest)
    wanted = {key: value for key, value in {**members, "rank": rank}.items() if value is not None}
    if len(json.dumps({"op": op, **wanted})) >= MAX_REQUEST_BYTES:
        raise VTorqueError("the file's path or the description is too long", code=Code.VALUE)
    return asyncio.run(_give(job, op, wanted, _Shown(as_json=as_json)))


async def _give(job: str, op: str, members: dict[str, object], shown: _Shown) -> dict[str, Any]:
    link = await AgentLink.open(load_config(installation()).paths, job)
    last: dict[str, Any] = {}
    try:
        async for answer in link.order(op, **members):
            shown.answer(answer)
            last = answer
    finally:
        link.close()
        shown.end()
    return last


class _Shown:
    """What is being done, on standard error: one line that changes on a terminal, now and then a line elsewhere."""

    def __init__(self, *, as_json: bool) -> None:
        self._quiet = as_json
        self._terminal = sys.stderr.isatty()
        self._said = ""
        self._when = 0.0

    def answer(self, answer: dict[str, Any]) -> None:
        if "warning" in answer:
            self.end()
            click.echo(f"vmgr: {answer['warning']}", err=True)
        if "doing" in answer and not self._quiet:
            self._say(str(answer["doing"]))

    def _say(self, text: str) -> None:
        if self._terminal:
            click.echo(f"\r\033[K{text}", err=True, nl=False)
        elif text.rstrip(" %0123456789") != self._said or time.monotonic() >= self._when + _LINE_SECONDS:
            click.echo(text, err=True)
            self._when = time.monotonic()
        self._said = text.rstrip(" %0123456789")

    def end(self) -> None:
        """Leave the line that changes."""
        if self._terminal and self._said:
            click.echo("\r\033[K", err=True, nl=False)


def show(answer: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print what was made: `text`, or all of the answer."""
    click.echo(json.dumps(answer) if as_json else text)
