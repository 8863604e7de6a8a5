"""A node with one guest for tests of what is done to running guests: a real QEMU that is stopped before its first
instruction, on disks as the agent stages them, and a fake in the place of the program in the guest.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

import pytest
from nodesite import Node, a_spec

from vmgr.errors import VTorqueError
from vmgr.images.pool import Image, Pool
from vmgr.node import control, record
from vmgr.node.client import AgentLink
from vmgr.node.console import Console
from vmgr.node.control import Control, Peer
from vmgr.node.crew import Crew
from vmgr.node.guest import RunningGuest
from vmgr.node.guestjob import Job
from vmgr.node.guestport import GuestPort
from vmgr.node.jobgroup import JobGroup
from vmgr.node.launch import Files, start
from vmgr.node.members import Member
from vmgr.node.orders import orders_of
from vmgr.node.qemu import GuestPlan
from vmgr.node.shares import Shares
from vmgr.node.staging.disks import close_disk, stage
from vmgr.node.staging.model import Disk, StageRequest
from vmgr.node.state import Progress
from vmgr.node.undo import undo
from vmgr.node.user import User
from vmgr.node.workspace import JobNames
from vmgr.topology.model import Layout

SITE_POOL = Path(os.environ.get("VTORQUE_TEST_POOL", "/var/lib/vtorque/images"))
"""Where this machine has the image micro, whose kernel the guests have and never run."""
MIB = 1 << 20


def kernel() -> Path:
    if not Pool(SITE_POOL).revisions("micro"):
        pytest.skip("needs the image micro")
    return Pool(SITE_POOL).get("micro").path("kernel")


def publish(pool: Pool, name: str, disk: Path, *, disk_format: str = "qcow2", virtual_size: int) -> Image:
    """An image of a disk, booted by the kernel of micro."""
    micro = Pool(SITE_POOL).get("micro")
    with pool.staging(name) as work:
        out = work / "out"
        out.mkdir()
        disk.rename(out / disk.name)
        for part in ("kernel", "initrd"):
            (out / part).write_bytes(b"not run")
        facts = {
            **{key: getattr(micro, key) for key in ("family", "distro", "arch", "cmdline", "min_ram_mib")},
            "description": "", "disk": disk.name, "disk_format": disk_format, "virtual_size": virtual_size,
            "kernel": "kernel", "initrd": "initrd", "features": [], "packages": None, "recipe_hash": "",
        }  # fmt: skip
        return pool.publish(out, name, facts)


def chain(disk: Disk) -> tuple[str, list[int]]:
    """The disk as an option of qemu-io's and qemu-img's, and the descriptors that go with it."""
    layers = [(disk.backing, disk.backing_format), *disk.parents]
    option = f"driver=qcow2,file.driver=file,file.filename=/proc/self/fd/{disk.overlay},discard=unmap"
    prefix = ""
    for fd, kind in layers:
        prefix += "backing."
        option += (
            f",{prefix}driver={kind},{prefix}read-only=on,{prefix}file.driver=file"
            f",{prefix}file.filename=/proc/self/fd/{fd},{prefix}file.locking=off"
        )
    return option, [disk.overlay, *(fd for fd, _ in layers)]


def in_guest(disk: Disk, *commands: str) -> None:
    """Do to the disk what a guest would, in the words of qemu-io."""
    option, fds = chain(disk)
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "--image-opts", option, *words], pass_fds=fds, capture_output=True, text=True)
    assert done.returncode == 0 and "failed" not in done.stdout, done


def content(disk: Disk) -> bytes:
    """All that a guest sees on the disk."""
    option, fds = chain(disk)
    raw = os.memfd_create("raw")
    try:
        subprocess.run(
            ["qemu-img", "convert", "-U", "--image-opts", option, "-O", "raw", f"/proc/self/fd/{raw}"],
            pass_fds=[*fds, raw], check=True,
        )  # fmt: skip
        return os.pread(raw, os.fstat(raw).st_size, 0)
    finally:
        os.close(raw)


class FakeProgram:
    """What answers for the program in the guest. `orders` are those that came; `answers` has the status for each, and
    `outputs` what goes with it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.orders: list[str] = []
        self.answers: dict[str, Optional[int]] = {"freeze": 0, "thaw": 0, "quiesce": 0, "mount": 0}
        self.outputs: dict[str, str] = {}
        self.serving: Optional[asyncio.Task[None]] = None

    async def serve(self) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=self._connection)
        try:
            writer.write(b'{"v":1,"event":"ready","ssh":22}\n')
            while line := await reader.readline():
                op = json.loads(line)["op"]
                self.orders.append(op)
                if self.answers.get(op) is not None:
                    output = base64.b64encode(self.outputs.get(op, "").encode()).decode()
                    event = {"v": 1, "event": op, "status": self.answers[op], "output": output}
                    writer.write(json.dumps(event).encode() + b"\n")
        except OSError:
            pass
        finally:
            writer.close()


