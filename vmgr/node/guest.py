"""A running guest as its agent sees it: waiting for it to be ready, noticing its death, shutting it down."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from typing import Any, Callable, Optional

from vmgr.config import Timeouts
from vmgr.errors import Code, VTorqueError
from vmgr.node.console import Console
from vmgr.node.guestport import Event, GuestPort
from vmgr.node.launch import Guest, pin_and_run
from vmgr.node.monitor import Monitor
from vmgr.node.shares import Shares
from vmgr.topology.model import Placement

CONSOLE_LINES = 5
SERVER_SECONDS = 0.5


class RunningGuest:
    """One guest between its first instruction and its end.

    `shares` are the file servers of its shares: without one of them it hangs, so they live and end together. `said` is
    called with the guest's name and each stage that it says it has reached, as often as it says so.
    """

    def __init__(
        self,
        name: str,
        guest: Guest,
        port: GuestPort,
        console: Console,
        said: Callable[[str, str], None],
        shares: Shares,
    ) -> None:
        self.name = name
        self._shares = shares
        self._guest = guest
        self._port = port
        self._console = console
        self._said = said
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._asked: dict[str, asyncio.Future[Event]] = {}
        self._ended = asyncio.ensure_future(guest.ended())
        self._unserved = asyncio.ensure_future(shares.ended())
        self._readers = [asyncio.ensure_future(console.drain()), asyncio.ensure_future(self._listen())]
        self._is_ready = False
        self._address: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def _end(self) -> str:
        """Return when the guest has ended, or cannot go on, and say how."""
        await asyncio.wait([self._ended, self._unserved], return_when=asyncio.FIRST_COMPLETED)
        if not self._ended.done():
            await asyncio.wait([self._ended], timeout=SERVER_SECONDS)  # a guest's end is theirs too
        return f"QEMU: {self._guest.describe_end()}" if self._ended.done() else self._unserved.result()

    @property
    def ssh_port(self) -> Optional[int]:
        """The port of 127.0.0.1 that leads to the guest's SSH through QEMU itself; None on a tap."""
        return self._guest.ssh_port

    async def pin_and_run(
        self, qmp: socket.socket, placement: Optional[Placement], *, on_tap: bool = False, timeout_s: float
    ) -> None:
        """Let the guest run, all that serves it on the CPUs of its place. Raises VTorqueError (VT-LAUNCH)."""
        await pin_and_run(self._guest, qmp, placement, on_tap=on_tap, timeout_s=timeout_s)

    @property
    def monitor(self) -> Monitor:
        """The guest's QMP."""
        return self._guest.monitor

    async def address(self) -> str:
        """The address that the guest says it has, as soon as it says so while `ready` is waited for.

        Only a guest that is to be told the addresses of all, by `send_hosts`, says this.
        """
        return await asyncio.shield(self._address)

    def send_hosts(self, hosts: Iterable[tuple[str, str]]) -> None:
        """Tell the guest address and name of every guest of the job."""
        self._port.send_hosts(hosts)

    async def _listen(self) -> None:
        async for event in self._port.events():
            asked = self._asked.pop(event.name, None)
            if asked is None:
                self._events.put_nowait(event)
            elif not asked.done():
                asked.set_result(event)

    async def ready(self, timeout_s: float) -> None:
        """Wait until the guest says that it is ready.

        Raises VTorqueError: VT-HOOK when the site's VM prologue failed, VT-GUEST when the guest ended, VT-BOOT when
        it says that it cannot, or says nothing in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not self._is_ready:
            event = await self._next(deadline)
            if event is None:
                raise self._boot_error(f"the guest {self.name} was not ready within {timeout_s:g} s")
            if event.name == "failed":
                raise self._boot_error(f"the guest {self.name} cannot run the job: {event.text}")
            if event.name == "prologue" and event.status:
                raise self._hook_error("prologue", event)
            if event.name == "up" and event.address is not None and not self._address.done():
                self._address.set_result(event.address)
            if event.name in ("booted", "prologue"):
                self._said(self.name, event.name)
            self._is_ready = event.name == "ready"

    @property
    def is_ready(self) -> bool:
        """Whether the guest has said that it is ready for the job; it obeys orders since."""
        return self._is_ready

    async def ask(self, op: str, timeout_s: float) -> Optional[Event]:
        """Order `op` of the guest and give its answer, the event of the same name; None when none comes in time.

        One at a time for each `op`. What a guest sends is the user's word. Raises VTorqueError (VT-GUEST) when the
        guest ends meanwhile.
        """
        answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._asked[op] = answer
        try:
            self._port.send(op)
            ends: list[asyncio.Future[Any]] = [answer, self._ended]
            await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if self._ended.done():
                raise VTorqueError(f"the guest {self.name} has ended", code=Code.GUEST)
            return None
        finally:
            self._asked.pop(op, None)

    def tell(self, op: str) -> None:
        """Order `op` of the guest, and do not wait for its answer."""
        self._port.send(op)

    async def died(self) -> None:
        """Wait until the guest ends by itself, which is always a failure. Raises VTorqueError (VT-GUEST)."""
        how = await self._end()
        raise VTorqueError(
            f"the guest {self.name} ended while the job was running ({how})",
            code=Code.GUEST,
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
                self._said(self.name, "epilogue")
                await asyncio.wait([self._ended], timeout=timeouts.shutdown)
            await self.kill()
            if event is not None and event.status:
                raise self._hook_error("epilogue", event)
        await self.kill()

    async def kill(self) -> None:
        """End the guest at once, if it is still there, and give everything back that it held."""
        if not self._readers:
            return
        await self._guest.kill()
        self._address.cancel()
        readers, self._readers = [*self._readers, self._unserved], []
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, self._ended, self._shares.kill(), return_exceptions=True)
        await self._guest.close()
        self._port.close()

    async def _next(self, deadline: float, *, dies: bool = True) -> Optional[Event]:
        """The next event; None at the deadline, or at the guest's end where that is no failure (`dies` is false)."""
        loop = asyncio.get_running_loop()
        waiting = asyncio.ensure_future(self._events.get())
        ends = [self._ended, self._unserved]
        await asyncio.wait(
            [waiting, *ends], timeout=max(0.0, deadline - loop.time()), return_when=asyncio.FIRST_COMPLETED
        )
        if waiting.done():
            return waiting.result()
        waiting.cancel()
        if dies and any(end.done() for end in ends):
            raise self._boot_error(f"the guest {self.name} ended before it was ready ({await self._end()})", Code.GUEST)
        return None

    def _hook_error(self, kind: str, event: Event) -> VTorqueError:
        error = VTorqueError(f"the site's VM {kind} ended with status {event.status} in {self.name}", code=Code.HOOK)
        error.output = event.text
        return error

    def _boot_error(self, text: str, code: Code = Code.BOOT) -> VTorqueError:
        lines = self._console.last_lines(CONSOLE_LINES)
        return VTorqueError(text, code=code, hint="last on its console: " + " | ".join(lines) if lines else None)
