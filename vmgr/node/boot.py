"""From a checked specification to a node's running, pinned guests: plan, stage, connect, seed, launch, pin."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Callable, NamedTuple, Optional

from vmgr.config import Config
from vmgr.logs import LOGGER
from vmgr.node import process, record
from vmgr.node.accel import Kvm, choose_accelerator, kvm_gid, probe_beside
from vmgr.node.batch import facts
from vmgr.node.console import Console
from vmgr.node.crew import Crew
from vmgr.node.guest import RunningGuest
from vmgr.node.guestjob import Job
from vmgr.node.guestport import GuestPort
from vmgr.node.jobgroup import JobGroup
from vmgr.node.keys import HostKey, make_host_key
from vmgr.node.launch import Files, Guest, start
from vmgr.node.members import Member
from vmgr.node.network.wires import Wires, connect
from vmgr.node.placing import Seats, find_seats
from vmgr.node.qemu import GuestPlan
from vmgr.node.resuming import check_accelerator
from vmgr.node.seeding import Common, certificate, write_seed_of
from vmgr.node.shares import serve_all
from vmgr.node.staging.disks import boot_files, close_disk, stage
from vmgr.node.staging.model import BootFiles, Disk, StageRequest
from vmgr.node.state import Progress, Together
from vmgr.node.waiting import every
from vmgr.node.workspace import open_workspace
from vmgr.trust import check_trusted

if TYPE_CHECKING:
    from vmgr.node.incoming import SavedState

CONSOLE_LOG_BYTES = 1 << 20
VHOST = Path("/dev/vhost-net")
ConsoleLogs = Callable[[str], Optional[BinaryIO]]
"""Where the console of the guest of this name is logged, None for nowhere."""


class Seated(NamedTuple):
    """What the node has for the guests' processes: control groups, and places among the CPUs."""

    group: JobGroup
    seats: Seats


class Staged(NamedTuple):
    """What is ready on the node before its guests are launched."""

    host_key: HostKey
    kvm: Kvm
    files: BootFiles
    disks: Sequence[Optional[Disk]]
    data: Optional[int]
    states: Sequence[Optional[SavedState]]
    seated: Seated


class Launched(NamedTuple):
    """A guest before its first instruction: stopped, with a connection to QMP."""

    guest: RunningGuest
    qmp: socket.socket
    on_tap: bool


async def boot(job: Job, config: Config, templates: Path, progress: Progress, console_logs: ConsoleLogs) -> Crew:
    """Start the guests of `job` on this node. Raises VTorqueError; what was made until then stands in the record."""
    for template in templates.rglob("*"):
        check_trusted(template)
    own, allocation = job.own, job.allocation
    nodes = allocation.nodes
    connecting = asyncio.ensure_future(connect(job.network, allocation.node_index, nodes, config, job.place))
    launched: list[Launched] = []
    with ExitStack() as opened:
        try:
            staged = await _stage(job, config, progress, opened)
            seats = staged.seated.seats
            wires = await asyncio.shield(connecting)
            launcher = _Launcher(job, config, staged, wires, progress, opened)
            seeds = launcher.write_seeds(templates)
            progress.stage("staged")
            for member, seed in zip(own, seeds):
                launched.append(await launcher.launch(member, seed, console_logs(member.name)))
                progress.reached(member.name, "launched")
            progress.stage("launched")
            if job.part is not None:
                progress.doing("reading the guests' saved memory")
            await asyncio.gather(*(
                guest.pin_and_run(qmp, placement, on_tap=on_tap, timeout_s=config.timeouts.launch)
                for (guest, qmp, on_tap), placement in zip(launched, seats.guests)
            ))  # fmt: skip
            for each in launched:
                progress.reached(each.guest.name, "started")
        except BaseException:
            await asyncio.gather(*(each.guest.kill() for each in launched), return_exceptions=True)
            await _disconnect(connecting)
            raise
    progress.stage("pinned and running", "booting")
    host_key = staged.host_key if job.part is None else HostKey("", job.part.host_key)
    layouts = tuple(seats.layout(index, job.group) for index in range(len(own)))
    return Crew(tuple(own), tuple(each.guest for each in launched), host_key, wires, layouts)


async def _disconnect(connecting: asyncio.Future[Wires]) -> None:
    """Take the network away, if it is there by now; what is left of it stands in the record."""
    connecting.cancel()
    try:
        await (await connecting).close()
    except asyncio.CancelledError:
        pass
    except Exception as err:  # what is raised is what led here
        LOGGER.warning("%s", err)


async def _stage(job: Job, config: Config, progress: Progress, opened: ExitStack) -> Staged:
    """Make what the guests need beside their seeds and network; what is opened for QEMU is closed with `opened`."""
    if job.stands_for.workspace is not None:
        undone = job.allocation.node_index == 0 and job.resumption is None
        await open_workspace(config, job.place, job.user, job.stands_for.workspace, undone=undone)
    request = StageRequest(
        config=config,
        place=job.place,
        image=job.image,
        user=job.user,
        names=[member.name for member in job.own],
        fs_type=job.spec.fs_type,
        ram_mib=job.group.ram_mib * len(job.own),
        workspace=job.stands_for.workspace,
        tell=progress.doing,
        own_disk=job.own_disk,
    )
    staging = asyncio.ensure_future(every(
        make_host_key(job.place),
        probe_beside(config, job.image.path("kernel") if job.image.kernel else None),
        boot_files(request),
        _stage_disks(request, job, opened),
        _open_data(job, config, opened),
        _open_states(job, config, opened),
        _seat(job, config, progress),
    ))  # fmt: skip
    try:
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # the programs start now, and run while the libraries of the seed are loaded
        import vmgr.node.seed  # noqa: F401

        return Staged(*await staging)
    finally:
        staging.cancel()
        await asyncio.gather(staging, return_exceptions=True)


