"""A running guest as its agent sees it: waiting for it to be ready, noticing its death, shutting it down."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Optional

from vmgr.config import Timeouts
from vmgr.errors import Code, VTorqueError
from vmgr.node.console import Console
from vmgr.node.guestport import Event, GuestPort
from vmgr.node.launch import Guest
from vmgr.node.state import Progress

CONSOLE_LINES = 5


class RunningGuest:
    """One guest between its first instruction and its end. `hook_output` is what a failed VM hook printed."""

    def __init__(self, guest: Guest, port: GuestPort, console: Console, progress: Progress) -> None:
        self._guest = guest
        self._port = port
        self._console = console
        self._progress = progress
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._ended = asyncio.ensure_future(guest.ended())
        self._readers = [asyncio.ensure_future(console.drain()), asyncio.ensure_future(self._listen())]
        self._is_ready = False
        self.hook_output = ""

    @property
    def ssh_port(self) -> int:
        return self._guest.ssh_port

    async def _listen(self) -> None:
        async for event in self._port.events():
            self._events.put_nowait(event)

    async def ready(self, timeout_s: float) -> None:
        """Wait until the guest says that it is ready.

        Raises VTorqueError: VT-HOOK when the site's VM prologue failed, VT-GUEST when the guest ended, VT-BOOT when
        it says that it cannot, or says nothing in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        told: set[str] = set()
        while not self._is_ready:
            event = await self._next(deadline)
            if event is None:
                raise self._boot_error(f"the guest was not ready within {timeout_s:g} s")
            if event.name == "failed":
                raise self._boot_error(f"the guest cannot run the job: {event.text}")
            if event.name == "prologue" and event.status:
                self.hook_output = event.text
                raise VTorqueError(f"the site's VM prologue ended with status {event.status}", code=Code.HOOK)
            if event.name in ("booted", "prologue") and event.name not in told:
                told.add(event.name)
                self._progress.stage(event.name)
            self._is_ready = event.name == "ready"

    async def died(self) -> None:
        """Wait until the guest ends by itself, which is always a failure. Raises VTorqueError (VT-GUEST)."""
        await asyncio.shield(self._ended)
        raise VTorqueError(
            f"the guest ended while the job was running (QEMU: {self._guest.describe_end()})", code=Code.GUEST
        )

    async def shut_down(self, timeouts: Timeouts) -> None:
        """Run the VM epilogue and power the guest off; one that is not ready or does not obey is killed.

        Raises VTorqueError (VT-HOOK) when the site's VM epilogue failed; the guest is gone then too.
        """
        if self._is_ready and not self._ended.done():
            self._port.send("shutdown")
            loop = asyncio.get_running_loop()
            deadline = loop.time() + timeouts.vm_epilogue
            event = await self._next(deadline, dies=False)
            while event is not None and event.name != "epilogue":
                event = await self._next(deadline, dies=False)
            if event is not None:
                self._progress.stage("epilogue")
                await asyncio.wait([self._ended], timeout=timeouts.shutdown)
            await self.kill()
            if event is not None and event.status:
                self.hook_output = event.text
                raise VTorqueError(f"the site's VM epilogue ended with status {event.status}", code=Code.HOOK)
        await self.kill()

    async def kill(self) -> None:
        """End the guest at once, if it is still there, and give everything back that it held."""
        if not self._readers:
            return
        await self._guest.kill()
        readers, self._readers = self._readers, []
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, self._ended, return_exceptions=True)
        await self._guest.close()
        self._port.close()

    async def _next(self, deadline: float, *, dies: bool = True) -> Optional[Event]:
        """The next event; None at the deadline, or at the guest's end where that is no failure (`dies` is false)."""
        loop = asyncio.get_running_loop()
        waiting = asyncio.ensure_future(self._events.get())
        await asyncio.wait(
            [waiting, self._ended], timeout=max(0.0, deadline - loop.time()), return_when=asyncio.FIRST_COMPLETED
        )
        if waiting.done():
            return waiting.result()
        waiting.cancel()
        if self._ended.done() and dies:
            raise self._boot_error(
                f"the guest ended before it was ready (QEMU: {self._guest.describe_end()})", Code.GUEST
            )
        return None

    def _boot_error(self, text: str, code: Code = Code.BOOT) -> VTorqueError:
        lines = self._console.last_lines(CONSOLE_LINES)
        return VTorqueError(text, code=code, hint="last on its console: " + " | ".join(lines) if lines else None)


async def first(*waiting: Awaitable[Any]) -> None:
    """Wait for the first of several things, give the others up, and raise what that first one raised."""
    tasks = [asyncio.ensure_future(thing) for thing in waiting]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
