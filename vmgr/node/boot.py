"""From a checked specification to a node's running, pinned guests: plan, stage, connect, seed, launch, pin."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Callable, NamedTuple, Optional

from vmgr.config import Config, Mount, Network
from vmgr.errors import VTorqueError
from vmgr.images.pool import Image
from vmgr.jobspec import GuestGroup, Spec
from vmgr.logs import LOGGER
from vmgr.node import process, record
from vmgr.node.accel import choose_accelerator, kvm_gid, probe_beside
from vmgr.node.allocation import Allocation
from vmgr.node.console import Console
from vmgr.node.cpus import Affinity, reserve
from vmgr.node.guest import RunningGuest
from vmgr.node.guestport import GuestPort
from vmgr.node.keys import HostKey, certify, make_host_key
from vmgr.node.launch import Files, start
from vmgr.node.members import Member
from vmgr.node.network.plan import NetworkPlan, guest_net
from vmgr.node.network.wires import Wires, connect
from vmgr.node.qemu import GuestPlan
from vmgr.node.stage import create_overlay, reserve_overlay
from vmgr.node.state import Progress, Together
from vmgr.node.userio import User
from vmgr.trust import check_trusted

if TYPE_CHECKING:
    from vmgr.node.seed import SeedPlan

CONSOLE_LOG_BYTES = 1 << 20
MAX_VARIABLE_BYTES = 100_000
"""Linux starts no program with a variable of more than 128 KiB (execve(2), MAX_ARG_STRLEN)."""
ConsoleLogs = Callable[[str], Optional[BinaryIO]]
"""Where the console of the guest of this name is logged, None for nowhere."""


class Job(NamedTuple):
    """What guests are booted for on this node. `key` is the file of the job's key, None where no guest needs it."""

    job_id: str
    place: record.Place
    user: User
    spec: Spec
    image: Image
    allocation: Allocation
    network: NetworkPlan
    key: Optional[bytes]

    @property
    def group(self) -> GuestGroup:
        return self.spec.groups[0]

    @property
    def own(self) -> list[Member]:
        """The guests of this node, by their number."""
        return list(self.network.own(self.allocation.node_index))

    @property
    def names(self) -> list[str]:
        """The names of all guests of the job, by rank."""
        return [member.name for member in self.network.members]


class Crew(NamedTuple):
    """A node's running guests, in the order of their numbers, the host key that they share, and their network."""

    members: tuple[Member, ...]
    guests: tuple[RunningGuest, ...]
    host_key: HostKey
    wires: Wires

    async def addresses(self) -> list[str]:
        """The guests' addresses: planned, given by the site, or said by the guests while they become ready."""
        found = []
        for member, guest, lease in zip(self.members, self.guests, self.wires.addresses):
            known = member.address or (lease and lease.partition("/")[0])
            found.append(known or await guest.address())
        return found

    async def open_ssh(self) -> int:
        """Open what leads to SSH of the guests, from outside too; the port of 127.0.0.1 for the first of them.

        Raises VTorqueError (VT-NODE).
        """
        if self.guests[0].ssh_port is not None:
            return self.guests[0].ssh_port
        addresses = await self.addresses()
        ports = [await self.wires.forward(*each) for each in enumerate(addresses, start=1)]
        return ports[0]

    def ssh_ports(self) -> dict[str, int]:
        """The ports of this node that lead to SSH of guests from outside, by name of the guest."""
        return {self.members[number - 1].name: port for number, port in self.wires.ssh_ports.items()}

    async def kill(self) -> None:
        """End all of them at once and give everything back that they held; what is left stands in the record."""
        await asyncio.gather(*(guest.kill() for guest in self.guests), return_exceptions=True)
        try:
            await self.wires.close()
        except VTorqueError as err:
            LOGGER.warning("%s", err)


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
    mounts = tuple(
        mount.filled({"home": job.user.home, "user": job.user.name})
        for mount in config.mounts
        if mount.name in job.spec.mounts
    )
    affinities = reserve(config, place, job.spec.pinning, job.group.vcpus, len(own))
    overlays = [reserve_overlay(config, place, image, member.name) if disk else None for member in own]
    staged = [Staged(*each) for each in zip(own, overlays, affinities)]
    guests: list[RunningGuest] = []
    monitors: list[socket.socket] = []
    nodes = job.allocation.nodes
    connecting = asyncio.ensure_future(connect(job.network, job.allocation.node_index, nodes, config, place))
    try:
        overlaying = asyncio.gather(*(_stage(disk, overlay, image) for overlay in overlays))
        staging = asyncio.gather(make_host_key(place), overlaying, probe_beside(config, kernel))
        await asyncio.sleep(0)  # the programs start now, and run while the libraries of the seed are loaded
        import vmgr.node.seed  # noqa: F401

        host_key, _, kvm = await staging
        wires = await asyncio.shield(connecting)
        common = _Common(host_key, _certificate(job, host_key), wires, config.network, mounts)
        seeds = [_write_seed(job, member, common, templates, config.vm_hooks) for member in own]
        progress.stage("staged")
        together = Together(progress, len(own))
        accelerator, gid = choose_accelerator(config, kvm), kvm_gid() if kvm.works else None
        taps: Sequence[Optional[int]] = wires.taps or [None] * len(own)
        for each, seed, tap in zip(staged, seeds, taps):
            plan = _guest_plan(job, each.member, accelerator, mounts)
            files = Files(seed, each.overlay, disk, tap)
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
            guest.pin_and_run(qmp, each.affinity, on_tap=tap is not None, timeout_s=config.timeouts.launch)
            for guest, qmp, each, tap in zip(guests, monitors, staged, taps)
        ))  # fmt: skip
    except BaseException:
        await asyncio.gather(*(guest.kill() for guest in guests), return_exceptions=True)
        await _disconnect(connecting)
        raise
    progress.stage("pinned and running", "booting")
    return Crew(tuple(own), tuple(guests), host_key, wires)