async def _seat(job: Job, config: Config, progress: Progress) -> Seated:
    """The control groups of the guests, and then their CPUs, which may be those of such a group."""
    group = await facts(config.engine).guests_group(job.groups, job.place)
    seats = await find_seats(config, job)
    progress.private["placement"] = seats.shown
    return Seated(group, seats)


async def _stage_disks(request: StageRequest, job: Job, opened: ExitStack) -> Sequence[Optional[Disk]]:
    disks = await stage(request)
    for disk in disks:
        opened.callback(close_disk, disk)
    if job.part is not None:
        from vmgr.node.restoring import restore_disks  # few jobs go on

        await restore_disks(request, job, disks)
    return disks


async def _open_states(job: Job, config: Config, opened: ExitStack) -> Sequence[Optional[SavedState]]:
    """What the node's guests go on from; None for those that boot."""
    if job.part is None:
        return [None for _ in job.own]
    from vmgr.node.restoring import open_states  # as above

    return await open_states(job, config, opened)


async def _open_data(job: Job, config: Config, opened: ExitStack) -> Optional[int]:
    """The persistent disk, on the mother superior."""
    if job.spec.disk is None or job.allocation.node_index:
        return None
    from vmgr.node.datadisk import open_disk  # few jobs have one

    fd = await open_disk(job, config)
    opened.callback(os.close, fd)
    return fd


class _Launcher:
    """Starts the guests of a node, one after the other, all from the same things."""

    def __init__(
        self,
        job: Job,
        config: Config,
        staged: Staged,
        wires: Wires,
        progress: Progress,
        opened: ExitStack,
    ) -> None:
        self.job, self.config, self.staged, self.wires = job, config, staged, wires
        self.group, self.seats = staged.seated
        self.opened = opened
        self.together = Together(progress, len(job.own))
        self.accelerator = choose_accelerator(config, staged.kvm)
        if job.part is not None:
            check_accelerator(job.part, self.accelerator)
        self.gid = kvm_gid() if staged.kvm.works else None

    def write_seeds(self, templates: Path) -> list[Path]:
        job, host_key = self.job, self.staged.host_key
        common = Common(host_key, certificate(job, host_key), self.wires, self.config.network, self.config.software)
        return [write_seed_of(job, member, common, templates, self.config.vm_hooks) for member in job.own]

    async def launch(self, member: Member, seed: Path, log: Optional[BinaryIO]) -> Launched:
        """Start a guest's file servers and its QEMU. Raises VTorqueError (VT-LAUNCH, VT-NODE)."""
        job, index = self.job, member.number - 1
        hypervisor, placement = self.config.hypervisor, self.seats.guests[index]
        disk, tap = self.staged.disks[index], self.wires.taps[index] if self.wires.taps else None
        shares = await serve_all(
            job.mounts, job.user, job.place,
            virtiofsd=hypervisor.virtiofsd, timeout_s=self.config.timeouts.launch, group=self.group,
        )  # fmt: skip
        guest: Optional[Guest] = None
        try:
            for server in shares.running:
                if placement is not None:
                    process.pin(server.pid, placement.emulator)
            files = Files(
                seed=self._open(seed),
                overlay=disk and disk.overlay,
                backing=disk and disk.backing,
                tap=tap,
                vhost=self._open_vhost() if tap is not None and hypervisor.vhost else None,
                data=self.staged.data if member.rank == 0 else None,
                shares=shares.fds,
                parents=tuple(layer.fd for layer in disk.parents) if disk else (),
            )
            guest, qmp = start(
                hypervisor.qemu, self._plan(member, disk), files, job.user,
                kvm_gid=self.gid, group=self.group, started=self._note,
            )  # fmt: skip
            shares.let_go()
            console = Console(guest.console, log.write if log else len, log_bytes=CONSOLE_LOG_BYTES)
            port = await GuestPort.open(guest.port)
            running = RunningGuest(
                member.name, guest, port, console, self.together.said, shares, self.staged.states[index]
            )  # fmt: skip
        except BaseException:
            if guest is not None:
                await guest.kill()
                await guest.close()
            await shares.kill()
            raise
        return Launched(running, qmp, tap is not None)

    def _plan(self, member: Member, disk: Optional[Disk]) -> GuestPlan:
        job, image = self.job, self.job.image
        return GuestPlan(
            name=f"{job.job_id}-{member.name}",
            layout=self.seats.layout(member.number - 1, job.group),
            accelerator=self.accelerator,
            kernel=self.staged.files.kernel,
            initrd=self.staged.files.initrd,
            cmdline=image.cmdline,
            disk_format=disk.backing_format if disk else image.disk_format,
            parent_formats=tuple(layer.format for layer in disk.parents) if disk else (),
            mac=member.mac,
            mounts=job.mounts,
            hugepage_kib=self.config.hypervisor.hugepage_kib,
            suspendable=job.spec.suspend,
            incoming=job.part is not None,
        )

    def _note(self, pid: int) -> None:
        """Write QEMU to the record. It cannot be named before it is there; until then it dies with the agent."""
        found = process.identify(pid)
        if found is not None:
            record.append(self.job.place, {"do": "process", "role": "qemu", **found._asdict()})

    def _open(self, path: Path, flags: int = os.O_RDONLY) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        self.opened.callback(os.close, fd)
        return fd

    def _open_vhost(self) -> Optional[int]:
        """The kernel's own server of taps; where it has none QEMU serves them."""
        try:
            return self._open(VHOST, os.O_RDWR)
        except OSError:
            return None
