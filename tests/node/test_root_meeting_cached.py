"""How nodes meet on a file system whose clients remember names and attributes for 30 s, as on NFS, and that may hang.

Two mounts of one directory by bindfs stand for two machines: `near` is the mother superior's, `far` a sister's.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from settled import run

from vmgr.errors import VTorqueError
from vmgr.node.allocation import Allocation
from vmgr.node.fellows import Fellows
from vmgr.node.meeting import job_folder, nodes_folder
from vmgr.node.user import User

KEY = "0123456789abcdef"
CACHE_S, SLACK_S, PATIENCE_S, TIMEOUT_S = 30, 3.0, 60.0, 2.0
NODES = ("n0", "n1", "n2")
INOTIFY = pytest.mark.parametrize("inotify", [True, False])


class Mount(NamedTuple):
    """One machine's view of the shared directory."""

    directory: str
    server: subprocess.Popen[bytes]

    def remember_absent(self, *names: str) -> None:
        """Have the kernel remember that these are not there."""
        for name in names:
            assert not Path(name).exists()

    def hang(self) -> None:
        self.server.send_signal(signal.SIGSTOP)
        while psutil.Process(self.server.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)

    def resume(self) -> None:
        self.server.send_signal(signal.SIGCONT)


class Machines(NamedTuple):
    near: Mount
    far: Mount

    def fellows(self, index: int, user: User, *, inotify: bool = True) -> Fellows:
        """What the agent of a node has: of the mother superior on one machine, of any other on the other."""
        mount = self.far if index else self.near
        return Fellows(mount.directory, Allocation(NODES, index, KEY), user, timeout_s=TIMEOUT_S, inotify=inotify)


@pytest.fixture
def machines(base: Path, user: User) -> Iterator[Machines]:
    """Two mounts; at the end neither they nor any process of the user's or of bindfs is left."""
    source = base / "shared"
    source.mkdir(mode=0o700)
    os.chown(source, user.uid, user.gid)
    mounts = []
    try:
        for name in ("near", "far"):
            (base / name).mkdir()
            options = f"attr_timeout={CACHE_S},entry_timeout={CACHE_S},negative_timeout={CACHE_S}"
            server = subprocess.Popen(["bindfs", "-f", "-o", options, str(source), str(base / name)])
            mounts.append(Mount(str(base / name), server))
            while not os.path.ismount(base / name):
                assert server.poll() is None, "bindfs cannot mount"
                time.sleep(0.01)
        yield Machines(*mounts)
        for mount in mounts:
            mount.resume()
        left = [child for child in psutil.Process().children(recursive=True) if child.uids().real == user.uid]
        assert not psutil.wait_procs(left, timeout=5)[1], "a process of the user's is left"
    finally:
        for mount in mounts:
            mount.resume()
            subprocess.run(["umount", mount.directory], check=True)
            mount.server.terminate()  # it would not end where another mount namespace has a copy of the mount
            mount.server.wait(10)
    assert str(base) not in Path("/proc/self/mounts").read_text()


async def seconds(work: Coroutine[Any, Any, Any]) -> float:
    begun = time.monotonic()
    await work
    return time.monotonic() - begun


def test_the_mounts_remember(machines: Machines) -> None:
    """Without which the other tests would show nothing."""
    name, near = "told", Path(machines.near.directory)
    machines.near.remember_absent(str(near / name))
    (Path(machines.far.directory) / name).write_text("there")
    assert [found.name for found in near.iterdir()] == [name] and not (near / name).exists()


@INOTIFY
@pytest.mark.parametrize("remembered", [False, True])
def test_nodes_are_known_to_be_ready(machines: Machines, user: User, inotify: bool, remembered: bool) -> None:
    async def work() -> float:
        folder = nodes_folder(machines.near.directory, KEY)
        if remembered:
            machines.near.remember_absent(folder)
        mother, *sisters = (machines.fellows(index, user, inotify=inotify) for index in range(3))
        try:
            await mother.tell("ready", {})
            if remembered:
                machines.near.remember_absent(f"{folder}/ready.1", f"{folder}/ready.2", f"{folder}/failed.2")
            waiting = asyncio.ensure_future(mother.all_ready())
            await sisters[0].tell("ready", {})
            await asyncio.sleep(1)
            assert not waiting.done()
            await sisters[1].tell("ready", {})
            return await seconds(asyncio.wait_for(waiting, PATIENCE_S))
        finally:
            await mother.close()

    assert run(work()) <= SLACK_S


