"""A session in the guest that may outlive its connection: the script of a job that can be suspended."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import signal
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Callable, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.node.marks import Copier
from vmgr.node.process import dies_with
from vmgr.node.session import RUNNER, SSH_SECONDS, GuestSession, deaf, end_ssh

TOKEN_BYTES = 32
ENDED = "its script has just ended"
LEAVE_SECONDS = 10.0
"""How long the other side may take to let go of a session that has been stopped."""
ATTACH_SECONDS = 120.0
"""How long a connection to the session of a resumed job may take."""

Allowed = Callable[[], Awaitable[None]]


class KeptSession(GuestSession):
    """As `GuestSession`, for a script of which `detach` can let go, and `attach` take hold again.

    Its output goes through this process to the standard output and error of the job; `complain` is told why some of it
    could not be written. `detached`: the script has been let go of. Signals that come then reach it afterwards, and are
    `waiting` meanwhile.
    """

    def __init__(
        self, directory: Path, tag: str, guest: str, port: int, host_key: str, complain: Callable[[OSError], None]
    ) -> None:
        super().__init__(directory, tag, guest, port, host_key)
        self._complain = complain
        self._copiers: Optional[tuple[Copier, Copier]] = None
        self._gone: Optional[asyncio.Future[bool]] = None
        self._left: Optional[asyncio.Future[Optional[str]]] = None
        self._broken_off = False
        self.detached = False
        self.waiting: list[signal.Signals] = []

    async def run_kept(self, described: str, script: Path, arguments: str = "") -> Optional[int]:
        """As `run`; None when the script has been let go of before it ended."""
        self._describe(described, script, arguments)
        return await self._follow(f"-k {self._words()}")

    async def attach(self, allowed: Optional[Allowed] = None) -> Optional[int]:
        """Take hold again of the script, which goes on; gives what `run_kept` gives.

        With `allowed` it is waited for once the script is within reach, and before it goes on: what that raises is
        raised, and the script stays as it is.
        """
        self._status_file.unlink(missing_ok=True)
        command = f"-a {shlex.quote(os.fspath(self._status_file))}"
        if allowed is None:
            return await self._follow(command, order="ATTACH")
        return await self._follow(command, then=lambda: self._go_on(allowed))

    async def detach(self, timeout_s: float) -> None:
        """Stop the script, take all its output, and let go of it; what runs it in the guest holds no share then.

        Raises VTorqueError (VT-SUSPEND) when that cannot be done; the script goes on.
        """
        if self._copiers is None or self._child is None:
            raise _refusal("its script is not running")
        if any(copier.expects for copier in self._copiers):
            raise _refusal("its output of before the last try has not been taken yet")
        token = secrets.token_hex(TOKEN_BYTES)
        marks = [copier.expect(token) for copier in self._copiers]
        self._order(f"DETACH {token}")
        await asyncio.wait(marks, timeout=timeout_s)
        letters = {mark.result() if mark.done() else "" for mark in marks}
        if None in letters:
            raise _refusal(ENDED)
        if letters != {"y"}:
            self._order("ATTACH")
            if "" in letters:
                raise _refusal(f"its output could not be delivered within {timeout_s:.0f} s")
            raise _refusal("not all processes of its script could be stopped: they are another user's, or do not react")
        await self._leave(token)

    async def _go_on(self, allowed: Allowed) -> None:
        assert self._copiers is not None
        token = secrets.token_hex(TOKEN_BYTES)
        marks = [copier.expect(token) for copier in self._copiers]
        self._order(f"DETACH {token}")  # it has been stopped already: what comes back shows that the way is there
        await asyncio.wait(marks, timeout=ATTACH_SECONDS)
        if not all(mark.done() for mark in marks):
            raise VTorqueError(
                f"the job's session in the guest {self._guest} has not answered within {ATTACH_SECONDS:.0f} s",
                code=Code.CONNECT,
            )
        if None not in {mark.result() for mark in marks}:  # else the connection's end says more
            await allowed()
            self._order("ATTACH")

    async def _leave(self, token: str) -> None:
        assert self._copiers is not None and self._child is not None and self._gone is not None
        child, gone = self._child, self._gone
        self._left = self._copiers[0].expect(token)
        self._order(f"LEAVE {token}")
        await asyncio.wait([gone], timeout=LEAVE_SECONDS)
        if not gone.done():  # all output is here, and after this order a broken connection ends nothing
            self._broken_off = True
            await end_ssh(child, (signal.SIGKILL,))
            await asyncio.wait([gone], timeout=SSH_SECONDS)
        if gone.done() and not gone.result():
            raise _refusal(ENDED)

    def _has_left(self) -> bool:
        return self._broken_off or (self._left is not None and self._left.done() and bool(self._left.result()))

    async def _follow(
        self, command: str, *, order: Optional[str] = None, then: Optional[Allowed] = None
    ) -> Optional[int]:
        """What `command` ends with in the guest: `order` is the first that it gets, `then` is done beside it."""
        self._gone = gone = asyncio.get_running_loop().create_future()
        self._left, self._broken_off, self.detached = None, False, False
        with Copier(1, self._complain) as out, Copier(2, self._complain) as err:
            child = await asyncio.create_subprocess_exec(
                # by exec: a shell in between would stay in the home, which is a share
                *self._command("-T", f"exec {RUNNER} {command}"),
                stdin=asyncio.subprocess.PIPE,
                stdout=out.inlet,
                stderr=err.inlet,
                start_new_session=True,
                preexec_fn=deaf(dies_with(os.getpid())),
            )
            out.start()
            err.start()
            self._child, self._copiers = child, (out, err)
            if order is not None:  # before anybody can give another
                self._order(order)
            signals, self.waiting = self.waiting, []
            for sig in signals:
                self.signal(sig)
            try:
                status = await _status(child, then)
                await out.end()
                await err.end()
                self.detached = self._has_left()
                return None if self.detached else self._ended(status)
            finally:
                self._child = self._copiers = None
                await end_ssh(child, (signal.SIGKILL,))
                await _close_orders(child)
                gone.set_result(self.detached)

    def signal(self, sig: signal.Signals) -> None:
        if self._child is not None:
            super().signal(sig)
        elif sig not in self.waiting:
            self.waiting.append(sig)

    def _order(self, line: str) -> None:
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.write(f"{line}\n".encode())


async def _close_orders(child: asyncio.subprocess.Process) -> None:
    """Close the way to a child that has ended; what it has not read is no fault, of which asyncio would tell."""
    assert child.stdin is not None
    child.stdin.close()
    closing = asyncio.ensure_future(child.stdin.wait_closed())
    await asyncio.wait([closing], timeout=SSH_SECONDS)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)


async def _status(child: asyncio.subprocess.Process, then: Optional[Allowed]) -> int:
    """The child's exit status; raises what `then` raises, unless the child ends before."""
    ending = asyncio.ensure_future(child.wait())
    tasks: list[asyncio.Future[Any]] = [ending, *([] if then is None else [asyncio.ensure_future(then())])]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            tasks[-1].result()
        return await ending
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _refusal(why: str) -> VTorqueError:
    return VTorqueError(why, code=Code.SUSPEND)
