"""A running guest as its agent sees it: waiting for it to be ready, noticing its death, shutting it down."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Optional, Protocol, TypeVar

from vmgr.config import Timeouts
from vmgr.errors import Code, VTorqueError
from vmgr.logs import LOGGER
from vmgr.node.console import Console
from vmgr.node.guestport import EVENTS_OF_A_BOOT, Event, GuestPort, Stretch
from vmgr.node.launch import Guest, pin_and_run
from vmgr.node.monitor import Monitor
from vmgr.node.process import cpu_seconds
from vmgr.node.shares import Shares
from vmgr.topology.model import Placement

if TYPE_CHECKING:
    from vmgr.node.incoming import SavedState

_T = TypeVar("_T")
CONSOLE_LINES = 5
SERVER_SECONDS = 0.5
LAST_WORDS_SECONDS = 0.1
"""For what a guest that has ended wrote to its console: that ends at once, unless somebody keeps QEMU's end open."""


class Said(Protocol):
    """Hears what a guest says it has reached, by its name, and what took it how long until then."""

    def __call__(self, guest: str, name: str, stretches: Sequence[Stretch] = ..., /) -> None: ...


def _look_at(task: asyncio.Future[Any]) -> None:
    """Take note of a failure that nobody may wait for any more."""
    if not task.cancelled() and task.exception() is not None:
        LOGGER.warning("%s", task.exception())


class RunningGuest:
    """One guest between its first instruction and its end.

    `shares` are the file servers of its shares: without one of them it hangs, so they live and end together. `said` is
    called with the guest's name and each stage that it says it has reached, as often as it says so. A guest that goes
    on from a saved `state` boots only when it is switched on, or reset, later.
    """

    def __init__(
        self,
        name: str,
        guest: Guest,
        port: GuestPort,
        console: Console,
        said: Said,
        shares: Shares,
        state: Optional[SavedState] = None,
    ) -> None:
        self.name = name
        self._state = state
        self._goes_on = state is not None
        self.power = "on"
        self._shares = shares
        self._guest = guest
        self._port = port
        self.console = console
        self._said = said
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._asked: dict[str, asyncio.Future[Event]] = {}
        self._ended = asyncio.ensure_future(guest.ended())
        self._unserved = asyncio.ensure_future(shares.ended())
        self._readers = [asyncio.ensure_future(console.drain()), asyncio.ensure_future(self._listen())]
        self._is_ready = False
        self._booted = asyncio.Event()
        self._hosts: tuple[tuple[str, str], ...] = ()
        self._switching: Optional[asyncio.Future[Any]] = None
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
        await pin_and_run(self._guest, qmp, placement, on_tap=on_tap, timeout_s=timeout_s, state=self._state)

    @property
    def monitor(self) -> Monitor:
        """The guest's QMP."""
        return self._guest.monitor

    async def address(self) -> str:
        """The address that the guest says it has, as soon as it says so while `ready` is waited for.

        Only a guest that is to be told the addresses of all, by `send_hosts`, says this.
        """
        return await asyncio.shield(self._address)

    @property
    def said_address(self) -> Optional[str]:
        """The same, None while it has not said so."""
        known = self._address.done() and not self._address.cancelled()
        return self._address.result() if known else None

    @property
    def cpu_s(self) -> Optional[float]:
        """Seconds of CPU time that its QEMU has used; None when it is gone."""
        return cpu_seconds(self._guest.child.pid)

    @property
    def pid(self) -> int:
        """The process of its QEMU."""
        return self._guest.child.pid

    def send_hosts(self, hosts: Iterable[tuple[str, str]]) -> None:
        """Tell the guest address and name of every guest of the job."""
        self._hosts = tuple(hosts)
        self._port.send_hosts(self._hosts)

    async def _listen(self) -> None:
        async for event in self._port.events():
            if event.name == "booted":
                self._booted.set()
            asked = self._asked.pop(event.name, None)
            if asked is not None:
                if not asked.done():
                    asked.set_result(event)
            elif event.name == "times":  # comes after `ready`, when nobody waits for an event
                self._said(self.name, event.name, event.stretches)
            else:
                self._events.put_nowait(event)

    async def ready(self, timeout_s: float) -> None:
        """Wait until the guest says that it is ready.

        Raises VTorqueError: VT-HOOK when the site's VM prologue failed, VT-GUEST when the guest ended, VT-BOOT when
        it says that it cannot, or says nothing in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        if self._goes_on:
            await self._take_up(timeout_s)
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
            elif event.name == "up" and self._hosts:  # it has been switched on again, and waits for them
                self._port.send_hosts(self._hosts)
            if event.name in ("booted", "prologue", "ready"):
                self._said(self.name, event.name, event.stretches)
            self._is_ready = event.name == "ready"

    async def _take_up(self, timeout_s: float) -> None:
        """Have a guest that goes on mount its shares again; it is ready then, and says so by answering.

        Raises VTorqueError: VT-GUEST when the guest ended, VT-BOOT when it cannot, or does not answer in time.
        """
        for op in ("mount", "identify"):
            answer = await self.ask(op, timeout_s)
            if answer is None:
                raise self._boot_error(f"the guest {self.name} goes on, but did not {op} within {timeout_s:g} s")
            if answer.status:
                why = answer.text or "it does not say why"
                raise self._boot_error(f"the guest {self.name} goes on, but cannot have its shares back: {why}")
        self._said(self.name, "resumed")
        self._is_ready = True

    @property
    def is_ready(self) -> bool:
        """Whether the guest has said that it is ready for the job; it obeys orders since."""
        return self._is_ready

    def begin_anew(self) -> None:
        """Forget what the guest has said: it is off, or boots once more."""
        self._port.expect(EVENTS_OF_A_BOOT)
        self._is_ready = self._goes_on = False
        self._booted.clear()
        while not self._events.empty():
            self._events.get_nowait()

    async def booted(self, timeout_s: float) -> None:
        """Wait until the guest's own program runs, the guest ends, or the time is over."""
        booting = asyncio.ensure_future(self._booted.wait())
        await asyncio.wait([booting, self._ended], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        booting.cancel()

    async def switch(self, doing: Coroutine[Any, Any, _T]) -> _T:
        """Do something to the guest's power, to its end even when this is cancelled; one thing at a time.

        Raises VTorqueError (VT-GUEST) while another is going on, and what is raised there.
        """
        if self._switching is not None and not self._switching.done():
            doing.close()
            raise VTorqueError(f"the power of {self.name} is being switched already", code=Code.GUEST)
        task = asyncio.ensure_future(doing)
        task.add_done_callback(_look_at)
        self._switching = task
        return await asyncio.shield(task)

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

        A guest that is being switched off gets the time for that. Raises VTorqueError (VT-HOOK) when the site's VM
        epilogue failed; the guest is gone then too.
        """
        if self.power == "ending" and self._switching is not None:
            await asyncio.wait([self._switching])
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
        if self._switching is not None:
            self._switching.cancel()
        draining = self._readers[0]
        await self._guest.kill()
        await asyncio.wait([draining], timeout=LAST_WORDS_SECONDS)
        self._address.cancel()
        readers, self._readers = [*self._readers, self._unserved], []
        for task in readers:
            task.cancel()
        switching = [] if self._switching is None else [self._switching]
        await asyncio.gather(*readers, *switching, self._ended, self._shares.kill(), return_exceptions=True)
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
        lines = self.console.last_lines(CONSOLE_LINES)
        return VTorqueError(text, code=code, hint="last on its console: " + " | ".join(lines) if lines else None)
