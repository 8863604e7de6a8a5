"""The command line of a guest's QEMU, from a finished plan. Nothing here touches the system.

Options and their reasons were observed on QEMU 7.2: the process is started as the job's user with the seccomp
sandbox on, so whatever only root may open (disk, seed) comes in as a descriptor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from vmgr.config import Mount
from vmgr.topology.cpulist import show_cpus
from vmgr.topology.model import Layout
from vmgr.units import parse_count

PORT_NAME = "org.vtorque.0"
IO_THREAD = "io0"
"""The thread that serves a guest's disks."""
FIRST_PARENT_SET = 16
"""The set of descriptors (`-add-fd`) of the first disk below the overlay's backing file."""


class Descriptors(NamedTuple):
    """Numbers of the descriptors that QEMU inherits: connected sockets, opened files, and a tap.

    Without a `tap` the guest has QEMU's user networking. `vhost` is the kernel's device that serves a tap, where it is
    used. `data` is the file of a persistent disk. `shares` are the connections to the file servers of its shares, in
    their order, None for those of other kinds than virtiofs. `parents` are the disks that the backing file lies on in
    turn.
    """

    qmp: int
    port: int
    console: int
    seed: int
    overlay: Optional[int]
    backing: Optional[int]
    tap: Optional[int] = None
    vhost: Optional[int] = None
    data: Optional[int] = None
    shares: tuple[Optional[int], ...] = ()
    parents: tuple[int, ...] = ()


class GuestPlan(NamedTuple):
    """One guest, planned completely. `mounts` are those of the job's user, the home put in.

    Its RAM lies in huge pages of `hugepage_kib` KiB where that is not None. `disk_format` is that of the overlay's
    backing file, `parent_formats` those of the disks below it. Without a `kernel` the firmware boots it from its own
    disk. The state of a `suspendable` guest can be read back wherever its RAM lies; an `incoming` one does not boot,
    but waits for such a state.
    """

    name: str
    layout: Layout
    accelerator: str
    kernel: Optional[Path]
    initrd: Optional[Path]
    cmdline: str
    disk_format: str
    mac: str
    mounts: tuple[Mount, ...]
    hugepage_kib: Optional[int] = None
    parent_formats: tuple[str, ...] = ()
    suspendable: bool = False
    incoming: bool = False

    @property
    def shares_memory(self) -> bool:
        """Whether file servers beside QEMU reach the guest's memory."""
        return any(mount.kind == "virtiofs" for mount in self.mounts)


def command_line(qemu: str, plan: GuestPlan, fds: Descriptors) -> list[str]:
    """The argument vector for `plan`. The guest is started stopped, to be pinned before its first instruction."""
    return [
        qemu,
        "-name", f"guest={plan.name},debug-threads=on",
        "-nodefaults", "-no-user-config",
        "-display", "none",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        *_accelerator(plan),
        *_processors(plan.layout),
        *_memory(plan),
        "-no-reboot",
        "-S",
        *(["-incoming", "defer"] if plan.incoming else []),
        "-chardev", f"socket,id=qmp,fd={fds.qmp}",
        "-mon", "chardev=qmp,mode=control",
        "-chardev", f"socket,id=console,fd={fds.console}",
        "-serial", "chardev:console",
        "-device", "virtio-serial-pci,id=ports",
        "-chardev", f"socket,id=port,fd={fds.port}",
        "-device", f"virtserialport,bus=ports.0,chardev=port,name={PORT_NAME}",
        "-object", "rng-random,id=entropy,filename=/dev/urandom",
        "-device", "virtio-rng-pci,rng=entropy",
        *_kernel(plan),
        *_disks(plan, fds),
        *_network(plan, fds),
        *share_arguments(plan.mounts, fds.shares),
    ]  # fmt: skip


def _kernel(plan: GuestPlan) -> list[str]:
    if plan.kernel is None:
        return []
    initrd = [] if plan.initrd is None else ["-initrd", str(plan.initrd)]
    return ["-kernel", str(plan.kernel), *initrd, "-append", plan.cmdline]


