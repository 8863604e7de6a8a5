"""Starting a planned guest: QEMU as the job's user, spoken to over QMP, its vCPU threads pinned before they run."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

from qemu.qmp import QMPClient

from vmgr.errors import Code, VTorqueError
from vmgr.node import process
from vmgr.node.jobgroup import JobGroup
from vmgr.node.monitor import MAX_REASON, QUARREL, Monitor
from vmgr.node.qemu import Descriptors, GuestPlan, command_line, forwarded_port
from vmgr.node.user import User
from vmgr.node.waiting import first
from vmgr.topology.model import Placement

if TYPE_CHECKING:
    from vmgr.node.incoming import SavedState


_NO_GROUP = JobGroup()


class Files(NamedTuple):
    """What QEMU gets as open descriptors; who opened them closes them. `overlay` is on `backing`, which is read only.

    Both are None for a guest without a disk, `tap` is None for one on user networking, `vhost` is the kernel's device
    that serves the tap, `data` the file of a persistent disk, `shares` and `parents` are as in `Descriptors`.
    """

    seed: int
    overlay: Optional[int] = None
    backing: Optional[int] = None
    tap: Optional[int] = None
    vhost: Optional[int] = None
    data: Optional[int] = None
    shares: tuple[Optional[int], ...] = ()
    parents: tuple[int, ...] = ()


class Guest:
    """One running guest: its process, its QMP connection, its console and event port (connected sockets).

    `ssh_port` is the port of 127.0.0.1 that leads to its SSH through QEMU's user networking; None on a tap.
    """

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        port: socket.socket,
        console: socket.socket,
        errors: int,
        group: JobGroup = _NO_GROUP,
    ) -> None:
        self.group = group
        self.child = child
        self.port = port
        self.console = console
        self.errors = errors
        self.monitor = Monitor()
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

    def describe_end(self, lines: int = 1) -> str:
        """How QEMU ended, with the last lines of what it said on standard error."""
        status = self.child.returncode
        how = f"killed by signal {-status}" if status is not None and status < 0 else f"exit status {status}"
        if status == -signal.SIGKILL and self.group.has_run_out():
            how += ", because the job has used up its memory on this node"
        try:
            said = os.read(self.errors, 4096).decode("utf-8", "replace").strip()
        except OSError:
            said = ""
        return f"{how}{': ' + ' | '.join(said.splitlines()[-lines:])[:300] if said else ''}"

    async def kill(self) -> None:
        """End QEMU at once and wait until it is gone."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGKILL)
            await self.ended()

    async def close(self) -> None:
        """Give the connections back; QEMU must have ended."""
        await self.monitor.close()
        self.console.close()
        os.close(self.errors)


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def start(
    qemu: str,
    plan: GuestPlan,
    files: Files,
    user: User,
    *,
    kvm_gid: Optional[int],
    group: JobGroup,
    started: Callable[[int], None],
) -> tuple[Guest, socket.socket]:
    """Start QEMU for `plan`, stopped before its first instruction. Gives the guest and the socket of its QMP.

    QEMU runs with the user's ids, in a session of its own and the control `group` of the job, and dies with the calling
    process. `started` gets its pid. Raises VTorqueError (VT-LAUNCH).
    """
    pairs = [socket.socketpair() for _ in range(3)]
    child: Optional[subprocess.Popen[bytes]] = None
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        theirs = [theirs.fileno() for _, theirs in pairs]
        fds = Descriptors(theirs[0], theirs[1], theirs[2], *files)
        with group.opened() as joins:
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
                pass_fds=[*theirs, *_numbers(files)],
                preexec_fn=process.dies_with(os.getpid(), joins),
            )
        started(child.pid)
        group.add(child.pid)
        _expose_to_oom_killer(child.pid)
    except (OSError, VTorqueError) as err:
        for ours, _ in pairs:
            ours.close()
        os.close(read_end)
        if child is not None:
            child.kill()
            child.wait()
        if isinstance(err, VTorqueError):
            raise
        raise VTorqueError(f"cannot start {qemu}: {err.strerror}", code=Code.LAUNCH, hint="is it installed?") from err
    finally:
        os.close(write_end)
        for _, end in pairs:
            end.close()
    qmp, port, console = (ours for ours, _ in pairs)
    return Guest(child, port, console, read_end, group), qmp


