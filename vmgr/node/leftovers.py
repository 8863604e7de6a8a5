"""What a job's user left running on the node, outside the guests: found by process tree and session.

The batch system ends the processes of the job's own session. What has left that session, or what the batch system
missed, is found here from the processes that the job is known to have had: the job wrapper, and the user prologue that
has one of the user's own to run. A process that left both its parents and its session between two looks is not found.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Optional

import psutil

from vmgr.errors import printable
from vmgr.logs import LOGGER
from vmgr.node import record
from vmgr.node.process import Process, boot_id, started
from vmgr.node.undo import KILL_SECONDS

GRACE_SECONDS = 2.0
"""How long what is left may take to end by itself after TERM."""

LOOK_SECONDS = 0.2
"""The least time between two looks at all processes: a user may ask for them as often as they like."""

END_SECONDS = 10.0
"""For how long what comes meanwhile is ended too."""

AT_ONCE = 500
"""How many processes are ended at once: each takes a descriptor."""

MAX_RECORDED = 1000
"""How many processes are written to the record, which has room for other things too."""

MAX_NAMED = 10


class _Seen(NamedTuple):
    """One process at one moment. `alive` is False for what only waits to be reaped."""

    start: int
    parent: int
    session: int
    is_users: bool
    alive: bool


class _Session(NamedTuple):
    """A session of the job's: the start of its leader, None when that had ended, and the earliest start that counts.

    `elders` are the ancestors of the process that it was learned from that started in the same clock tick: the batch
    system's shell, for instance, from which the job wrapper comes.
    """

    leader: Optional[int]
    since: int
    elders: frozenset[int] = frozenset()

    def has(self, pid: int, seen: _Seen) -> bool:
        """Whether a member of the session, the process `pid`, is one of the job's."""
        return seen.start > self.since or (seen.start == self.since and pid not in self.elders)


class Tree:
    """The processes of one job on this node, all of the user with this uid.

    It grows by what `find` sees: a process that has been seen stays known when its parents end. Processes are told
    apart by pid and start. A session counts while its number is not another leader's; the kernel gives that number
    to nobody while a process is in the session (setsid(2), pid_namespaces(7)).
    """

    def __init__(self, uid: int) -> None:
        self._uid = uid
        self._noted: dict[int, int] = {}
        self._known: dict[int, int] = {}
        self._sessions: dict[int, _Session] = {}

    def note(self, pid: int) -> None:
        """Remember a process that the job has, and its session; one of another user's, or none, is passed over.

        A session that somebody else leads, the batch system's daemon for instance, is not the job's.
        """
        seen = _see(pid, self._uid)
        if seen is not None and seen.is_users:
            self._noted[pid] = seen.start
            self._add(pid, seen)

    def find(self, *, noted: bool = True) -> list[Process]:
        """What the job has running, by start; without `noted`, all but the noted processes themselves.

        These are the descendants of noted processes, the members of their sessions and the descendants of these,
        started later than the noted one, owned by the user altogether (real, effective and saved uid).
        """
        if not self._known and not self._sessions:
            return []
        all_seen = {pid: seen for pid in psutil.pids() if (seen := _see(pid, self._uid)) is not None}
        self._forget_ended(all_seen)
        by_start = sorted(all_seen.items(), key=lambda item: (item[1].start, item[0]))
        while sum(self._belongs(pid, seen) for pid, seen in by_start):
            pass
        boot = boot_id()
        return [
            Process(boot, pid, seen.start)
            for pid, seen in by_start
            if self._known.get(pid) == seen.start
            and seen.is_users
            and seen.alive
            and (noted or self._noted.get(pid) != seen.start)
        ]

    def _belongs(self, pid: int, seen: _Seen) -> bool:
        """Add a process that belongs to the job; whether that is news. One of another user's may lead to others."""
        if pid in self._known:
            return False
        parent, session = self._known.get(seen.parent), self._sessions.get(seen.session)
        is_child = parent is not None and seen.start >= parent
        is_member = session is not None and session.has(pid, seen) and seen.is_users
        if is_child or is_member:
            self._add(pid, seen)
        return is_child or is_member

    def _add(self, pid: int, seen: _Seen) -> None:
        self._known[pid] = seen.start
        leader = seen if seen.session == pid else _see(seen.session, self._uid)
        if seen.session and seen.session not in self._sessions and (leader is None or leader.is_users):
            self._sessions[seen.session] = _Session(leader.start if leader else None, seen.start, self._elders(seen))

    def _elders(self, seen: _Seen) -> frozenset[int]:
        """The ancestors of a process that started in the same clock tick."""
        elders: set[int] = set()
        parent = _see(seen.parent, self._uid)
        while parent is not None and parent.start == seen.start and seen.parent not in elders:
            elders.add(seen.parent)
            seen, parent = parent, _see(parent.parent, self._uid)
        return frozenset(elders)

    def _forget_ended(self, all_seen: dict[int, _Seen]) -> None:
        """Drop processes that are gone, so that a later owner of a pid is not taken for one, and sessions likewise."""
        starts = {pid: seen.start for pid, seen in all_seen.items()}
        self._known = {pid: start for pid, start in self._known.items() if starts.get(pid) == start}
        self._sessions = {
            number: session
            for number, session in self._sessions.items()
            if number not in starts or starts[number] == session.leader
        }

    async def end(self, found: Iterable[Process], *, grace_s: float) -> list[Process]:
        """End processes that `find` gave: TERM, and KILL after `grace_s`. Gives those that are still there then.

        Signals go through pidfds: a later owner of a pid is never hit, nor one that has another owner by now.
        """
        with contextlib.ExitStack() as opened:
            left = {}
            for process in found:
                fd = _open(process, self._uid)
                if fd is not None:
                    opened.callback(os.close, fd)
                    left[fd] = process
            for sig, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILL_SECONDS)):
                for fd in left:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(fd, sig)
                ended = await _ended(list(left), patience_s)
                left = {fd: process for fd, process in left.items() if fd not in ended}
            return list(left.values())


