"""Saving a running guest's disk: with real QEMUs, a pool and users' files, and everything that can go wrong."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import stat
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import pytest
from guestsite import MIB, GuestSite, be_caller, content, kernel, publish
from nodesite import Node, make_node, wait_gone
from settled import run
from test_root_staging import mounted

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image, Pool
from vmgr.node import record
from vmgr.node.orders import room
from vmgr.node.staging.chain import MAX_LAYERS, chain_of
from vmgr.node.staging.disks import close_disk, stage
from vmgr.node.staging.model import StageRequest
from vmgr.node.staging.overlay import write_overlay
from vmgr.node.undo import undo
from vmgr.node.user import User

pytestmark = pytest.mark.root
WRITES = ("write -P 2 1M 1M", "discard 2M 1M", "write -z -u 10M 64k", "write -P 3 20M 1M", "write -P 4 63M 1M")


@pytest.fixture
def node(base: Path) -> Node:
    return make_node(base / "node", images={"overlays_max": "1G", "ramdisk_max": "1G"}, timeouts={"boot": 20})


@pytest.fixture
def image(node: Node, base: Path) -> Image:
    kernel()
    disk = base / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 1 0 4M", "-c", "write -P 1 10M 2M", str(disk)], check=True)
    return publish(pool_of(node), "base", disk, virtual_size=64 * MIB)


def pool_of(node: Node) -> Pool:
    return Pool(node.config.images.pool)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seen_from(node: Node, user: User, image: Image, fs_type: str = "overlay") -> str:
    """What a guest of the image sees on its disk."""
    place = node.place("13.host")
    lock, listener = record.create(place, {"job_id": "13.host"})
    workspace = Path(user.home) / "workspace"
    request = StageRequest(node.config, place, image, user, ["n1-1"], fs_type, 256, str(workspace), lambda text: None)
    try:
        (disk,) = run(stage(request))
        assert disk is not None
        try:
            return digest(content(disk))
        finally:
            close_disk(disk)
    finally:
        os.close(lock)
        listener.close()
        assert undo(place) == []


def left_by_guests(node: Node) -> list[str]:
    """What lies in the node's folder for overlays beside the overlay of the guest."""
    return [path.name for path in node.config.images.overlays.iterdir() if not path.name.endswith("n1-1.qcow2")]


def test_an_image_that_stands_alone(node: Node, user: User, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    def write(path: str, content: bytes) -> int:
        fd = write_overlay(path, content)
        kept.append(os.dup(fd))  # as whoever has taken it out of QEMU has
        return fd

    monkeypatch.setattr(room, "write_overlay", write)

    async def work() -> tuple[str, dict[str, Any]]:
        async with GuestSite(node, user, image, writes=WRITES) as site:
            before = [step for step in record.steps(site.place) if step.get("do") == "overlay"]
            answers = await site.order("save", rank=0, name="mine", description="as it was")
            assert answers[-1] == {"image": "mine@1"}
            assert {"doing": "copying the disk", "so_far": 0, "total": 64 * MIB} in answers
            assert "warning" not in str(answers), "the guest's file system was frozen"
            assert site.program.orders == ["freeze", "thaw"]
            assert await site.busy() == [] and left_by_guests(node) == []
            steps = [step for step in record.steps(site.place) if step.get("do") == "overlay"]
            assert sum(step["reserved"] for step in steps) == sum(step["reserved"] for step in before)
            return digest(site.content), answers[-1]

    seen, _ = run(work())
    assert [os.fstat(fd).st_blocks for fd in kept] == [0], "a descriptor that somebody keeps keeps no room"
    os.close(kept[0])
    made = pool_of(node).get("mine")
    assert (made.parent, made.description, made.disk, made.disk_format) == (None, "as it was", "disk.qcow2", "qcow2")
    assert (made.family, made.cmdline, made.virtual_size) == (image.family, image.cmdline, 64 * MIB)
    assert made.path("kernel").read_bytes() == image.path("kernel").read_bytes()
    disk = made.path("disk")
    assert digest(disk.read_bytes()) == made.files["disk.qcow2"]["sha256"]
    assert (disk.stat().st_uid, stat.S_IMODE(disk.stat().st_mode)) == (0, 0o444)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o755 for path in (disk.parent, disk.parents[1]))
    assert disk.stat().st_size < 12 * MIB, "what is empty takes no room"
    assert seen_from(node, user, made) == seen


