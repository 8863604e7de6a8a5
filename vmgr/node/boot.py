"""From a checked specification to a running, pinned guest: plan, stage, seed, launch, pin."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Optional

from vmgr.config import Config, Mount
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image
from vmgr.jobspec import Spec
from vmgr.node import process, record
from vmgr.node.accel import choose_accelerator, kvm_gid, probe_beside
from vmgr.node.console import Console
from vmgr.node.cpus import reserve
from vmgr.node.guest import RunningGuest
from vmgr.node.guestport import GuestPort
from vmgr.node.launch import Files, pin_and_run, start
from vmgr.node.qemu import GuestPlan
from vmgr.node.stage import create_overlay, reserve_overlay
from vmgr.node.state import Progress
from vmgr.node.userio import User
from vmgr.trust import check_trusted

if TYPE_CHECKING:
    from vmgr.node.seed import SeedPlan

CONSOLE_LOG_BYTES = 1 << 20
QEMU_MAC = "52:54:00:12:34:56"
"""What QEMU gives the first network device."""
QEMU_ADDRESS = "10.0.2.15"
"""What QEMU's user networking gives by DHCP."""


class Job(NamedTuple):
    """What a guest is booted for."""

    job_id: str
    place: record.Place
    user: User
    spec: Spec
    image: Image
    guest: str
    node: str


class HostKey(NamedTuple):
    """A guest's own SSH key, in OpenSSH's formats."""

    private: str
    public: str


async def boot(
    job: Job, config: Config, templates: Path, progress: Progress, console_log: Optional[BinaryIO]
) -> tuple[RunningGuest, HostKey]:
    """Start the guest of `job`. Raises VTorqueError; what was made until then stands in the record."""
    image, place = job.image, job.place
    for template in templates.rglob("*"):
        check_trusted(template)
    kernel, disk = image.path("kernel"), image.path("disk") if image.disk else None
    group = job.spec.groups[0]
    affinity = reserve(config, place, job.spec.pinning, group.vcpus)
    overlay = reserve_overlay(config, place, image, job.guest) if disk else None
    staging = asyncio.gather(_host_key(place), _stage(disk, overlay, image), probe_beside(config, kernel))
    await asyncio.sleep(0)  # the programs start now, and run while the libraries of the seed are loaded
    from vmgr.node.seed import seed_files, site_hooks, write_seed

    host_key, _, kvm = await staging
    mounts = tuple(mount.for_home(job.user.home) for mount in config.mounts if mount.name in job.spec.mounts)
    hooks = site_hooks(config.vm_hooks, rank=0) if config.vm_hooks else {}
    seed = place.folder / "seed.iso"
    write_seed(seed_files(_seed_plan(job, host_key, mounts), templates, hooks), seed)
    progress.stage("staged")
    plan = GuestPlan(
        name=f"{job.job_id}-{job.guest}",
        vcpus=group.vcpus,
        ram_mib=group.ram_mib,
        accelerator=choose_accelerator(config, kvm),
        kernel=kernel,
        initrd=image.path("initrd"),
        cmdline=image.cmdline,
        disk_format=image.disk_format,
        mounts=mounts,
    )
    guest, qmp = start(
        config.hypervisor.qemu,
        plan,
        Files(seed, overlay, disk),
        job.user,
        kvm_gid=kvm_gid() if kvm.works else None,
        started=lambda pid: _note_process(place, pid),
    )
    progress.stage("launched")
    running = RunningGuest(
        guest,
        await GuestPort.open(guest.port),
        Console(guest.console, console_log.write if console_log else len, log_bytes=CONSOLE_LOG_BYTES),
        progress,
    )
    try:
        await pin_and_run(guest, qmp, affinity, timeout_s=config.timeouts.launch)
    except BaseException:
        await running.kill()
        raise
    progress.stage("pinned and running", "booting")
    return running, host_key


def _note_process(place: record.Place, pid: int) -> None:
    """Write QEMU to the record. It cannot be named before it is there; until then it dies with the agent."""
    found = process.identify(pid)
    if found is not None:
        record.append(place, {"do": "process", "role": "qemu", **found._asdict()})


def _seed_plan(job: Job, host_key: HostKey, mounts: tuple[Mount, ...]) -> SeedPlan:
    from vmgr.node.seed import GuestNet, SeedPlan

    group = job.spec.groups[0]
    return SeedPlan(
        instance=f"{job.job_id}-{job.place.attempt}",
        hostname=job.guest,
        family=job.image.family,
        user=job.user,
        ssh_public_key=job.spec.ssh_public_key,
        host_key=host_key.private,
        host_key_pub=host_key.public,
        mounts=mounts,
        network=GuestNet(mac=QEMU_MAC),
        hosts=((QEMU_ADDRESS, job.guest),),
        slots=((job.guest, group.vcpus),),
        environment={
            "DISTRO": job.image.distro,
            "VTORQUE_DISTRO": job.image.family,
            "VTORQUE_IMAGE": job.image.name,
            "VTORQUE_JOBID": job.job_id,
            "VTORQUE_NODE": job.node,
            "VTORQUE_RANK": "0",
            "VTORQUE_GUESTS": job.guest,
            "VTORQUE_VCPUS": str(group.vcpus),
            "VTORQUE_RAM_MIB": str(group.ram_mib),
        },
        metadata=job.spec.metadata,
    )


async def _stage(disk: Optional[Path], overlay: Optional[Path], image: Image) -> None:
    if disk is not None and overlay is not None:
        await create_overlay(disk, overlay, backing_format=image.disk_format)


async def _host_key(place: record.Place) -> HostKey:
    """A new Ed25519 key for the guest, so that it need not make one (5 to 20 s of a guest's boot under emulation)."""
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
        raise VTorqueError("ssh-keygen made no host key for the guest", code=Code.STAGE)
    return HostKey(path.read_text(), path.with_name("host_key.pub").read_text().strip())
