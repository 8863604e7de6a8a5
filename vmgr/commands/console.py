"""`vmgr console`: a guest's console, read along or attached to."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Optional

import click

from vmgr.config import load_config
from vmgr.errors import Code, VTorqueError
from vmgr.paths import installation
from vmgr.reach.target import parse_target

if TYPE_CHECKING:
    from vmgr.node.client import AgentLink

ESCAPE = 0x1D
"""Ctrl-]"""
INPUT_BYTES = 2048
LAST_BYTES = 4096


@click.command()
@click.option("--attach", is_flag=True, help="Keys go to the guest; Ctrl-] leaves it.")
@click.option("--raw", is_flag=True, help="Everything as it comes, control sequences too.")
@click.option("--no-follow", is_flag=True, help="What is there, then end.")
@click.option(
    "--last",
    type=click.IntRange(0, 65536),
    default=LAST_BYTES,
    show_default=True,
    help="Begin so many bytes before now.",
)
@click.argument("guest", metavar="JOB[:RANK]")
def console(guest: str, attach: bool, raw: bool, no_follow: bool, last: int) -> None:
    """Follow the console of a guest until the guest ends, or Ctrl-C.

    What a guest prints is shown as plain text, since control sequences of a stranger's can do anything to a terminal;
    with --raw, and when attached, it comes as it is. Any number may follow and attach at once.

    Example: vmgr console 12:1 --attach
    """
    if attach and no_follow:
        raise VTorqueError("--attach and --no-follow contradict each other", code=Code.USAGE, hint="leave one out")
    talk = _attached(guest, last) if attach else _followed(guest, raw=raw, last=last, follow=not no_follow)
    with _ended_by_signals():
        try:
            asyncio.run(talk)
        except KeyboardInterrupt:
            pass  # how one leaves it
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads on; nor is there a complaint at the end


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """TERM and HUP end the program as an exception does, so that the terminal is put in order."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {sig: signal.signal(sig, end) for sig in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


async def _followed(guest: str, *, raw: bool, last: int, follow: bool) -> None:
    from vmgr.reach.agents import agent_of

    config, target = load_config(installation()), parse_target(guest)
    async with agent_of(config, target) as reached:
        show = _shower(raw)
        rank = (reached.member or {})["rank"]
        async for answer in reached.link.order("console", rank=rank, last=last):
            show(answer)
            if not follow:
                return


async def _attached(guest: str, last: int) -> None:
    from vmgr.reach.agents import agent_of

    config, target = load_config(installation()), parse_target(guest)
    async with agent_of(config, target) as reached:
        member = reached.member or {}
        if sys.stdin.isatty():
            print(f"attached to {member['name']}; Ctrl-] leaves", file=sys.stderr)
        with _raw_terminal():
            typing = asyncio.ensure_future(_type(reached.link))
            showing = asyncio.ensure_future(_show(reached.link, member["rank"], last))
            try:
                await asyncio.wait([typing, showing], return_when=asyncio.FIRST_COMPLETED)
                if showing.done():
                    showing.result()
            finally:
                for task in (typing, showing):
                    task.cancel()
                await asyncio.gather(typing, showing, return_exceptions=True)


async def _show(link: AgentLink, rank: int, last: int) -> None:
    show = _shower(raw=True)
    async for answer in link.order("console", rank=rank, last=last, attach=True):
        show(answer)


async def _type(link: AgentLink) -> None:
    """Send what is typed until Ctrl-]; at the end of an input that is no terminal the console is read on."""
    loop = asyncio.get_running_loop()
    fd = sys.stdin.fileno()
    while True:
        data = await _read(loop, fd)
        keys, escape, _ = data.partition(bytes([ESCAPE])) if os.isatty(fd) else (data, b"", b"")
        if keys:
            link.send("input", data=base64.b64encode(keys).decode())
            await link.drain()
        if escape:
            return
        if not data:
            await asyncio.Event().wait()


async def _read(loop: asyncio.AbstractEventLoop, fd: int) -> bytes:
    """What is there to be read from a terminal, a pipe or a file."""
    ready: asyncio.Future[None] = loop.create_future()
    try:
        loop.add_reader(fd, _settle, ready)
    except PermissionError:  # a file is always ready, and nothing that can be waited for
        return os.read(fd, INPUT_BYTES)
    try:
        await ready
    finally:
        loop.remove_reader(fd)
    return os.read(fd, INPUT_BYTES)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Standard input's terminal without any handling of keys, as it was found at the end; nothing where it is none."""
    fd = sys.stdin.fileno()
    found: Optional[list[Any]] = termios.tcgetattr(fd) if os.isatty(fd) else None
    if found is None:
        yield
        return
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, found)
        print(file=sys.stderr)


def _shower(raw: bool) -> Callable[[dict[str, Any]], None]:
    """What prints answers: as they are, or as plain text."""
    from vmgr.reach.plain import Plain

    plain = Plain()

    def show(answer: dict[str, Any]) -> None:
        data = base64.b64decode(str(answer.get("data", "")))
        lost = answer.get("lost")
        if isinstance(lost, int) and lost > 0:
            print(f"vmgr: {lost} bytes of the console were skipped", file=sys.stderr)
        view = memoryview(data if raw else plain.text(data).encode("utf-8", "replace"))
        while view:
            view = view[os.write(1, view) :]

    return show