def test_layers_on_layers(node: Node, user: User, image: Image, base: Path) -> None:
    """What is zero in a layer hides what lies below, on every kind of staging; a layer of a guest on a layer."""

    async def save(of: Image, name: str, *writes: str) -> str:
        async with GuestSite(node, user, of, writes=writes) as site:
            assert (await site.order("save", name=name, layer=True))[-1] == {"image": f"{name}@1"}
            return digest(site.content)

    seen = run(save(image, "one", *WRITES))
    one = pool_of(node).get("one")
    assert one.parent == "base@1" and one.path("disk").stat().st_size < 4 * MIB
    info = subprocess.check_output(["qemu-img", "info", str(one.path("disk"))], text=True)
    assert "backing file" not in info, "nothing in the file says what it lies on"
    for fs_type in ("overlay", "ramdisk", "sharedfs"):
        assert seen_from(node, user, one, fs_type) == seen
    second = run(save(one, "two", "write -P 9 20M 512k", "discard 1M 512k"))
    two = pool_of(node).get("two")
    assert two.parent == "one@1" and "saved from 12.host, n1-1 (one@1)" in two.description
    for fs_type in ("overlay", "ramdisk", "sharedfs"):
        assert seen_from(node, user, two, fs_type) == second
    assert seen != second
    folder = base / "cache"
    images = {"pool": str(node.config.images.pool), "cache": {"folder": str(folder)}}
    assert seen_from(make_node(base / "cached", images=images), user, two) == second
    disks = {each.files["disk.qcow2"]["sha256"] for each in (image, one, two)}
    assert {path.name for path in folder.iterdir()} == disks, "the node has its own copy of every layer"


def test_as_many_layers_as_are_allowed(node: Node, user: User, image: Image) -> None:
    top = image
    for _ in range(MAX_LAYERS - 1):
        with pool_of(node).staging("deep") as work:
            out = work / "out"
            out.mkdir()
            for name in ("disk.qcow2", "kernel", "initrd"):
                source = image.path({"disk.qcow2": "disk"}.get(name, name))
                (out / name).write_bytes(source.read_bytes())
            facts = {key: value for key, value in image._asdict().items() if key not in ("folder", "files")}
            for key in ("name", "revision", "created", "added_by"):
                del facts[key]
            facts.update(features=[], parent=top.reference)
            top = pool_of(node).publish(out, "deep", facts)

    async def work() -> None:
        async with GuestSite(node, user, top) as site:
            assert "VT-IMAGE: deep@7 is 8 layers already; save it with --flat" in await site.refused(
                "save", name="deeper", layer=True
            )
            assert (await site.order("save", name="flat"))[-1] == {"image": "flat@1"}
            assert site.program.orders == ["freeze", "thaw"], "what is refused is not asked of the guest"

    assert len(chain_of(pool_of(node), top)) == MAX_LAYERS
    run(work())
    assert pool_of(node).get("flat").parent is None
    for what, wrong in (
        ("lies on more than 7 others", top._replace(parent="deep@7")),
        ("which cannot be used: unknown image 'gone'", top._replace(parent="gone@1")),
        ("has no revision 9", top._replace(parent="base@9")),
        ("that has a larger disk", top._replace(parent="base@1", virtual_size=MIB)),
        ("its format is raw", top._replace(parent="base@1", disk_format="raw")),
    ):
        with pytest.raises(VTorqueError, match=what) as caught:
            chain_of(pool_of(node), wrong)
        assert caught.value.code is Code.IMAGE


def test_a_file_of_the_owners(node: Node, user: User, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, secret = Path(user.home), node.base / "secret"
    secret.mkdir(0o700)

    async def work() -> str:
        async with GuestSite(node, user, image, writes=WRITES) as site:
            be_caller(monkeypatch, user.uid)
            file = folder / "saved.qcow2"
            answers = await site.order("save", file=str(file))
            assert answers[-1] == {"file": str(file), "bytes": file.stat().st_size}
            assert site.program.orders == ["freeze", "thaw"] and await site.busy() == []
            assert "it is there already" in await site.refused("save", file=str(file))
            assert f"{secret}/x cannot be used: Permission denied" in await site.refused("save", file=f"{secret}/x")
            for wrong in ("saved", "/", f"{folder}/../x", f"{folder}/x\n", "/" + "x" * 1025, 7, None):
                assert "no file that can be written" in await site.refused("save", file=wrong)
            assert "VT-ACCESS: the pool belongs to root" in await site.refused("save", name="mine")
            be_caller(monkeypatch, 0)
            site.job = site.job._replace(image=image._replace(name=f"{folder}/own.qcow2", revision=0))
            assert "own.qcow2, which is not in the pool" in await site.refused("save", name="mine", layer=True)
            be_caller(monkeypatch, user.uid)
            assert "a layer is of use only in the pool" in await site.refused("save", file=f"{folder}/y", layer=True)
            be_caller(monkeypatch, 0)
            assert "VT-TRUST" in await site.refused("save", file=f"{folder}/roots")
            assert (await site.order("save", file=f"{secret}/roots"))[-1]["file"] == f"{secret}/roots"
            return digest(site.content)

    seen = run(work())
    for path, owner in ((folder / "saved.qcow2", user.uid), (secret / "roots", 0)):
        info = path.stat()
        assert (info.st_uid, stat.S_IMODE(info.st_mode), info.st_nlink) == (owner, 0o600, 1)
        assert info.st_blocks * 512 < 12 * MIB, "what was reserved is given back"
        raw = node.base / "raw"
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)], check=True)
        assert digest(raw.read_bytes()) == seen
    assert sorted(path.name for path in folder.iterdir()) == ["saved.qcow2", "workspace"]
    assert [path.name for path in secret.iterdir()] == ["roots"] and node.left() == []


