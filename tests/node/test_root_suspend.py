"""A guest on its way into the store for suspended jobs and back: with a real QEMU and disk, and what can go wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from guestsite import MIB, GuestSite, content, kernel, publish
from nodesite import Node, make_node

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image, Pool
from vmgr.node import resuming, suspending
from vmgr.node.allocation import Allocation
from vmgr.node.keys import HostKey
from vmgr.node.staging.disks import close_disk, stage
from vmgr.node.staging.model import Disk, StageRequest
from vmgr.node.suspending import NodeGuests
from vmgr.node.user import User
from vmgr.suspended.entry import Entry, NodePart
from vmgr.suspended.store import Store
from vmgr.topology.model import Cell, Layout

pytestmark = pytest.mark.root
WRITES = ("write -P 2 1M 1M", "write -z -u 10M 64k", "write -P 3 20M 1M", "write -P 4 63M 1M")
JOB = "12.host"
KEY = "ssh-ed25519 " + "A" * 68
BOUND = Layout(1, 1, 1, (Cell((0,), 256, 3),), ((10,),))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 120))


@pytest.fixture
def folder(base: Path) -> Path:
    folder = base / "suspended"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.fixture
def node(base: Path, folder: Path) -> Node:
    return make_node(
        base / "node", images={"overlays_max": "1G"}, timeouts={"boot": 20}, suspended={"folder": str(folder)}
    )


@pytest.fixture
def image(node: Node, base: Path) -> Image:
    kernel()
    disk = base / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 1 0 4M", "-c", "write -P 1 10M 2M", str(disk)], check=True)
    return publish(Pool(node.config.images.pool), "base", disk, virtual_size=64 * MIB)


class Subject(NamedTuple):
    """The guests of a site, as they are suspended, and what has been told of that."""

    guests: NodeGuests
    store: Store
    told: list[str]


def subject(site: GuestSite, save_s: float = 60.0) -> Subject:
    told: list[str] = []
    job = site.job._replace(allocation=Allocation(("n1",), 0, "k"))
    crew = site.crew._replace(host_key=HostKey("", KEY), layouts=(BOUND,))
    store = Store(site.node.config, site.user, site.place)
    return Subject(NodeGuests(job, crew, store, save_s=save_s), store, told)


async def status(site: GuestSite) -> str:
    return str((await site.guest.monitor.execute("query-status"))["status"])


async def refusal(work: Coroutine[Any, Any, Any]) -> VTorqueError:
    with pytest.raises(VTorqueError) as caught:
        await work
    assert "\n" not in str(caught.value)
    return caught.value


def seen_on(node: Node, user: User, image: Image, overlay: int) -> bytes:
    """What a guest of the image sees on its disk whose overlay is this open file."""

    async def work() -> bytes:
        other = GuestSite(node, user, image)
        async with other:
            ask = StageRequest(node.config, other.place, image, user, ["n1-2"], "overlay", 256, None, lambda text: None)
            (disk,) = await stage(ask)
            assert disk is not None
            try:
                return content(Disk(overlay, *disk[1:]))
            finally:
                close_disk(disk)

    found: bytes = run(work())
    return found


@contextmanager
def memory(at: Path, options: str) -> Iterator[None]:
    """A small file system there."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "vt-test", str(at)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def test_disk_and_state_are_stored_and_the_guest_can_go_on(node: Node, user: User, image: Image) -> None:
    files: list[int] = []

    async def work() -> tuple[NodePart, bytes]:
        async with GuestSite(node, user, image, writes=WRITES) as site:
            guests, store, told = subject(site)
            need = await guests.check()
            assert MIB < need < 300 * MIB
            for turn in range(2):  # called off, and tried again
                site.program.orders.clear()
                await store.begin(JOB, need_bytes=need)
                await guests.stop(told.append)
                assert site.program.orders == ["quiesce"] and await status(site) in ("paused", "prelaunch")
                await guests.save(told.append)
                assert await status(site) == "postmigrate" and await site.busy() == []
                if turn == 0:
                    await guests.go_on()
                    assert await status(site) == "running" and site.program.orders == ["quiesce", "mount"]
                    await guests.go_on()
                    assert site.program.orders == ["quiesce", "mount"], "nothing has been touched since"
                    await store.drop(JOB)
            assert any(text.startswith("storing the memory of n1-1 ") for text in told)
            await store.complete(JOB, Entry(JOB, user.name, "a" * 64, image.reference, "k", 1, 1, 7, 9))
            found = await store.find(JOB)
            assert found is not None and len(found[1]) == 1
            for name, size in (("0.state", found[1][0].guests[0].state_bytes), ("0.qcow2", None)):
                fd, length = await store.open(JOB, name)
                files.append(fd)
                assert size in (None, length)
            return found[1][0], site.content

    part, before = run(work())
    try:
        state, overlay = files
        (guest,) = part.guests
        assert (part.node, part.host_key, part.accelerator) == (0, KEY, "tcg") and part.qemu[0].isdigit()
        assert (guest.rank, guest.name, guest.overlay_bytes) == (0, "n1-1", os.fstat(overlay).st_size)
        assert guest.layout == Layout(1, 1, 1, (Cell((0,), 256, None),), ((10,),)), "bound to no node of this host"
        assert os.pread(state, 4, 0) == b"QEVM" and os.fstat(state).st_uid == user.uid
        done = subprocess.run(
            ["qemu-img", "info", "--output=json", f"/proc/self/fd/{overlay}"],
            pass_fds=[overlay], capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "backing-filename" not in done.stdout
        assert seen_on(node, user, image, overlay) == before
    finally:
        for fd in files:
            os.close(fd)
    assert node.left() == []


def test_a_guest_that_keeps_its_shares_is_told_about(node: Node, user: User, image: Image) -> None:
    async def work() -> None:
        async with GuestSite(node, user, image) as site:
            guests, _, told = subject(site)
            site.program.answers["quiesce"] = 1
            site.program.outputs["quiesce"] = "/home: pid 812, user u1\n/data: pid 9\x1b[2J\n" + "x" * 4000
            error = await refusal(guests.stop(told.append))
            assert error.code is Code.SUSPEND and len(str(error)) < 1300
            assert "they are in use: /home: pid 812, user u1; /data: pid 9" in str(error) and "\x1b" not in str(error)
            await guests.go_on()
            assert site.program.orders == ["quiesce", "mount"]
            site.program.answers["mount"] = 1
            await refusal(guests.stop(told.append))
            error = await refusal(guests.go_on())
            assert error.code is Code.GUEST and "goes on without its shares" in str(error)

    run(work())


def test_a_guest_that_says_nothing(node: Node, user: User, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspending, "QUIESCE_SECONDS", 0.1)
    monkeypatch.setattr(suspending, "MOUNT_SECONDS", 0.1)

    async def work() -> None:
        async with GuestSite(node, user, image) as site:
            guests, _, told = subject(site)
            site.program.answers.update(quiesce=None, mount=None)
            assert "did not let go of its shares within 0.1 s" in str(await refusal(guests.stop(told.append)))
            assert "it does not answer" in str(await refusal(guests.go_on()))
            guests, _, told = subject(site)
            site.guest.power = "off"
            for work in (guests.check(), guests.stop(told.append)):
                assert "the guest n1-1 is off" in str(await refusal(work))
            await guests.go_on()
            assert site.program.orders == ["quiesce", "mount"], "one that is off is not started"

    run(work())


def stored(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_store_that_is_full(node: Node, user: User, image: Image, folder: Path) -> None:
    async def work() -> None:
        async with GuestSite(node, user, image, writes=WRITES) as site:
            guests, store, told = subject(site)
            error = await refusal(store.begin(JOB, need_bytes=await guests.check()))
            assert error.code is Code.SUSPEND and "MiB are free" in str(error)
            await store.begin(JOB, need_bytes=1)
            await guests.stop(told.append)
            error = await refusal(guests.save(told.append))
            assert error.code is Code.SUSPEND and "cannot be stored" in str(error)
            assert await site.busy() == []
            await guests.go_on()
            assert await status(site) == "running"
            await store.drop(JOB)
            assert stored(folder) == []

    with memory(folder, "size=2m,mode=1777"):
        run(work())
    assert node.left() == []


def test_a_store_that_is_full_of_the_disk_has_no_room_for_the_state(
    node: Node, user: User, image: Image, folder: Path
) -> None:
    async def work() -> None:
        async with GuestSite(node, user, image, writes=WRITES) as site:
            guests, store, told = subject(site)
            await store.begin(JOB, need_bytes=1)
            await guests.stop(told.append)
            error = await refusal(guests.save(told.append))
            assert "No space left on device" in str(error)
            await guests.go_on()
            assert await status(site) == "running"

    with memory(folder, "size=5m,mode=1777"):
        run(work())
    assert node.left() == []


COPY = suspending.copy_pipe


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes the state stops in the middle."""

    def copy(source: int, target: int, most: int, progress: Any, seen: object) -> int:
        os.write(target, os.read(source, 4096))
        progress(4096)
        time.sleep(3600)
        return 0

    monkeypatch.setattr(suspending, "copy_pipe", copy)


def test_a_state_that_does_not_come_to_its_end(
    node: Node, user: User, image: Image, stuck: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the time, and because it is given up: QEMU gives it up too, and the guest goes on."""

    async def work() -> None:
        async with GuestSite(node, user, image) as site:
            guests, store, told = subject(site, save_s=3.0)
            await store.begin(JOB, need_bytes=1)
            await guests.stop(told.append)
            assert "were not stored within 3 s" in str(await refusal(guests.save(told.append)))
            await guests.go_on()
            assert await status(site) == "running"
            await store.begin(JOB, need_bytes=1)
            guests, _, told = subject(site)
            await guests.stop(told.append)
            saving = asyncio.ensure_future(guests.save(told.append))
            while not any(text.startswith("storing the memory of n1-1 ") for text in told):
                await asyncio.sleep(0.01)
            saving.cancel()
            await asyncio.wait([saving])
            await guests.go_on()
            assert await status(site) == "running"
            monkeypatch.setattr(suspending, "copy_pipe", COPY)
            await store.begin(JOB, need_bytes=1)
            await guests.stop(told.append)
            await guests.save(told.append)
            await store.drop(JOB)

    run(work())
    assert node.left() == []


def test_a_guest_that_dies_while_it_is_stored(node: Node, user: User, image: Image, stuck: None) -> None:
    async def work() -> None:
        async with GuestSite(node, user, image) as site:
            guests, store, told = subject(site)
            await store.begin(JOB, need_bytes=1)
            await guests.stop(told.append)
            saving = asyncio.ensure_future(guests.save(told.append))
            while not any(text.startswith("storing the memory of n1-1 ") for text in told):
                await asyncio.sleep(0.01)
            site.qemu.send_signal(signal.SIGKILL)
            assert (await refusal(saving)).code is Code.SUSPEND  # type: ignore[arg-type]
            assert (await refusal(guests.go_on())).code is Code.GUEST

    run(work())


def test_more_than_a_guest_can_have_is_not_stored(
    node: Node, user: User, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "DEVICES_BYTES", 4096 - 544 * MIB)

    async def work() -> None:
        async with GuestSite(node, user, image) as site:
            guests, store, told = subject(site)
            await store.begin(JOB, need_bytes=1)
            await guests.stop(told.append)
            assert "QEMU sends more than" in str(await refusal(guests.save(told.append)))
            await guests.go_on()
            assert await status(site) == "running"

    run(work())