class Leftovers:
    """What the user of one attempt leaves running on this node.

    What is found stands in the attempt's record from then on, so that it is killed also where the epilogue comes
    before the agent has ended it.
    """

    def __init__(self, place: record.Place, uid: int) -> None:
        self._place = place
        self._uid = uid
        self._tree = Tree(uid)
        self._recorded: set[Process] = set()
        self._turn = asyncio.Lock()
        self._looked = 0.0
        self._ending = False

    async def join(self, pid: int) -> None:
        """Note that a process is the job's, and see what it has started so far."""
        async with self._turn:
            self._tree.note(pid)
            if self._ending:  # which looks itself, and is not to be held up
                return
            await asyncio.sleep(self._looked + LOOK_SECONDS - time.monotonic())
            await self._look()

    async def end(self) -> None:
        """End what the job has running here, all but the processes that have joined: the job wrapper still has to tell
        the job's status, and ends by itself. What cannot be ended is logged.
        """
        self._ending = True
        async with self._turn:
            deadline, grace_s = time.monotonic() + END_SECONDS, GRACE_SECONDS
            stuck: set[Process] = set()
            found = await self._look()
            while found and time.monotonic() < deadline:
                LOGGER.warning("left running by the user, ended: %s", _named(found))
                stuck.update(await self._end(found[:AT_ONCE], grace_s))
                found, grace_s = [process for process in await self._look() if process not in stuck], 0.0
            if found or stuck:
                LOGGER.error("left running by the user, cannot be ended: %s", _named([*found, *stuck]))

    async def _end(self, found: list[Process], grace_s: float) -> list[Process]:
        try:
            return await self._tree.end(found, grace_s=grace_s)
        except OSError as err:
            LOGGER.error("what the user left running: %s", err)
            return found

    async def _look(self) -> list[Process]:
        """All but those that have joined; in a thread, because there may be thousands of processes on a node."""
        try:
            found = await asyncio.get_running_loop().run_in_executor(None, lambda: self._tree.find(noted=False))
        except (OSError, psutil.Error) as err:
            LOGGER.error("what the user left running is not known: %s", err)
            return []
        self._looked = time.monotonic()
        for process in found:
            if process not in self._recorded and len(self._recorded) < MAX_RECORDED:
                self._recorded.add(process)
                try:
                    record.append(self._place, {"do": "leftover", "uid": self._uid, **process._asdict()})
                except OSError as err:
                    LOGGER.error("what the user left running is not recorded: %s", err)
        return found


def kill(recorded: Iterable[Process], uid: int) -> None:
    """Kill processes that `Leftovers` recorded, with what these have started since; parents first, because a shell
    goes on when its child ends. Their end is not waited for: nothing else depends on it.
    """
    tree = Tree(uid)
    for process in recorded:
        seen = _see(process.pid, uid)
        if seen is not None and seen.alive and seen.start == process.start and process.boot == boot_id():
            tree.note(process.pid)
    for process in tree.find():
        fd = _open(process, uid)
        if fd is not None:
            try:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            except ProcessLookupError:
                pass
            finally:
                os.close(fd)


def _open(process: Process, uid: int) -> Optional[int]:
    """A pidfd of exactly this process, None when it is gone or not this user's any more."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    seen = _see(process.pid, uid)
    if process.boot == boot_id() and seen is not None and seen.start == process.start and seen.is_users:
        return fd
    os.close(fd)
    return None


def _named(found: Sequence[Process]) -> str:
    """How many processes there are, and the names of the first ones, which are the user's words."""
    names = []
    for process in found[:MAX_NAMED]:
        try:
            names.append(f"{process.pid} {printable(psutil.Process(process.pid).name())}")
        except psutil.Error:
            names.append(str(process.pid))
    return f"{len(found)} ({', '.join(names)}{', ...' if len(found) > MAX_NAMED else ''})"


def _see(pid: int, uid: int) -> Optional[_Seen]:
    """A process as it is, None when there is none; its start is read before and after the rest."""
    start = started(pid)
    if start is None:
        return None
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            dead = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) and process.num_threads() <= 1
            seen = _Seen(start, process.ppid(), os.getsid(pid), set(process.uids()) == {uid}, not dead)
    except (psutil.Error, OSError):
        return None
    return seen if started(pid) == start else None


async def _ended(pidfds: Sequence[int], timeout_s: float) -> set[int]:
    """Those of the pidfds whose processes end within the time; returns when all have."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    ended: set[int] = set()

    def note(fd: int) -> None:
        loop.remove_reader(fd)
        ended.add(fd)
        if len(ended) == len(pidfds):
            over.set()

    for fd in pidfds:
        loop.add_reader(fd, note, fd)
    try:
        if pidfds:
            await asyncio.wait_for(over.wait(), timeout_s)
    except asyncio.TimeoutError:
        pass
    finally:
        for fd in pidfds:
            loop.remove_reader(fd)
    return ended
