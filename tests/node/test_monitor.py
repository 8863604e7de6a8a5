"""A guest's QMP over its life: with a real QEMU, and with a fake that floods it."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from settled import run

from vmgr.errors import Code, VTorqueError
from vmgr.node.monitor import Monitor

GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}


@contextmanager
def machine_without_anything() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    child = subprocess.Popen(
        [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-machine", "none", "-display", "none",
            "-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control",
        ],
        pass_fds=[theirs.fileno()],
    )  # fmt: skip
    theirs.close()
    try:
        yield ours
    finally:
        child.kill()
        child.wait()


def test_a_real_qemu_answers_again_and_again() -> None:
    async def work(connection: socket.socket) -> None:
        monitor = Monitor()
        await monitor.connect(connection)
        for _ in range(2):
            assert (await monitor.execute("query-status"))["running"] in (True, False)
            await asyncio.sleep(0.05)
        with pytest.raises(VTorqueError, match=r"QEMU refuses dance: .*dance") as caught:
            await monitor.execute("dance", {"twice": True})
        assert caught.value.code is Code.GUEST
        both = await asyncio.gather(monitor.execute("query-version"), monitor.execute("query-name"))
        assert "qemu" in both[0] and both[1] == {}
        assert await monitor.until("RESET", lambda client: client.execute("system_reset"), timeout_s=10)
        assert not await monitor.until("SHUTDOWN", lambda client: client.execute("query-name"), timeout_s=0.2)
        with pytest.raises(VTorqueError, match=r"QEMU refuses: .*dance"):
            await monitor.until("RESET", lambda client: client.execute("dance"), timeout_s=10)
        with pytest.raises(VTorqueError):
            await monitor.execute("quit")
            await monitor.execute("query-status")
        await monitor.close()

    with machine_without_anything() as connection:
        run(work(connection))


class Flooding(threading.Thread):
    """A fake QEMU that sends events as fast as they are taken, and answers whatever it is asked between them."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(daemon=True)
        self._connection = connection
        self.sent = 0

    def run(self) -> None:
        event = json.dumps({"event": "RTC_CHANGE", "timestamp": {"seconds": 1, "microseconds": 1}}).encode() + b"\n"
        self._connection.sendall(json.dumps(GREETING).encode() + b"\n")
        try:
            while True:
                self._connection.settimeout(0 if self.sent else 10)
                try:
                    request = json.loads(self._connection.recv(65536))
                except BlockingIOError:
                    request = None
                self._connection.settimeout(10)
                if request is not None:
                    self._connection.sendall(json.dumps({"return": {}, "id": request.get("id")}).encode() + b"\n")
                self._connection.sendall(event)
                self.sent += 1
        except (OSError, ValueError):
            pass  # the other end has gone


def test_a_qemu_that_floods_is_not_read_while_nobody_asks() -> None:
    ours, theirs = socket.socketpair()
    flooding = Flooding(theirs)

    async def work() -> None:
        monitor = Monitor()
        flooding.start()
        await monitor.connect(ours)
        await monitor.execute("query-status")
        await asyncio.sleep(0.5)
        before = flooding.sent
        await asyncio.sleep(0.3)
        assert flooding.sent == before, "what it sends stays in its own buffer"
        assert await monitor.execute("query-status") == {}
        assert flooding.sent > before
        ours_closed = asyncio.ensure_future(monitor.close())
        theirs.shutdown(socket.SHUT_RDWR)
        await ours_closed

    run(work())
    flooding.join(5)
    assert not flooding.is_alive()
    theirs.close()


def greet(theirs: socket.socket) -> None:
    """Begin as QEMU does."""
    theirs.sendall(json.dumps(GREETING).encode() + b"\n")
    request = json.loads(theirs.recv(65536))
    theirs.sendall(json.dumps({"return": {}, "id": request.get("id")}).encode() + b"\n")


def test_somebody_keeps_the_connection_of_a_qemu_that_has_ended() -> None:
    """QEMU's user may take its sockets: nothing is read there any more, and the agent goes on all the same."""
    ours, theirs = socket.socketpair()

    async def work() -> float:
        monitor = Monitor()
        greeting = asyncio.ensure_future(asyncio.to_thread(greet, theirs))
        await monitor.connect(ours)
        await greeting
        with pytest.raises(VTorqueError, match="did not answer"):
            await monitor.execute("x" * (1 << 20), timeout_s=0.2)
        start = asyncio.get_running_loop().time()
        await monitor.close()
        return asyncio.get_running_loop().time() - start

    assert run(work()) < 1
    theirs.close()


@pytest.mark.parametrize(
    "noise",
    [b"[" * 200_000 + b"\n", b"x" * (3 << 20), b"\xff\n", b"1\n", b'{"x": "' + b"y" * (1 << 19) + b'"}\n'],
    ids=["deep", "long", "bytes", "number", "large"],
)
def test_noise_ends_the_connection_and_nothing_else(noise: bytes) -> None:
    ours, theirs = socket.socketpair()

    def speak() -> None:
        greet(theirs)
        theirs.recv(65536)
        try:
            theirs.sendall(noise)
        except OSError:
            pass  # not all of it was wanted

    async def work() -> None:
        monitor = Monitor()
        speaking = asyncio.ensure_future(asyncio.to_thread(speak))
        await monitor.connect(ours)
        for _ in range(2):
            with pytest.raises(VTorqueError) as caught:
                await monitor.execute("query-status", timeout_s=2)
            assert len(str(caught.value)) < 1000, "it goes to logs and callers"
        await monitor.close()
        await speaking

    run(work())
    theirs.close()