def _accelerator(plan: GuestPlan) -> list[str]:
    if plan.accelerator == "kvm":
        # without it an AMD processor shows no threads; others say that they have no such feature, and go on
        return ["-accel", "kvm", "-cpu", "host,topoext=on" if plan.layout.threads > 1 else "host"]
    return ["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]


def _processors(layout: Layout) -> list[str]:
    shape = f"sockets={layout.sockets},cores={layout.cores},threads={layout.threads}"
    return ["-smp", f"cpus={layout.vcpus},{shape}"]


def _memory(plan: GuestPlan) -> list[str]:
    """The machine and its RAM, on the node's NUMA nodes as planned; the guest has NUMA nodes where it has several.

    Memory that another process serves (virtiofs), and memory in huge pages, is a memfd: that needs no hugetlbfs. That
    of a suspendable guest is always an object: by its name a saved state knows it, wherever it is bound.
    """
    machine, layout = "q35,usb=off,vmport=off,dump-guest-core=off", plan.layout
    size = ["-m", f"size={layout.ram_mib}M"]
    if (
        len(layout.cells) == 1
        and layout.cells[0].host_node is None
        and not plan.shares_memory
        and plan.hugepage_kib is None
        and not plan.suspendable
    ):
        return ["-machine", machine, *size]
    kind = "memory-backend-memfd,share=on" if plan.shares_memory or plan.hugepage_kib else "memory-backend-ram"
    huge = "" if plan.hugepage_kib is None else f",hugetlb=on,hugetlbsize={plan.hugepage_kib}K,prealloc=on"
    objects, nodes = [], []
    for number, cell in enumerate(layout.cells):
        bound = "" if cell.host_node is None else f",host-nodes={cell.host_node},policy=bind"
        objects += ["-object", f"{kind},id=ram{number},size={cell.ram_mib}M{huge}{bound}"]
        cpus = "".join(f",cpus={part}" for part in show_cpus(cell.vcpus).split(",")) if cell.vcpus else ""
        nodes += ["-numa", f"node,nodeid={number},memdev=ram{number}{cpus}"]
    if len(layout.cells) == 1:
        return ["-machine", f"{machine},memory-backend=ram0", *size, *objects]
    for source, row in enumerate(layout.distances):
        nodes += [
            word
            for target, distance in enumerate(row)
            for word in ("-numa", f"dist,src={source},dst={target},val={distance}")
        ]
    return ["-machine", machine, *size, *objects, *nodes]


def _disks(plan: GuestPlan, fds: Descriptors) -> list[str]:
    arguments = ["-add-fd", f"set=1,fd={fds.seed}"]
    if fds.overlay is not None or fds.data is not None:
        arguments += ["-object", f"iothread,id={IO_THREAD}"]
    if fds.overlay is not None and fds.backing is not None:
        first = ",bootindex=0" if plan.kernel is None else ""
        arguments += [
            "-add-fd", f"set=2,fd={fds.overlay}",
            *_backing(fds.backing, plan.disk_format, tuple(zip(fds.parents, plan.parent_formats))),
            "-blockdev", "driver=file,node-name=overlay-file,filename=/dev/fdset/2",
            "-blockdev", "driver=qcow2,node-name=overlay,file=overlay-file,backing=backing,discard=unmap",
            "-device", f"virtio-blk-pci,drive=overlay,serial=vtorque-root,werror=report,iothread={IO_THREAD}{first}",
        ]  # fmt: skip
    if fds.data is not None:
        arguments += [
            "-add-fd", f"set=4,fd={fds.data}",
            "-blockdev", "driver=file,node-name=data-file,filename=/dev/fdset/4,locking=off",
            "-blockdev", "driver=raw,node-name=data,file=data-file,discard=unmap",
            "-device", f"virtio-blk-pci,drive=data,serial=vtorque-data,werror=report,iothread={IO_THREAD}",
        ]  # fmt: skip
    return [
        *arguments,
        "-blockdev", "driver=file,node-name=seed-file,filename=/dev/fdset/1,read-only=on",
        "-blockdev", "driver=raw,node-name=seed,file=seed-file,read-only=on",
        "-device", "virtio-blk-pci,drive=seed,serial=vtorque-seed",
    ]  # fmt: skip


def _backing(backing: int, disk_format: str, parents: Sequence[tuple[int, str]]) -> list[str]:
    """The node `backing` that the overlay lies on, and below it those of its parents, the last of which stands alone.

    No header says what a disk lies on: the chain is the one spelled out here.
    """
    layers = [(3, "backing", backing, disk_format)]
    layers += [(FIRST_PARENT_SET + number, f"parent{number}", *each) for number, each in enumerate(parents)]
    arguments, below = [], ""
    for number, node, fd, kind in reversed(layers):
        arguments += [
            "-add-fd", f"set={number},fd={fd}",
            "-blockdev", f"driver=file,node-name={node}-file,filename=/dev/fdset/{number},read-only=on",
            "-blockdev", f"driver={kind},node-name={node},file={node}-file,read-only=on{below}",
        ]  # fmt: skip
        below = f",backing={node}"
    return arguments


def _network(plan: GuestPlan, fds: Descriptors) -> list[str]:
    # port 0: the kernel chooses one that is free, QEMU is asked which
    vhost = "" if fds.vhost is None else f",vhost=on,vhostfd={fds.vhost}"
    backend = "user,id=net0,hostfwd=tcp:127.0.0.1:0-:22" if fds.tap is None else f"tap,id=net0,fd={fds.tap}{vhost}"
    return [
        "-netdev", backend,
        "-device", f"virtio-net-pci,netdev=net0,mac={plan.mac},romfile=",
    ]  # fmt: skip


def share_arguments(mounts: Sequence[Mount], fds: Sequence[Optional[int]]) -> list[str]:
    """9p by QEMU itself, which runs as the user, and virtiofs by a server that does: the user's rights and no more.

    An NFS share is the guest's own matter. The queue is as long as virtiofsd takes (1024).
    """
    arguments = []
    for number, mount in enumerate(mounts):
        if mount.kind == "9p":
            source = mount.source.replace(",", ",,")
            readonly = ",readonly=on" if mount.readonly else ""
            arguments += [
                "-fsdev", f"local,id=share{number},path={source},security_model=none,multidevs=remap{readonly}",
                "-device", f"virtio-9p-pci,fsdev=share{number},mount_tag={mount.name}",
            ]  # fmt: skip
        elif mount.kind == "virtiofs":
            arguments += [
                "-chardev", f"socket,id=share{number},fd={fds[number]}",
                "-device", f"vhost-user-fs-pci,chardev=share{number},tag={mount.name},queue-size=1024",
            ]  # fmt: skip
    return arguments


def forwarded_port(usernet: str) -> Optional[int]:
    """The node's port that leads to the guest's SSH, from QEMU's `info usernet`; None when it is not there.

    The text is the user's word: only a port number is taken from it.
    """
    for line in usernet.splitlines()[:100]:
        fields = line.split()
        if len(fields) >= 6 and fields[0] == "TCP[HOST_FORWARD]" and fields[2] == "127.0.0.1" and fields[5] == "22":
            port = parse_count(fields[3])
            return port if port is not None and 1024 <= port <= 65535 else None
    return None