async def _disconnect(connecting: asyncio.Future[Wires]) -> None:
    """Take the network away, if it is there by now; what is left of it stands in the record."""
    connecting.cancel()
    try:
        await (await connecting).close()
    except asyncio.CancelledError:
        pass
    except Exception as err:  # what is raised is what led here
        LOGGER.warning("%s", err)


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


class _Common(NamedTuple):
    """What the seeds of a node's guests have in common."""

    host_key: HostKey
    certificate: Optional[str]
    wires: Wires
    network: Network
    mounts: tuple[Mount, ...]


def _certificate(job: Job, host_key: HostKey) -> Optional[str]:
    if job.key is None:
        return None
    return certify(host_key, [member.name for member in job.own], job.key, job.spec.ssh_public_key)


def _write_seed(job: Job, member: Member, common: _Common, templates: Path, vm_hooks: Optional[Path]) -> Path:
    from vmgr.node.seed import seed_files, site_hooks, write_seed

    hooks = site_hooks(vm_hooks, member.rank) if vm_hooks else {}
    seed = job.place.folder / f"seed.{member.number}.iso"
    write_seed(seed_files(_seed_plan(job, member, common), templates, hooks), seed)
    return seed


def _seed_plan(job: Job, member: Member, common: _Common) -> SeedPlan:
    from vmgr.node.seed import SeedPlan

    group, wires, kind, names = job.group, common.wires, job.network.kind, " ".join(job.names)
    known = {"user": [member], "job": job.network.members, "bridge": []}[kind]
    return SeedPlan(
        instance=f"{job.job_id}-{job.place.attempt}-{member.number}",
        hostname=member.name,
        family=job.image.family,
        user=job.user,
        ssh_public_key=job.spec.ssh_public_key,
        host_key=common.host_key.private,
        host_key_pub=common.host_key.public,
        host_cert=common.certificate,
        user_key=None if job.key is None else job.key.decode("ascii", "replace"),
        mounts=common.mounts,
        network=guest_net(
            job.network,
            member,
            common.network,
            address=wires.addresses[member.number - 1],
            gateway=wires.gateways[member.number - 1],
            mtu=wires.mtu,
        ),
        hosts=tuple((each.address, each.name) for each in known if each.address is not None),
        wait_hosts=kind == "bridge",
        slots=tuple((name, group.vcpus) for name in job.names),
        environment={
            "DISTRO": job.image.distro,
            "VTORQUE_DISTRO": job.image.family,
            "VTORQUE_IMAGE": job.image.name,
            "VTORQUE_JOBID": job.job_id,
            "VTORQUE_NODE": job.allocation.name,
            "VTORQUE_RANK": str(member.rank),
            **({"VTORQUE_GUESTS": names} if len(names) <= MAX_VARIABLE_BYTES else {}),
            "VTORQUE_VCPUS": str(group.vcpus),
            "VTORQUE_RAM_MIB": str(group.ram_mib),
        },
        metadata=job.spec.metadata,
    )


async def _stage(disk: Optional[Path], overlay: Optional[Path], image: Image) -> None:
    if disk is not None and overlay is not None:
        await create_overlay(disk, overlay, backing_format=image.disk_format)