def _numbers(files: Files) -> list[int]:
    return [fd for fd in (*files[:-2], *files.shares, *files.parents) if fd is not None]


def _expose_to_oom_killer(pid: int) -> None:
    """A mom makes itself immune to the kernel's OOM killer, and what its hooks start inherits that: not a guest."""
    score = Path(f"/proc/{pid}/oom_score_adj")
    if int(score.read_text()) < 0:
        score.write_text("0")


async def pin_and_run(
    guest: Guest,
    qmp: socket.socket,
    placement: Optional[Placement],
    *,
    on_tap: bool = False,
    timeout_s: float,
    state: Optional[SavedState] = None,
) -> None:
    """Connect to QMP, pin each thread of QEMU to its CPUs, if there is a `placement`, and let the guest run.

    A guest that goes on gets its saved `state` before, which has a time of its own. Where the guest is not on a tap,
    the port that leads to its SSH is learned. Thread ids are QEMU's word, which is the user's: only threads of that
    very process are touched. Raises VTorqueError (VT-LAUNCH).
    """
    limit = timeout_s + (0.0 if state is None else state.timeout_s)
    try:
        await asyncio.wait_for(first(_pin_and_run(guest, qmp, placement, on_tap, state), _end(guest)), limit)
    except asyncio.TimeoutError:
        what = "did not answer" if state is None else "did not read the guest's saved state"
        raise VTorqueError(f"QEMU {what} within {limit:g} s", code=Code.LAUNCH) from None
    except QUARREL as err:
        if guest.child.poll() is None:
            await asyncio.wait([asyncio.ensure_future(guest.ended())], timeout=0.5)
        reason = guest.describe_end(2) if guest.child.poll() is not None else f"QMP: {str(err)[:MAX_REASON]}"
        what = "did not start" if state is None else "did not go on from the guest's saved state"
        raise VTorqueError(f"QEMU {what}: {reason}", code=Code.LAUNCH) from err


async def _end(guest: Guest) -> None:
    """Raise EOFError when QEMU ends, of which those who wait for an event of its do not hear."""
    await guest.ended()
    raise EOFError


async def _pin_and_run(
    guest: Guest, qmp: socket.socket, placement: Optional[Placement], on_tap: bool, state: Optional[SavedState]
) -> None:
    await guest.monitor.connect(qmp)
    async with guest.monitor.talk() as client:
        if placement is not None:
            await _pin(guest, client, placement)
        if state is not None:
            from vmgr.node.incoming import read_back  # few guests go on

            await read_back(client, state)
        if not on_tap:
            usernet = await client.execute("human-monitor-command", {"command-line": "info usernet"})
            guest.ssh_port = forwarded_port(str(usernet))
            if guest.ssh_port is None:
                raise ValueError("no port leads to the guest's SSH")
        await client.execute("cont")


async def _pin(guest: Guest, client: QMPClient, placement: Placement) -> None:
    """vCPUs and I/O threads where they are planned; all other threads, and those they will start, on the emulator's."""
    cpus: Any = await client.execute("query-cpus-fast")
    threads: Any = await client.execute("query-iothreads")
    tids = {int(entry["cpu-index"]): int(entry["thread-id"]) for entry in cpus}
    where: dict[int, Iterable[int]] = {int(entry["thread-id"]): placement.io for entry in threads}
    where.update({tids[index]: allowed for index, allowed in enumerate(placement.vcpus)})
    own = process.threads(guest.child.pid)
    for tid in where:
        if tid not in own:
            raise ValueError(f"{tid} is said to be a thread of QEMU's, and is none")
    for tid in own - set(where):
        try:
            os.sched_setaffinity(tid, placement.emulator)
        except ProcessLookupError:
            pass  # a thread that has ended
    for tid, allowed in where.items():
        os.sched_setaffinity(tid, allowed)
    for pid in process.kernel_threads(f"vhost-{guest.child.pid}"):
        os.sched_setaffinity(pid, placement.emulator)
