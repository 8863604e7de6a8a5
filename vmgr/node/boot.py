"""From a checked specification to a node's running, pinned guests: plan, stage, seed, launch, pin."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Callable, NamedTuple, Optional

from vmgr.config import Config, Mount
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image
from vmgr.jobspec import GuestGroup, Spec
from vmgr.node import process, record
from vmgr.node.accel import choose_accelerator, kvm_gid, probe_beside
from vmgr.node.allocation import Allocation
from vmgr.node.console import Console
from vmgr.node.cpus import Affinity, reserve
from vmgr.node.guest import RunningGuest
from vmgr.node.guestport import GuestPort
from vmgr.node.launch import Files, start
from vmgr.node.members import Member
from vmgr.node.qemu import GuestPlan
from vmgr.node.stage import create_overlay, reserve_overlay
from vmgr.node.state import Progress, Together
from vmgr.node.userio import User
from vmgr.trust import check_trusted

if TYPE_CHECKING:
    from vmgr.node.seed import SeedPlan

CONSOLE_LOG_BYTES = 1 << 20
QEMU_ADDRESS = "10.0.2.15"
"""What QEMU's user networking gives by DHCP."""

ConsoleLogs = Callable[[str], Optional[BinaryIO]]
"""Where the console of the guest of this name is logged, None for nowhere."""


class Job(NamedTuple):
    """What guests are booted for on this node."""

    job_id: str
    place: record.Place
    user: User
    spec: Spec
    image: Image
    allocation: Allocation
    members: tuple[Member, ...]

    @property
    def group(self) -> GuestGroup:
        return self.spec.groups[0]

    @property
    def own(self) -> list[Member]:
        """The guests of this node, by their number."""
        return [member for member in self.members if member.node == self.allocation.node_index]


class HostKey(NamedTuple):
    """The SSH key of a node's guests, in OpenSSH's formats."""

    private: str
    public: str


class Crew(NamedTuple):
    """A node's running guests, in the order of their numbers, and the host key that they share."""

    guests: tuple[RunningGuest, ...]
    host_key: HostKey

    async def kill(self) -> None:
        """End all of them at once and give everything back that they held."""
        await asyncio.gather(*(guest.kill() for guest in self.guests))


class Staged(NamedTuple):
    """What is ready for one guest before it is launched."""

    member: Member
    overlay: Optional[Path]
    affinity: Optional[Affinity]


async def boot(job: Job, config: Config, templates: Path, progress: Progress, console_logs: ConsoleLogs) -> Crew:
    """Start the guests of `job` on this node. Raises VTorqueError; what was made until then stands in the record."""
    image, place, own = job.image, job.place, job.own
    for template in templates.rglob("*"):
        check_trusted(template)
    kernel, disk = image.path("kernel"), image.path("disk") if image.disk else None
    affinities = reserve(config, place, job.spec.pinning, job.group.vcpus, len(own))
    overlays = [reserve_overlay(config, place, image, member.name) if disk else None for member in own]
    staged = [Staged(*each) for each in zip(own, overlays, affinities)]
    overlaying = asyncio.gather(*(_stage(disk, overlay, image) for overlay in overlays))
    staging = asyncio.gather(_host_key(place), overlaying, probe_beside(config, kernel))
    await asyncio.sleep(0)  # the programs start now, and run while the libraries of the seed are loaded
    import vmgr.node.seed  # noqa: F401

    host_key, _, kvm = await staging
    guests: list[RunningGuest] = []
    monitors: list[socket.socket] = []
    try:
        mounts = tuple(mount.for_home(job.user.home) for mount in config.mounts if mount.name in job.spec.mounts)
        seeds = [_write_seed(job, member, config, templates, host_key, mounts) for member in own]
        progress.stage("staged")
        together = Together(progress, len(own))
        accelerator, gid = choose_accelerator(config, kvm), kvm_gid() if kvm.works else None
        for each, seed in zip(staged, seeds):
            plan = _guest_plan(job, each.member, accelerator, mounts)
            files = Files(seed, each.overlay, disk)
            guest, qmp = start(
                config.hypervisor.qemu, plan, files, job.user, kvm_gid=gid, started=lambda pid: _note(place, pid)
            )
            log = console_logs(each.member.name)
            console = Console(guest.console, log.write if log else len, log_bytes=CONSOLE_LOG_BYTES)
            running = RunningGuest(each.member.name, guest, await GuestPort.open(guest.port), console, together.said)
            guests.append(running)
            monitors.append(qmp)
        progress.stage("launched")
        await asyncio.gather(*(
            guest.pin_and_run(qmp, each.affinity, timeout_s=config.timeouts.launch)
            for guest, qmp, each in zip(guests, monitors, staged)
        ))  # fmt: skip
    except BaseException:
        await Crew(tuple(guests), host_key).kill()
        raise
    progress.stage("pinned and running", "booting")
    return Crew(tuple(guests), host_key)


