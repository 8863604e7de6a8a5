"""Starting a planned guest: QEMU as the job's user, spoken to over QMP, its vCPU threads pinned before they run."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from qemu.qmp import QMPClient, QMPError

from vmgr.errors import Code, VTorqueError
from vmgr.node import process
from vmgr.node.cpus import Affinity
from vmgr.node.qemu import Descriptors, GuestPlan, command_line, forwarded_port
from vmgr.node.userio import User

MAX_QMP_REPLY_BYTES = 1 << 20


class Files(NamedTuple):
    """What only root may open and QEMU gets as descriptors. Both disk files are None for a guest without a disk.

    `tap` is open already, and stays so: its owner closes it.
    """

    seed: Path
    overlay: Optional[Path]
    backing: Optional[Path]
    tap: Optional[int] = None


class Guest:
    """One running guest: its process, its QMP connection, its console and event port (connected sockets).

    `ssh_port` is the port of 127.0.0.1 that leads to its SSH through QEMU's user networking; None on a tap.
    """

    def __init__(
        self, child: subprocess.Popen[bytes], port: socket.socket, console: socket.socket, errors: int
    ) -> None:
        self.child = child
        self.port = port
        self.console = console
        self.errors = errors
        self.qmp = QMPClient("guest", readbuflen=MAX_QMP_REPLY_BYTES)
        self.qmp.events.event_filter = lambda _: False  # nobody reads them: they would pile up
        self.ssh_port: Optional[int] = None

    async def ended(self) -> None:
        """Return when QEMU has ended and is reaped."""
        loop = asyncio.get_running_loop()
        if self.child.poll() is not None:
            return
        fd = os.pidfd_open(self.child.pid)
        done: asyncio.Future[None] = loop.create_future()
        loop.add_reader(fd, _settle, done)
        try:
            await done
        finally:
            loop.remove_reader(fd)
            os.close(fd)
        self.child.wait()

    def describe_end(self) -> str:
        """How QEMU ended, with the last of what it said on standard error."""
        status = self.child.returncode
        how = f"killed by signal {-status}" if status is not None and status < 0 else f"exit status {status}"
        try:
            said = os.read(self.errors, 4096).decode("utf-8", "replace").strip()
        except OSError:
            said = ""
        return f"{how}{': ' + said.splitlines()[-1][:300] if said else ''}"

    async def kill(self) -> None:
        """End QEMU at once and wait until it is gone."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGKILL)
            await self.ended()

    async def close(self) -> None:
        """Give the connections back; QEMU must have ended."""
        try:
            await self.qmp.disconnect()
        except (QMPError, OSError, EOFError):
            pass  # the connection broke with QEMU's end
        self.console.close()
        os.close(self.errors)


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def start(
    qemu: str, plan: GuestPlan, files: Files, user: User, *, kvm_gid: Optional[int], started: Callable[[int], None]
) -> tuple[Guest, socket.socket]:
    """Start QEMU for `plan`, stopped before its first instruction. Gives the guest and the socket of its QMP.

    QEMU runs with the user's ids, in a session of its own, and dies with the calling process. `started` gets its
    pid. Raises VTorqueError (VT-LAUNCH, VT-STAGE).
    """
    pairs = [socket.socketpair() for _ in range(3)]
    opened: list[int] = []
    child: Optional[subprocess.Popen[bytes]] = None
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        seed = _open(files.seed, os.O_RDONLY, opened)
        overlay = _open(files.overlay, os.O_RDWR, opened) if files.overlay else None
        backing = _open(files.backing, os.O_RDONLY, opened) if files.backing else None
        theirs = [theirs.fileno() for _, theirs in pairs]
        fds = Descriptors(theirs[0], theirs[1], theirs[2], seed, overlay, backing, files.tap)
        child = subprocess.Popen(
            command_line(qemu, plan, fds),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=write_end,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            user=user.uid,
            group=user.gid,
            extra_groups=[*user.gids, *([] if kvm_gid is None else [kvm_gid])],
            umask=0o077,
            start_new_session=True,
            pass_fds=[*theirs, *opened, *([] if files.tap is None else [files.tap])],
            preexec_fn=process.dies_with(os.getpid()),
        )
        started(child.pid)
        _expose_to_oom_killer(child.pid)
    except OSError as err:
        for ours, _ in pairs:
            ours.close()
        os.close(read_end)
        if child is not None:
            child.kill()
            child.wait()
        raise VTorqueError(f"cannot start {qemu}: {err.strerror}", code=Code.LAUNCH, hint="is it installed?") from err
    finally:
        os.close(write_end)
        for _, end in pairs:
            end.close()
        for fd in opened:
            os.close(fd)
    qmp, port, console = (ours for ours, _ in pairs)
    return Guest(child, port, console, read_end), qmp


def _expose_to_oom_killer(pid: int) -> None:
    """A mom makes itself immune to the kernel's OOM killer, and what its hooks start inherits that: not a guest."""
    score = Path(f"/proc/{pid}/oom_score_adj")
    if int(score.read_text()) < 0:
        score.write_text("0")


def _open(path: Path, flags: int, opened: list[int]) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    opened.append(fd)
    return fd


async def pin_and_run(
    guest: Guest, qmp: socket.socket, affinity: Optional[Affinity], *, on_tap: bool = False, timeout_s: float
) -> None:
    """Connect to QMP, pin each vCPU thread to its CPUs, if it has any, and let the guest run.

    Where the guest is not on a tap, the port that leads to its SSH is learned. Thread ids are QEMU's word, which is the
    user's: only threads of that very process are touched. Raises VTorqueError (VT-LAUNCH).
    """
    try:
        await asyncio.wait_for(_pin_and_run(guest, qmp, affinity, on_tap), timeout_s)
    except asyncio.TimeoutError:
        raise VTorqueError(f"QEMU did not answer within {timeout_s:g} s", code=Code.LAUNCH) from None
    except (QMPError, OSError, EOFError, ValueError, KeyError, TypeError, OverflowError) as err:
        if guest.child.poll() is None:
            await asyncio.wait([asyncio.ensure_future(guest.ended())], timeout=0.5)
        reason = guest.describe_end() if guest.child.poll() is not None else f"QMP: {err}"
        raise VTorqueError(f"QEMU did not start: {reason}", code=Code.LAUNCH) from err


async def _pin_and_run(guest: Guest, qmp: socket.socket, affinity: Optional[Affinity], on_tap: bool) -> None:
    await guest.qmp.connect(qmp)
    if affinity is not None:
        await _pin(guest, affinity)
    if not on_tap:
        usernet = await guest.qmp.execute("human-monitor-command", {"command-line": "info usernet"})
        guest.ssh_port = forwarded_port(str(usernet))
        if guest.ssh_port is None:
            raise ValueError("no port leads to the guest's SSH")
    await guest.qmp.execute("cont")
    await guest.qmp.disconnect()  # QEMU is the user's: nothing that it could send has to be read any more


async def _pin(guest: Guest, affinity: Affinity) -> None:
    threads: Any = await guest.qmp.execute("query-cpus-fast")
    tids = {int(entry["cpu-index"]): int(entry["thread-id"]) for entry in threads}
    own = {int(path.name) for path in Path(f"/proc/{guest.child.pid}/task").iterdir()}
    for index, cpus in enumerate(affinity):
        if tids[index] not in own:
            raise ValueError(f"vCPU {index} is said to be thread {tids[index]}, which is not QEMU's")
        os.sched_setaffinity(tids[index], cpus)