class GuestSite:
    """One attempt with one guest; use it as an asynchronous context manager."""

    def __init__(self, node: Node, user: User, image: Image, *, writes: Iterable[str] = ()) -> None:
        self.node, self.user, self.image = node, user, image
        self._writes = list(writes)
        self.caller = 0
        self.place = node.place()
        self._held: tuple[int, socket.socket]
        self.told: list[str] = []

    async def __aenter__(self) -> GuestSite:
        self._held = record.create(self.place, {"job_id": "12.host", "user": self.user.name})
        workspace = Path(self.user.home) / "workspace"
        if not workspace.exists():
            workspace.mkdir(0o700)
            os.chown(workspace, self.user.uid, self.user.gid)
        request = StageRequest(
            self.node.config, self.place, self.image, self.user, ["n1-1"], "overlay", 256, str(workspace),
            self.told.append,
        )  # fmt: skip
        (disk,) = await stage(request)
        if disk is not None:
            if self._writes:
                in_guest(disk, *self._writes)
            self.content = content(disk)
        member = Member("n1-1", 0, 1, 0, "02:56:00:00:00:01")
        self.crew = Crew((member,), (await self._launch(disk),), None, None)  # type: ignore[arg-type]
        close_disk(disk)
        self.job = Job(
            "12.host", self.place, self.user, a_spec(), self.image, None, None, (),  # type: ignore[arg-type]
            JobNames(self.user.home, self.user.name, "12.host", None), None,
        )  # fmt: skip
        self._control = Control(
            Progress(0, {}), self.user.uid, over=lambda: None, attached=lambda: None,
            orders=orders_of(lambda: self.crew, lambda: self.job, self.node.config, lambda err: None),
        )  # fmt: skip
        self._server = await self._control.serve(self._held[1])
        return self

    async def _launch(self, disk: Optional[Disk]) -> RunningGuest:
        seed = self.node.base / "seed"
        seed.write_bytes(bytes(1 << 16))
        plan = GuestPlan(
            name="12.host-n1-1", layout=Layout.flat(1, 256), accelerator="tcg", kernel=kernel(), initrd=seed,
            cmdline="", disk_format=disk.backing_format if disk else "qcow2", mac="02:56:00:00:00:01", mounts=(),
            parent_formats=tuple(layer.format for layer in disk.parents) if disk else (),
        )  # fmt: skip
        seed_fd = os.open(seed, os.O_RDONLY)
        files = Files(
            seed=seed_fd, overlay=disk and disk.overlay, backing=disk and disk.backing,
            parents=tuple(layer.fd for layer in disk.parents) if disk else (),
        )  # fmt: skip
        guest, qmp = start(
            self.node.config.hypervisor.qemu, plan, files, self.user, kvm_gid=None, group=JobGroup(),
            started=lambda pid: None,
        )  # fmt: skip
        os.close(seed_fd)
        guest.port.close()
        ours, theirs = socket.socketpair()
        self.program = FakeProgram(theirs)
        self.program.serving = asyncio.ensure_future(self.program.serve())
        console = Console(guest.console, len, log_bytes=0)
        running = RunningGuest(
            "n1-1", guest, await GuestPort.open(ours), console, lambda name, what, stretches: None, Shares(())
        )
        await guest.monitor.connect(qmp)
        self.qemu = guest.child
        await running.ready(10)
        return running

    @property
    def guest(self) -> RunningGuest:
        return self.crew.guests[0]

    async def __aexit__(self, *_: object) -> None:
        await self.guest.kill()
        self._server.close()
        await self._control.drain(5)
        assert self.program.serving is not None
        await asyncio.gather(self.program.serving, return_exceptions=True)
        os.close(self._held[0])
        assert undo(self.place) == []

    async def link(self) -> AgentLink:
        return await AgentLink.connect(self.place.socket)

    async def order(self, op: str, **members: Any) -> list[dict[str, Any]]:
        """The answers to an order."""
        link = await self.link()
        try:
            return [answer async for answer in link.order(op, **members)]
        finally:
            link.close()

    async def refused(self, op: str, **members: Any) -> str:
        with pytest.raises(VTorqueError) as caught:
            await self.order(op, **members)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    async def busy(self) -> list[object]:
        """What QEMU still does and has of a save (but its descriptors: those are kept until the guest runs)."""
        nodes = await self.guest.monitor.execute("query-named-block-nodes", {"flat": True})
        own = {"seed", "overlay", "backing", *(f"parent{number}" for number in range(8))}
        own |= {f"{name}-file" for name in own}
        return [
            *await self.guest.monitor.execute("query-jobs"),
            *(node["node-name"] for node in nodes if node["node-name"] not in own),
        ]

    def slow_down(self, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
        """Have copies of the disk take for ever; what this gives is set when one has begun."""
        begun, execute = asyncio.Event(), self.guest.monitor.execute

        async def slowly(command: str, arguments: Optional[Mapping[str, Any]] = None, **options: Any) -> Any:
            if command == "blockdev-backup":
                arguments = {**(arguments or {}), "speed": 1 << 16}
            result = await execute(command, arguments, **options)
            if command == "blockdev-backup":
                begun.set()
            return result

        monkeypatch.setattr(self.guest.monitor, "execute", slowly)
        return begun


def be_caller(monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    """Whoever gives an order is `uid` from now on."""
    monkeypatch.setattr(control, "_peer", lambda writer: Peer(os.getpid(), uid))