async def once_free(site: GuestSite, **wanted: str) -> None:
    """Save, once the agent too is done with what was given up: QEMU is a moment earlier."""
    while True:
        try:
            await site.order("save", **wanted)
            return
        except VTorqueError as err:
            assert "is being saved already" in err.message
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("to_file", [False, True])
def test_a_caller_who_goes_away(
    node: Node, user: User, image: Image, monkeypatch: pytest.MonkeyPatch, to_file: bool
) -> None:
    async def work() -> None:
        async with GuestSite(node, user, image, writes=WRITES) as site:
            if to_file:
                be_caller(monkeypatch, user.uid)
            begun = site.slow_down(monkeypatch)
            wanted = {"file": f"{user.home}/saved"} if to_file else {"name": "mine"}
            link = await site.link()
            link.send("save", **wanted)
            await begun.wait()
            assert "is being saved already" in await site.refused("save", **wanted)
            link.close()
            while await site.busy():
                await asyncio.sleep(0.05)
            monkeypatch.undo()
            if to_file:
                be_caller(monkeypatch, user.uid)
            assert site.program.orders == ["freeze", "thaw"]
            await once_free(site, **wanted)

    run(work())
    assert pool_of(node).revisions("mine") == ([] if to_file else [1])
    assert node.left() == [] and [path.name for path in Path(user.home).glob(".*")] == []


