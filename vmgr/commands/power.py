"""`vmgr power`: a guest's reset button and its switch."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from vmgr.config import load_config
from vmgr.errors import Code, VTorqueError, printable
from vmgr.paths import installation
from vmgr.reach.target import Target, parse_target

if TYPE_CHECKING:
    from vmgr.reach.agents import Reached


@click.group()
def power() -> None:
    """Press a guest's reset button, switch it off and on.

    Example: vmgr power reset 12:1
    """


_guest = click.argument("guest", metavar="JOB[:RANK]")
_yes = click.option("--yes", is_flag=True, help="Do not ask.")
_no_wait = click.option("--no-wait", is_flag=True, help="Do not wait until the guest is ready again.")
_json = click.option("--json", "as_json", is_flag=True, help="For programs.")


@power.command()
@_guest
@_yes
@_no_wait
@_json
def reset(guest: str, yes: bool, no_wait: bool, as_json: bool) -> None:
    """Let a guest boot from the beginning, at once, whatever it is doing.

    What runs in it is lost. With the guest of rank 0, in which the job's script runs, the job ends; it goes on without
    any other. Of a job with several guests the rank must be said.

    Example: vmgr power reset 12:1 --yes
    """
    _do(guest, "reset", yes=yes, as_json=as_json, wait=not no_wait)


@power.command()
@_guest
@_yes
@click.option("--now", is_flag=True, help="Cut the power, without a shutdown.")
@_json
def off(guest: str, yes: bool, now: bool, as_json: bool) -> None:
    """Shut a guest down and leave it off.

    It stays off until `vmgr power on` or the end of the job. The site's VM epilogue runs first. A guest that does not
    obey in time loses its power. What runs in it is lost; with the guest of rank 0, in which the job's script runs, the
    job ends, and it goes on without any other.

    Example: vmgr power off 12:1 --yes
    """
    _do(guest, "off", yes=yes, as_json=as_json, now=now)


@power.command()
@_guest
@_no_wait
@_json
def on(guest: str, no_wait: bool, as_json: bool) -> None:
    """Boot a guest that was switched off; its disk is as it was left.

    Example: vmgr power on 12:1
    """
    _do(guest, "on", yes=True, as_json=as_json, wait=not no_wait)


def _do(guest: str, action: str, *, yes: bool, as_json: bool, **members: Any) -> None:
    asyncio.run(_order(parse_target(guest), action, yes, as_json, members))


async def _order(target: Target, action: str, yes: bool, as_json: bool, members: dict[str, Any]) -> None:
    from vmgr.reach.agents import agent_of

    async with agent_of(load_config(installation()), target) as reached:
        rank = _the_one(target, reached)
        ends = rank == 0 and action != "on" and reached.snapshot.get("state") in ("ready", "running")
        if not yes:
            _confirm(target, action, ends)
        if ends and members.get("wait"):
            members["wait"] = False  # the job's end takes the guest away
        last: dict[str, Any] = {}
        try:
            async for answer in reached.link.order("power", action=action, rank=rank, **members):
                last = answer
                if not as_json:
                    click.echo(printable(_said(answer, members)))
        except VTorqueError as err:
            if not ends or err.code is not Code.AGENT:  # the job's end may take the agent away before it answers
                raise
        if as_json:
            import json

            click.echo(json.dumps({**last, "rank": rank, "job_ends": ends}))
        elif ends:
            click.echo(f"job {printable(reached.job_id)} ends, for its script ran in this guest")


def _the_one(target: Target, reached: Reached) -> int:
    """The rank of the guest that is meant. Raises VTorqueError (VT-VALUE) where it must be said."""
    from vmgr.reach.agents import members

    nodes = reached.snapshot.get("nodes")
    count = len(members(reached.snapshot)) * (len(nodes) if isinstance(nodes, list) else 1)
    if target.rank is None and count > 1:
        raise VTorqueError(
            f"job {target.job} has {count} guests",
            code=Code.VALUE,
            hint=f"say which: {target.job}:0 to {target.job}:{count - 1}",
        )
    return int((reached.member or {})["rank"])


def _confirm(target: Target, action: str, ends: bool) -> None:
    """Ask on a terminal. Raises VTorqueError (VT-USAGE) where there is none, click.exceptions.Exit for a no."""
    what = "the job ends with it" if ends else "what runs in it is lost"
    if not sys.stdin.isatty():
        raise VTorqueError(f"power {action} of {target}: {what}", code=Code.USAGE, hint="say --yes")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio's only cancels what waits for events
    try:
        if not click.confirm(f"power {action} of {target}: {what}. Go on?"):
            click.echo("nothing was done", err=True)
            raise click.exceptions.Exit(1)
    finally:
        signal.signal(signal.SIGINT, before)


def _said(answer: dict[str, Any], members: dict[str, Any]) -> str:
    name, state = answer.get("guest"), answer.get("power")
    if state == "off":
        cut = not answer.get("clean") and not members.get("now")
        return f"{name} is off" + (", its power was cut because it did not shut down in time" if cut else "")
    return f"{name} is {'ready' if state == 'on' else 'booting'}"
