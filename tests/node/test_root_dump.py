"""Writing down a guest's memory: with a real QEMU, for its owner and for root, and what can go wrong on the way."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from guestsite import MIB, SITE_POOL, GuestSite, be_caller, kernel
from nodesite import Node, make_node, wait_gone
from settled import run
from test_root_staging import mounted

from vmgr.images.pool import Image, Pool
from vmgr.node import record, resuming
from vmgr.node.orders import dump
from vmgr.node.undo import undo
from vmgr.node.user import User

pytestmark = pytest.mark.root


@pytest.fixture
def node(base: Path) -> Node:
    return make_node(base / "node", timeouts={"boot": 20})


@pytest.fixture
def image() -> Image:
    kernel()
    return Pool(SITE_POOL).get("micro")


def test_dumps_of_both_kinds(node: Node, user: User, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    home, roots = Path(user.home), node.base / "roots"
    roots.mkdir(0o700)

    async def work() -> None:
        async with GuestSite(node, user, image) as site:
            for uid, folder in ((user.uid, home), (0, roots)):
                be_caller(monkeypatch, uid)
                for kind in ("kdump-zlib", "elf"):
                    answers = await site.order("dump", file=f"{folder}/{kind}", format=kind)
                    assert answers[-1] == {"file": f"{folder}/{kind}", "bytes": (folder / kind).stat().st_size}
                    assert any(answer.get("doing") == "writing" and answer["so_far"] >= 0 for answer in answers)
            assert "it is there already" in await site.refused("dump", file=f"{roots}/elf")
            assert "VT-TRUST" in await site.refused("dump", file=f"{home}/other")
            assert "'vmcore' is no format of dumps" in await site.refused("dump", file=f"{roots}/x", format="vmcore")
            assert "no file that can be written" in await site.refused("dump", file="x")
            be_caller(monkeypatch, user.uid)
            assert f"cannot write {roots}/mine: Permission denied" in await site.refused("dump", file=f"{roots}/mine")

    run(work())
    for uid, folder in ((user.uid, home), (0, roots)):
        assert (folder / "elf").read_bytes()[:4] == b"\x7fELF" and (folder / "elf").stat().st_size > 256 * MIB
        assert (folder / "elf").stat().st_blocks * 512 < 64 * MIB, "what is zero takes no room"
        assert (folder / "kdump-zlib").read_bytes()[:12] == b"makedumpfile"
        for path in (folder / "elf", folder / "kdump-zlib"):
            assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode), path.stat().st_nlink) == (uid, 0o600, 1)
        assert {path.name for path in folder.iterdir()} - {"workspace"} == {"elf", "kdump-zlib"}
    assert node.left() == []


COPY = dump.copy_pipe


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes the file stops in the middle."""

    def copy(source: int, target: int, most: int, progress: Any) -> None:
        os.write(target, os.read(source, 4096))
        progress(4096)
        time.sleep(3600)

    monkeypatch.setattr(dump, "copy_pipe", copy)


async def begun(site: GuestSite, file: Path) -> Any:
    """A dump that has begun and does not come to its end: its connection."""
    link = await site.link()
    async for answer in link.order("dump", file=str(file)):
        if answer.get("doing") == "writing":
            return link
    raise AssertionError("it came to its end")


async def goes_on(site: GuestSite) -> None:
    """Wait until QEMU has given up the dump, which is when it could begin another one."""
    while (await site.guest.monitor.execute("query-dump"))["status"] == "active":
        await asyncio.sleep(0.05)


def test_a_caller_who_goes_away(
    node: Node, user: User, image: Image, stuck: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with GuestSite(node, user, image) as site:
            be_caller(monkeypatch, user.uid)
            link = await begun(site, Path(user.home) / "dump")
            assert len(list(Path(user.home).glob(".vtorque-*.part"))) == 1
            assert "There is a dump in process" in await site.refused("dump", file=f"{user.home}/second")
            link.close()
            await goes_on(site)
            while list(Path(user.home).glob(".vtorque-*.part")):
                await asyncio.sleep(0.05)
            monkeypatch.undo()
            be_caller(monkeypatch, user.uid)
            assert (await site.order("dump", file=f"{user.home}/third"))[-1]["bytes"] > MIB

    run(work())
    assert sorted(path.name for path in Path(user.home).iterdir()) == ["third", "workspace"] and node.left() == []


def test_a_guest_that_ends_meanwhile(node: Node, user: User, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with GuestSite(node, user, image) as site:

            def copy(source: int, target: int, most: int, progress: Any) -> None:
                os.kill(site.qemu.pid, signal.SIGKILL)
                COPY(source, target, most, progress)

            be_caller(monkeypatch, 0)
            monkeypatch.setattr(dump, "copy_pipe", copy)
            assert "VT-GUEST" in await site.refused("dump", file=f"{node.base}/dump")

    run(work())
    assert not list(node.base.glob("*dump*")) and not list(node.base.glob(".vtorque*")) and node.left() == []


def test_more_than_there_can_be_and_disks_that_are_full(
    node: Node, user: User, image: Image, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(small: Path) -> None:
        async with GuestSite(node, user, image) as site:
            monkeypatch.setattr(resuming, "DEVICES_BYTES", -544 * MIB + 4096)
            assert "QEMU sends more than 4096 bytes" in await site.refused("dump", file=f"{base}/node/dump")
            monkeypatch.undo()
            os.chown(small, user.uid, user.gid)
            be_caller(monkeypatch, user.uid)
            said = await site.refused("dump", file=f"{small}/dump", format="elf")
            assert "No space left on device (512 MiB are needed)" in said
            (small / "filled").write_bytes(bytes(1))
            subprocess.run(["fallocate", "-l", str(_free(small) - MIB // 2), str(small / "filled")], check=True)
            said = await site.refused("dump", file=f"{small}/dump")
            assert "No space left on device" in said
            await goes_on(site)
            assert (await site.order("dump", file=f"{user.home}/dump"))[-1]["bytes"] > MIB

    with mounted(base / "small", "ext4", mebibytes=40) as small:
        run(work(small))
        assert {path.name for path in small.iterdir()} == {"filled", "lost+found"}
    assert not (base / "node" / "dump").exists() and node.left() == []


def _free(folder: Path) -> int:
    info = os.statvfs(folder)
    return info.f_bavail * info.f_frsize


def test_an_agent_that_is_killed_meanwhile(
    node: Node, user: User, image: Image, stuck: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, write_end = os.pipe()
    be_caller(monkeypatch, user.uid)

    async def work() -> None:
        async with GuestSite(node, user, image) as site:
            await begun(site, Path(user.home) / "dump")
            os.write(write_end, str(site.qemu.pid).encode())
            await asyncio.Event().wait()

    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(work())
        finally:
            os._exit(1)
    os.close(write_end)
    qemu = int(os.read(read_end, 4096))
    os.close(read_end)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert wait_gone(qemu)
    (place,) = record.places(node.config.paths)
    stagers = [step["pid"] for step in record.steps(place) if step.get("role") == "stager"]
    assert len(stagers) == 2 and all(wait_gone(pid) for pid in stagers)
    assert undo(place) == [] and node.left() == []
    assert [path.name for path in Path(user.home).iterdir()] == ["workspace"]
