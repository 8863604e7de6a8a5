"""Giving an order to a guest, wherever it is, and showing what it answers while it is carried out."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Callable, Optional

import click

from vmgr.commands.progress import Shown
from vmgr.config import load_config
from vmgr.errors import Code, VTorqueError, printable
from vmgr.node.control import MAX_REQUEST_BYTES
from vmgr.paths import installation
from vmgr.reach.target import Target, parse_target

if TYPE_CHECKING:
    from vmgr.node.client import AgentLink


def give(guest: str, op: str, *, quiet: bool = False, **members: object) -> dict[str, Any]:
    """Give the order `op` to the guest `JOB[:RANK]` and show, unless `quiet`, how far it is; gives its last answer.

    Members that are None are left out. Raises VTorqueError as `vmgr.reach.agents.agent_of` and `AgentLink.order` do.
    """
    target = parse_target(guest)
    wanted = {key: value for key, value in members.items() if value is not None}
    if len(json.dumps({"op": op, "rank": 0, **wanted})) + 16 >= MAX_REQUEST_BYTES:
        raise VTorqueError("the file's path or the description is too long", code=Code.VALUE)
    return asyncio.run(_give(target, op, wanted, None if quiet else Steps()))


async def _give(target: Target, op: str, members: dict[str, object], steps: Optional[Steps]) -> dict[str, Any]:
    from vmgr.reach.agents import agent_of  # paramiko takes its time

    with ExitStack() as shown:
        if steps is not None:
            shown.callback(steps.end)
        async with agent_of(load_config(installation()), target) as reached:
            rank = (reached.member or {})["rank"]
            return await follow(reached.link, op, steps, rank=rank, **members)


async def follow(link: AgentLink, op: str, steps: Optional[Steps], **members: object) -> dict[str, Any]:
    """Give an order to an agent and show, unless `steps` is None, how far it is; gives its last answer.

    Raises VTorqueError as `AgentLink.order` does.
    """
    last: dict[str, Any] = {}
    async for last in link.order(op, **members):
        if "warning" in last:
            click.echo(f"vmgr: {printable(str(last['warning']))}", err=True)
        if "doing" in last and steps is not None:
            steps.tell(str(last["doing"]), last.get("so_far"), last.get("total"))
    return last


class Steps:
    """Shows the steps of an order, those of a known size as bars. What an agent tells may be a user's word."""

    def __init__(self) -> None:
        self._shown = Shown()
        self._step: Optional[str] = None
        self._done = 0
        self._bar = ExitStack()
        self._advance: Optional[Callable[[int], None]] = None

    def tell(self, step: str, so_far: object, total: object) -> None:
        """The order is at `step`, so many bytes of it are done."""
        if step != self._step:
            self.end()
            self._step, self._done = step, 0
            if type(total) is not int:
                self._shown.line(step)
        if self._advance is None and type(total) is int and total > 0:
            self._advance = self._bar.enter_context(self._shown.bar(step, total))
        if self._advance is not None and type(so_far) is int and so_far > self._done:
            self._advance(so_far - self._done)
            self._done = so_far

    def end(self) -> None:
        """The step is over."""
        self._advance = None
        self._bar.close()


def show(answer: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print what was made: `text`, in which may be another node's word, or all of the answer."""
    click.echo(json.dumps(answer) if as_json else printable(text))