def test_a_guest_that_ends_meanwhile(node: Node, user: User, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with GuestSite(node, user, image, writes=WRITES) as site:
            be_caller(monkeypatch, user.uid)
            begun = site.slow_down(monkeypatch)
            refused = asyncio.ensure_future(site.refused("save", file=f"{user.home}/saved"))
            await begun.wait()
            site.qemu.kill()
            assert "VT-GUEST" in await refused

    run(work())
    assert [path.name for path in Path(user.home).iterdir()] == ["workspace"] and node.left() == []


def test_guests_that_do_not_obey(node: Node, user: User, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmgr.node.orders.freezing.FREEZE_SECONDS", 0.3)

    async def work() -> None:
        async with GuestSite(node, user, image) as site:
            program = site.program
            program.answers["freeze"] = None
            assert "did not write out its disk within 0.3 s; --no-freeze" in await site.refused("save", name="mine")
            assert program.orders == ["freeze", "thaw"]
            assert (await site.order("save", name="mine", freeze=False))[-1] == {"image": "mine@1"}
            assert program.orders == ["freeze", "thaw"], "it is not asked"
            program.answers["freeze"] = 1
            answers = await site.order("save", name="mine")
            assert answers[-1] == {"image": "mine@2"} and "not frozen: it cannot" in str(answers)
            program.answers.update(freeze=0, thaw=1)
            assert "went on writing before the copy began" in await site.refused("save", name="mine")
            assert await site.busy() == []

    run(work())
    assert pool_of(node).revisions("mine") == [1, 2]


def test_what_the_user_writes_into_the_copy_is_not_believed(
    node: Node, user: User, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU runs as the user, who can take the descriptor out of it, keep it, and write whenever that may hurt."""

    async def work() -> None:
        async with GuestSite(node, user, image, writes=WRITES) as site:
            taken: list[int] = []
            execute = site.guest.monitor.execute
            header: list[tuple[int, bytes]] = []

            async def tapped(
                command: str, arguments: Optional[Mapping[str, Any]] = None, *, fd: Optional[int] = None, **more: Any
            ) -> Any:
                if fd is not None:
                    taken.append(os.dup(fd))
                result = await execute(command, arguments, fd=fd, **more)
                if command == "blockdev-del":
                    for offset, data in header:
                        os.pwrite(taken[-1], data, offset)
                return result

            monkeypatch.setattr(site.guest.monitor, "execute", tapped)
            header[:] = [(8, (1024).to_bytes(8, "big") + (11).to_bytes(4, "big")), (1024, b"/etc/shadow")]
            assert "backing file" in await site.refused("save", name="mine")
            header[:] = [(24, (1 << 40).to_bytes(8, "big"))]
            await site.refused("save", name="mine")
            header[:] = [(0, b"no qcow2 at all")]
            assert "is of format raw by its header" in await site.refused("save", name="mine")
            header[:] = [(1 << 40, b"so long")]
            assert "has 1099511627783 bytes, more than" in await site.refused("save", name="mine")
            assert pool_of(node).revisions("mine") == [] and left_by_guests(node) == []
            header[:] = []
            assert (await site.order("save", name="mine"))[-1] == {"image": "mine@1"}
            made = pool_of(node).get("mine")
            for fd in taken:
                os.pwrite(fd, b"changed afterwards", 0)
                os.close(fd)
            assert digest(made.path("disk").read_bytes()) == made.files["disk.qcow2"]["sha256"]

    run(work())


def test_disks_that_are_full(node: Node, user: User, image: Image, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(small: Path) -> None:
        async with GuestSite(node, user, image, writes=WRITES) as site:
            os.chown(small, user.uid, user.gid)
            be_caller(monkeypatch, user.uid)
            said = await site.refused("save", file=f"{small}/saved")
            assert "No space left on device (69 MiB are needed)" in said
            assert [path.name for path in small.iterdir() if path.name != "lost+found"] == []
            be_caller(monkeypatch, 0)
            assert "does not fit: 64 of 100 MiB are given away" in await site.refused("save", name="mine")
            assert site.program.orders == 2 * ["freeze", "thaw"]
            assert await site.busy() == []

    node = make_node(base / "node", images={"overlays_max": "100M"})
    with mounted(base / "small", "ext4", mebibytes=40) as small:
        run(work(small))
    assert pool_of(node).revisions("mine") == [] and node.left() == []


@pytest.mark.parametrize("to_file", [False, True])
def test_an_agent_that_is_killed_meanwhile(
    node: Node, user: User, image: Image, monkeypatch: pytest.MonkeyPatch, to_file: bool
) -> None:
    read_end, write_end = os.pipe()
    wanted = {"file": f"{user.home}/saved"} if to_file else {"name": "mine"}
    be_caller(monkeypatch, user.uid if to_file else 0)

    async def work() -> None:
        async with GuestSite(node, user, image, writes=WRITES) as site:
            begun = site.slow_down(monkeypatch)
            saving = asyncio.ensure_future(site.order("save", **wanted))
            await begun.wait()
            os.write(write_end, f"{site.qemu.pid} {site.place.folder}\n".encode())
            await saving

    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(work())
        finally:
            os._exit(1)
    os.close(write_end)
    qemu, folder = os.read(read_end, 4096).decode().split()
    os.close(read_end)
    home = Path(user.home)
    assert left_by_guests(node) == [], "the copy has no name"
    assert len(list(home.glob(".vtorque-*.part"))) == to_file
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert wait_gone(int(qemu))
    (place,) = record.places(node.config.paths)
    assert str(place.folder) == folder and undo(place) == [] and node.left() == []
    assert [path.name for path in home.iterdir()] == ["workspace"] and pool_of(node).revisions("mine") == []


def test_an_agent_that_is_killed_while_it_writes_to_the_pool(
    node: Node, user: User, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, write_end = os.pipe()

    async def work() -> None:
        async with GuestSite(node, user, image, writes=WRITES) as site:
            link = await site.link()
            async for answer in link.order("save", name="mine"):
                if answer["doing"] == "checking it":
                    os.write(write_end, str(site.qemu.pid).encode())

    pid = os.fork()
    if pid == 0:
        try:
            monkeypatch.setattr("vmgr.node.orders.publishing.check", lambda *_, **__: time.sleep(3600))
            asyncio.run(work())
        finally:
            os._exit(1)
    os.close(write_end)
    qemu = int(os.read(read_end, 4096))
    os.close(read_end)
    (place,) = record.places(node.config.paths)
    stagers = [int(step["pid"]) for step in record.steps(place) if step.get("role") == "stager"]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert all(wait_gone(each) for each in (qemu, *stagers))
    assert undo(place) == [] and node.left() == [] and pool_of(node).revisions("mine") == []

    async def again() -> None:
        async with GuestSite(node, user, image, writes=WRITES) as site:
            assert (await site.order("save", name="mine"))[-1] == {"image": "mine@1"}

    run(again())
    assert not list(pool_of(node).path.rglob(".tmp-*")), "what was left in the pool goes with the next change to it"
