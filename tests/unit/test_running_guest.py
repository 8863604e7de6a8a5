"""A running guest over several boots, over a real event port; without a QEMU."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Optional

import pytest

from vmgr.errors import VTorqueError
from vmgr.node.guest import RunningGuest
from vmgr.node.guestport import GuestPort
from vmgr.node.incoming import SavedState

HOSTS = (("10.0.0.2", "vn1-1"), ("10.0.0.3", "vn1-2"))


class Qemu:
    """Stands for the process: it ends when it is killed."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def ended(self) -> None:
        await self.gone.wait()

    async def kill(self) -> None:
        self.gone.set()

    async def close(self) -> None:
        pass

    def describe_end(self) -> str:
        return "killed"


class Quiet:
    """A console and file servers of which nothing is heard."""

    async def drain(self) -> None:
        await asyncio.Event().wait()

    async def ended(self) -> str:
        await asyncio.Event().wait()
        return ""

    async def kill(self) -> None:
        pass

    def last_lines(self, _: int) -> list[str]:
        return []


class Inside:
    """The guest's end of the port."""

    def __init__(self, port: socket.socket) -> None:
        self._port = port

    def say(self, event: str, **members: object) -> None:
        self._port.send(json.dumps({"v": 1, "event": event, **members}).encode() + b"\n")

    async def told(self) -> dict[str, Any]:
        answer = await asyncio.get_running_loop().sock_recv(self._port, 4096)
        found: dict[str, Any] = json.loads(answer.splitlines()[0])
        return found


def with_guest(
    work: Callable[[RunningGuest, Inside], Coroutine[Any, Any, None]],
    state: Optional[SavedState] = None,
    said: Callable[..., None] = lambda *_: None,
) -> None:
    async def whole() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        port = await GuestPort.open(ours)
        guest = RunningGuest("vn1-1", Qemu(), port, Quiet(), said, Quiet(), state)  # type: ignore[arg-type]
        try:
            await work(guest, Inside(theirs))
        finally:
            await guest.kill()
            theirs.close()

    asyncio.run(asyncio.wait_for(whole(), 20))


def test_a_guest_that_boots_again_is_told_the_hosts_again() -> None:
    async def work(guest: RunningGuest, inside: Inside) -> None:
        for event in ("booted", "prologue"):
            inside.say(event)
        inside.say("up", address="10.0.0.2")
        getting_ready = asyncio.ensure_future(guest.ready(10))
        assert await guest.address() == guest.said_address == "10.0.0.2"
        guest.send_hosts(HOSTS)
        assert (await inside.told())["op"] == "hosts"
        inside.say("ready")
        await getting_ready
        assert guest.is_ready

        guest.begin_anew()
        assert not guest.is_ready
        booting = asyncio.ensure_future(guest.booted(10))
        getting_ready = asyncio.ensure_future(guest.ready(10))
        inside.say("booted")
        await booting
        inside.say("up", address="10.0.0.2")
        told = await inside.told()
        lines = base64.b64decode(told["hosts"]).decode().splitlines()
        assert told["op"] == "hosts" and lines == [" ".join(host) for host in HOSTS]
        inside.say("ready")
        await getting_ready
        assert guest.is_ready

    with_guest(work)


def test_one_thing_at_a_time_is_done_to_its_power_and_to_the_end() -> None:
    async def work(guest: RunningGuest, _: Inside) -> None:
        begun, go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def slowly() -> None:
            begun.set()
            await go.wait()
            done.set()

        first = asyncio.ensure_future(guest.switch(slowly()))
        await begun.wait()
        with pytest.raises(VTorqueError, match="VT-GUEST: the power of vn1-1 is being switched already"):
            await guest.switch(slowly())
        first.cancel()  # who gave the order has gone
        await asyncio.gather(first, return_exceptions=True)
        guest.power = "ending"
        ending = asyncio.ensure_future(guest.shut_down(Timeouts))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        assert not ending.done(), "the job's end gives a guest that is being switched off its time"
        go.set()
        await ending
        assert done.is_set()

    with_guest(work)


def test_what_goes_on_when_the_guest_is_killed() -> None:
    async def work(guest: RunningGuest, _: Inside) -> None:
        switching = asyncio.ensure_future(guest.switch(asyncio.sleep(100)))
        booting = asyncio.ensure_future(guest.booted(100))
        await asyncio.sleep(0)
        await guest.kill()
        await booting
        with pytest.raises(asyncio.CancelledError):
            await switching

    with_guest(work)


STATE = SavedState(-1, "7.2.22", 1.0, lambda: asyncio.sleep(0))


def test_a_guest_that_goes_on_is_ready_when_it_has_its_shares_back() -> None:
    stages: list[str] = []

    async def work(guest: RunningGuest, inside: Inside) -> None:
        getting_ready = asyncio.ensure_future(guest.ready(10))
        assert (await inside.told())["op"] == "mount"
        inside.say("mount", status=0)
        assert (await inside.told())["op"] == "identify"
        assert not guest.is_ready
        inside.say("identify", family="micro")
        await getting_ready
        assert guest.is_ready and stages == ["resumed"]

        guest.begin_anew()  # it was reset: it boots like any other
        inside.say("booted")
        getting_ready = asyncio.ensure_future(guest.ready(10))
        await asyncio.sleep(0.05)
        assert not getting_ready.done()
        inside.say("ready")
        await getting_ready
        assert stages == ["resumed", "booted", "ready"]

    with_guest(work, STATE, lambda _name, what, *_: stages.append(what))


def test_a_guest_that_goes_on_and_does_not_get_its_shares_back() -> None:
    async def says_why(guest: RunningGuest, inside: Inside) -> None:
        getting_ready = asyncio.ensure_future(guest.ready(10))
        assert (await inside.told())["op"] == "mount"
        inside.say("mount", status=1, output=base64.b64encode(b"no such share").decode())
        with pytest.raises(VTorqueError, match=r"VT-BOOT: .*vn1-1 goes on, but cannot have its shares back: no such"):
            await getting_ready
        assert not guest.is_ready

    async def is_silent(guest: RunningGuest, _: Inside) -> None:
        with pytest.raises(VTorqueError, match=r"VT-BOOT: .*vn1-1 goes on, but did not mount within 0.1 s"):
            await guest.ready(0.1)

    async def ends(guest: RunningGuest, inside: Inside) -> None:
        getting_ready = asyncio.ensure_future(guest.ready(10))
        await inside.told()
        await guest.kill()
        with pytest.raises(VTorqueError, match=r"VT-GUEST: .*vn1-1 has ended"):
            await getting_ready

    for work in (says_why, is_silent, ends):
        with_guest(work, STATE)


class Timeouts:
    vm_epilogue, shutdown = 1, 1