@INOTIFY
@pytest.mark.parametrize("remembered", [False, True])
def test_the_folder_of_another_machine_is_found(
    machines: Machines, user: User, inotify: bool, remembered: bool
) -> None:
    """The mother superior comes last, to a folder of which its machine remembers that it is not there."""

    async def work() -> float:
        if remembered:
            machines.near.remember_absent(nodes_folder(machines.near.directory, KEY))
        for index in (1, 2):
            await machines.fellows(index, user).tell("ready", {})
        mother = machines.fellows(0, user, inotify=inotify)
        try:
            await mother.tell("ready", {})
            return await seconds(mother.all_ready())
        finally:
            await mother.close()

    assert run(work()) <= SLACK_S


@INOTIFY
@pytest.mark.parametrize("remembered", [False, True])
def test_the_end_of_the_job_is_heard_and_answered(
    machines: Machines, user: User, inotify: bool, remembered: bool
) -> None:
    async def work() -> tuple[float, float]:
        folder = job_folder(machines.far.directory, KEY)
        if remembered:
            machines.far.remember_absent(folder)
        mother, *sisters = (machines.fellows(index, user, inotify=inotify) for index in range(3))
        hearing = [asyncio.ensure_future(sister.over()) for sister in sisters]
        try:
            await asyncio.sleep(1)
            if remembered:
                machines.far.remember_absent(f"{folder}/over")
            assert not any(one.done() for one in hearing)
            await mother.call_over()
            heard = await seconds(asyncio.wait_for(asyncio.gather(*hearing), PATIENCE_S))  # type: ignore[arg-type]
            for sister in sisters:
                await sister.tell("gone", {})
            return heard, await seconds(mother.all_gone(PATIENCE_S))
        finally:
            for each in (mother, *sisters):
                await each.close()

    assert max(run(work())) <= SLACK_S


@INOTIFY
def test_a_failure_is_seen(machines: Machines, user: User, inotify: bool) -> None:
    async def work() -> float:
        mother, sister = (machines.fellows(index, user, inotify=inotify) for index in (0, 2))
        try:
            await mother.tell("ready", {})
            machines.near.remember_absent(f"{nodes_folder(machines.near.directory, KEY)}/failed.2")
            waiting = [asyncio.ensure_future(wait()) for wait in (mother.all_ready, mother.failure)]
            await asyncio.sleep(1)
            await sister.tell("failed", {"code": "VT-HOOK", "reason": "it ended with 3", "output": "said\n"})
            begun = time.monotonic()
            for one in waiting:
                with pytest.raises(VTorqueError, match="VT-HOOK: n2: it ended with 3") as caught:
                    await one
                assert caught.value.output == "said\n"
            return time.monotonic() - begun
        finally:
            await mother.close()

    assert run(work()) <= SLACK_S


@INOTIFY
def test_a_file_system_that_hangs_holds_nobody_up(machines: Machines, user: User, inotify: bool) -> None:
    """Neither what listens already nor what starts now; what was said before and after the hanging is heard."""

    async def work() -> None:
        mother, sister, other = (machines.fellows(index, user, inotify=inotify) for index in range(3))
        hearing = asyncio.ensure_future(sister.over())
        waiting = asyncio.ensure_future(mother.all_ready())
        late = machines.fellows(0, user, inotify=inotify)
        try:
            await mother.tell("ready", {})
            await asyncio.sleep(1)
            for mount in machines:
                mount.hang()
            late_waiting = asyncio.ensure_future(late.all_ready())
            assert TIMEOUT_S <= await seconds(sister.tell("ready", {})) <= TIMEOUT_S + 1
            assert TIMEOUT_S <= await seconds(mother.call_over()) <= TIMEOUT_S + 1
            assert 0.5 <= await seconds(mother.all_gone(0.5)) <= 1.5  # type: ignore[arg-type]
            assert not hearing.done() and not waiting.done() and not late_waiting.done()
            assert await seconds(late.close()) <= 1.5
            late_waiting.cancel()
            assert await seconds(sister.close()) <= 1.5
            hearing.cancel()
            for mount in machines:
                mount.resume()
            for one in (sister, other):
                await one.tell("ready", {})
            assert await seconds(waiting) <= SLACK_S  # type: ignore[arg-type]
            for mount in machines:
                mount.hang()
            assert await seconds(mother.close()) <= 1.5
        finally:
            for mount in machines:
                mount.resume()
            await mother.close()

    run(work())