def _guest_plan(job: Job, member: Member, accelerator: str, mounts: tuple[Mount, ...]) -> GuestPlan:
    image = job.image
    return GuestPlan(
        name=f"{job.job_id}-{member.name}",
        vcpus=job.group.vcpus,
        ram_mib=job.group.ram_mib,
        accelerator=accelerator,
        kernel=image.path("kernel"),
        initrd=image.path("initrd"),
        cmdline=image.cmdline,
        disk_format=image.disk_format,
        mac=member.mac,
        mounts=mounts,
    )


def _note(place: record.Place, pid: int) -> None:
    """Write QEMU to the record. It cannot be named before it is there; until then it dies with the agent."""
    found = process.identify(pid)
    if found is not None:
        record.append(place, {"do": "process", "role": "qemu", **found._asdict()})


def _write_seed(
    job: Job, member: Member, config: Config, templates: Path, host_key: HostKey, mounts: tuple[Mount, ...]
) -> Path:
    from vmgr.node.seed import seed_files, site_hooks, write_seed

    hooks = site_hooks(config.vm_hooks, member.rank) if config.vm_hooks else {}
    seed = job.place.folder / f"seed.{member.number}.iso"
    write_seed(seed_files(_seed_plan(job, member, host_key, mounts), templates, hooks), seed)
    return seed


def _seed_plan(job: Job, member: Member, host_key: HostKey, mounts: tuple[Mount, ...]) -> SeedPlan:
    from vmgr.node.network.plan import GuestNet
    from vmgr.node.seed import SeedPlan

    group = job.group
    return SeedPlan(
        instance=f"{job.job_id}-{job.place.attempt}-{member.number}",
        hostname=member.name,
        family=job.image.family,
        user=job.user,
        ssh_public_key=job.spec.ssh_public_key,
        host_key=host_key.private,
        host_key_pub=host_key.public,
        mounts=mounts,
        network=GuestNet(member.mac),
        hosts=((QEMU_ADDRESS, member.name),),
        slots=tuple((each.name, group.vcpus) for each in job.members),
        environment={
            "DISTRO": job.image.distro,
            "VTORQUE_DISTRO": job.image.family,
            "VTORQUE_IMAGE": job.image.name,
            "VTORQUE_JOBID": job.job_id,
            "VTORQUE_NODE": job.allocation.name,
            "VTORQUE_RANK": str(member.rank),
            "VTORQUE_GUESTS": " ".join(each.name for each in job.members),
            "VTORQUE_VCPUS": str(group.vcpus),
            "VTORQUE_RAM_MIB": str(group.ram_mib),
        },
        metadata=job.spec.metadata,
    )


async def _stage(disk: Optional[Path], overlay: Optional[Path], image: Image) -> None:
    if disk is not None and overlay is not None:
        await create_overlay(disk, overlay, backing_format=image.disk_format)


async def _host_key(place: record.Place) -> HostKey:
    """A new Ed25519 key, so that no guest need make one (5 to 20 s of a guest's boot under emulation)."""
    path = place.folder / "host_key"
    child = await asyncio.create_subprocess_exec(
        "ssh-keygen", "-q",
        "-t", "ed25519",
        "-N", "",
        "-C", "vtorque",
        "-f", os.fspath(path),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    if await child.wait():
        raise VTorqueError("ssh-keygen made no host key for the guests", code=Code.STAGE)
    return HostKey(path.read_text(), path.with_name("host_key.pub").read_text().strip())
