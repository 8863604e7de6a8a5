"""QEMU's command line, word by word, and the one thing that is read from its monitor's text."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.config import Mount
from vmgr.node.qemu import Descriptors, GuestPlan, command_line, forwarded_port
from vmgr.topology.model import Cell, Layout

MOUNTS = (
    Mount("home", "9p", "/home/a,b", "/home/a,b", False),
    Mount("opt-hpc", "9p", "/opt", "/opt-hpc", True),
)
PLAN = GuestPlan(
    name="12.host-vn1-1", layout=Layout.flat(2, 512), accelerator="kvm", kernel=Path("/pool/a,b/vmlinuz"),
    initrd=Path("/pool/a,b/initrd"), cmdline="root=LABEL=root ro console=ttyS0,115200", disk_format="qcow2",
    mac="02:56:00:00:00:01", mounts=MOUNTS,
)  # fmt: skip

START = shlex.split("""\
/usr/bin/qemu -name guest=12.host-vn1-1,debug-threads=on -nodefaults -no-user-config -display none
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-accel kvm -cpu host -smp cpus=2,sockets=1,cores=2,threads=1
-machine q35,usb=off,vmport=off,dump-guest-core=off -m size=512M -no-reboot -S
-chardev socket,id=qmp,fd=11 -mon chardev=qmp,mode=control
-chardev socket,id=console,fd=13 -serial chardev:console
-device virtio-serial-pci,id=ports -chardev socket,id=port,fd=12
-device virtserialport,bus=ports.0,chardev=port,name=org.vtorque.0
-object rng-random,id=entropy,filename=/dev/urandom -device virtio-rng-pci,rng=entropy
-kernel /pool/a,b/vmlinuz -initrd /pool/a,b/initrd -append
""")
SEED = shlex.split("""\
-blockdev driver=file,node-name=seed-file,filename=/dev/fdset/1,read-only=on
-blockdev driver=raw,node-name=seed,file=seed-file,read-only=on
-device virtio-blk-pci,drive=seed,serial=vtorque-seed
-netdev user,id=net0,hostfwd=tcp:127.0.0.1:0-:22 -device virtio-net-pci,netdev=net0,mac=02:56:00:00:00:01,romfile=
""")
DISK = shlex.split("""\
-add-fd set=2,fd=15 -add-fd set=3,fd=16
-blockdev driver=file,node-name=backing-file,filename=/dev/fdset/3,read-only=on
-blockdev driver=qcow2,node-name=backing,file=backing-file,read-only=on
-blockdev driver=file,node-name=overlay-file,filename=/dev/fdset/2
-blockdev driver=qcow2,node-name=overlay,file=overlay-file,backing=backing,discard=unmap
-device virtio-blk-pci,drive=overlay,serial=vtorque-root,werror=report,iothread=io0
""")
SHARES = shlex.split("""\
-fsdev local,id=share0,path=/home/a,,b,security_model=none,multidevs=remap
-device virtio-9p-pci,fsdev=share0,mount_tag=home
-fsdev local,id=share1,path=/opt,security_model=none,multidevs=remap,readonly=on
-device virtio-9p-pci,fsdev=share1,mount_tag=opt-hpc
""")
ADD_SEED = ["-add-fd", "set=1,fd=14"]
IO_THREAD = ["-object", "iothread,id=io0"]
DATA = shlex.split("""\
-add-fd set=4,fd=17 -blockdev driver=file,node-name=data-file,filename=/dev/fdset/4,locking=off
-blockdev driver=raw,node-name=data,file=data-file,discard=unmap
-device virtio-blk-pci,drive=data,serial=vtorque-data,werror=report,iothread=io0
""")
MACHINE = "q35,usb=off,vmport=off,dump-guest-core=off"


def test_a_guest_with_a_disk() -> None:
    built = command_line("/usr/bin/qemu", PLAN, Descriptors(11, 12, 13, 14, 15, 16))
    assert built == [*START, PLAN.cmdline, *ADD_SEED, *IO_THREAD, *DISK, *SEED, *SHARES]


def test_a_guest_that_boots_from_its_own_disk() -> None:
    """Whatever else is attached, the firmware looks at that disk first."""
    plan = PLAN._replace(kernel=None, initrd=None, cmdline="")
    built = command_line("/usr/bin/qemu", plan, Descriptors(11, 12, 13, 14, 15, 16, data=17))
    assert built == [
        *START[: START.index("-kernel")], *ADD_SEED, *IO_THREAD, *DISK[:-1], f"{DISK[-1]},bootindex=0", *DATA, *SEED,
        *SHARES,
    ]  # fmt: skip
    plan = PLAN._replace(initrd=None)
    built = command_line("/usr/bin/qemu", plan, Descriptors(11, 12, 13, 14, 15, 16))
    assert "-initrd" not in built and built[built.index("-kernel") :][:4] == [
        "-kernel",
        "/pool/a,b/vmlinuz",
        "-append",
        plan.cmdline,
    ]


def test_a_disk_that_is_a_layer_on_others() -> None:
    plan = PLAN._replace(parent_formats=("qcow2", "raw"))
    built = command_line("/usr/bin/qemu", plan, Descriptors(11, 12, 13, 14, 15, 16, parents=(21, 22)))
    layers = shlex.split("""\
        -add-fd set=17,fd=22 -blockdev driver=file,node-name=parent1-file,filename=/dev/fdset/17,read-only=on
        -blockdev driver=raw,node-name=parent1,file=parent1-file,read-only=on
        -add-fd set=16,fd=21 -blockdev driver=file,node-name=parent0-file,filename=/dev/fdset/16,read-only=on
        -blockdev driver=qcow2,node-name=parent0,file=parent0-file,read-only=on,backing=parent1
        -add-fd set=3,fd=16
    """)
    at = built.index("set=2,fd=15") + 1
    assert built[at : at + len(layers)] == layers
    assert "driver=qcow2,node-name=backing,file=backing-file,read-only=on,backing=parent0" in built


def test_shares_of_each_kind_in_their_order() -> None:
    mounts = (
        Mount("home", "virtiofs", "/home/carol", "/home/carol", False),
        Mount("data", "nfs", "nfs1:/data", "/data", False, "krb5"),
        MOUNTS[1],
        Mount("apps", "virtiofs", "/apps", "/apps", True),
    )
    plan = PLAN._replace(mounts=mounts)
    built = command_line("/usr/bin/qemu", plan, Descriptors(11, 12, 13, 14, None, None, shares=(21, None, None, 22)))
    assert built[-12:] == shlex.split("""\
        -chardev socket,id=share0,fd=21
        -device vhost-user-fs-pci,chardev=share0,tag=home,queue-size=1024
        -fsdev local,id=share2,path=/opt,security_model=none,multidevs=remap,readonly=on
        -device virtio-9p-pci,fsdev=share2,mount_tag=opt-hpc
        -chardev socket,id=share3,fd=22
        -device vhost-user-fs-pci,chardev=share3,tag=apps,queue-size=1024
    """)
    assert "nfs1" not in " ".join(built)
    assert (plan.shares_memory, PLAN.shares_memory) == (True, False)


def test_a_guest_that_lives_in_its_initrd_by_emulation_and_without_shares() -> None:
    built = command_line(
        "/usr/bin/qemu", PLAN._replace(accelerator="tcg", mounts=()), Descriptors(11, 12, 13, 14, None, None)
    )
    emulated = " ".join(START).replace("-accel kvm -cpu host", "-accel tcg,thread=multi -cpu max,la57=off").split()
    assert built == [*emulated, PLAN.cmdline, *ADD_SEED, *SEED]


def memory(layout: Layout, kind: str = "9p", hugepage_kib: Optional[int] = None) -> str:
    """The part of a command line that is about machine and memory."""
    plan = PLAN._replace(layout=layout, mounts=(MOUNTS[0]._replace(kind=kind),), hugepage_kib=hugepage_kib)
    line = command_line("q", plan, Descriptors(1, 2, 3, 4, None, None, shares=(5,)))
    return " ".join(line[line.index("-machine") : line.index("-no-reboot")])


def bound(*cells: tuple[tuple[int, ...], int, int]) -> Layout:
    apart = tuple(tuple(10 if row == column else 21 for column in range(len(cells))) for row in range(len(cells)))
    vcpus = sum(len(cell[0]) for cell in cells)
    return Layout(len(cells), vcpus // len(cells), 1, tuple(Cell(*cell) for cell in cells), apart)


def test_ram_is_bound_to_the_nodes_that_are_planned() -> None:
    assert memory(Layout.flat(2, 512)) == f"-machine {MACHINE} -m size=512M"
    assert memory(bound(((0, 1), 512, 3))) == (
        f"-machine {MACHINE},memory-backend=ram0 -m size=512M "
        "-object memory-backend-ram,id=ram0,size=512M,host-nodes=3,policy=bind"
    )
    assert memory(bound(((0, 1), 512, 0), ((2, 3), 256, 3))) == (
        f"-machine {MACHINE} -m size=768M "
        "-object memory-backend-ram,id=ram0,size=512M,host-nodes=0,policy=bind "
        "-object memory-backend-ram,id=ram1,size=256M,host-nodes=3,policy=bind "
        "-numa node,nodeid=0,memdev=ram0,cpus=0-1 -numa node,nodeid=1,memdev=ram1,cpus=2-3 "
        "-numa dist,src=0,dst=0,val=10 -numa dist,src=0,dst=1,val=21 "
        "-numa dist,src=1,dst=0,val=21 -numa dist,src=1,dst=1,val=10"
    )


def test_ram_that_a_file_server_maps_or_that_lies_in_huge_pages_is_a_memfd() -> None:
    assert memory(Layout.flat(2, 512), "virtiofs") == (
        f"-machine {MACHINE},memory-backend=ram0 -m size=512M -object memory-backend-memfd,share=on,id=ram0,size=512M"
    )
    assert memory(bound(((0, 1), 512, 1)), hugepage_kib=2048) == (
        f"-machine {MACHINE},memory-backend=ram0 -m size=512M -object memory-backend-memfd,share=on,id=ram0,size=512M,"
        "hugetlb=on,hugetlbsize=2048K,prealloc=on,host-nodes=1,policy=bind"
    )


def test_a_guest_that_can_be_suspended_has_its_ram_by_the_same_name_everywhere() -> None:
    """A saved state names blocks of RAM; bound or not, they are the same."""
    flat, two = Layout.flat(2, 512), bound(((0, 1), 512, 0), ((2, 3), 256, 3))
    unbound = two._replace(cells=tuple(cell._replace(host_node=None) for cell in two.cells))
    lines = []
    for layout in (flat, bound(((0, 1), 512, 3)), unbound, two):
        line = command_line("q", PLAN._replace(layout=layout, suspendable=True), Descriptors(1, 2, 3, 4, None, None))
        lines.append(" ".join(line[line.index("-machine") : line.index("-no-reboot")]))
    assert lines[0] == (
        f"-machine {MACHINE},memory-backend=ram0 -m size=512M -object memory-backend-ram,id=ram0,size=512M"
    )
    assert lines[1] == lines[0] + ",host-nodes=3,policy=bind"
    assert lines[2].startswith(
        f"-machine {MACHINE} -m size=768M -object memory-backend-ram,id=ram0,size=512M "
        "-object memory-backend-ram,id=ram1,size=256M -numa node,nodeid=0,memdev=ram0,cpus=0-1 "
    )
    assert lines[3] == lines[2].replace("512M -object", "512M,host-nodes=0,policy=bind -object").replace(
        "256M -numa", "256M,host-nodes=3,policy=bind -numa"
    )


def test_a_guest_that_goes_on_has_the_machine_that_it_had() -> None:
    """Only that it waits for its state is different, and what it is handed over as."""
    fds = Descriptors(11, 12, 13, 14, 15, 16, data=17)
    plan = PLAN._replace(suspendable=True)
    line = command_line("q", plan, fds)
    again = command_line("q", plan._replace(incoming=True), fds)
    at = again.index("-incoming")
    assert again[at - 1 : at + 2] == ["-S", "-incoming", "defer"]
    assert [*again[:at], *again[at + 2 :]] == line


def test_threads_are_seen_on_every_processor() -> None:
    for threads, cpu in ((1, "host"), (2, "host,topoext=on")):
        layout = Layout.flat(4, 512)._replace(cores=4 // threads, threads=threads)
        line = command_line("q", PLAN._replace(layout=layout, mounts=()), Descriptors(1, 2, 3, 4, None, None))
        assert line[line.index("-cpu") + 1] == cpu


def test_a_persistent_disk_and_a_tap_that_the_kernel_serves() -> None:
    line = command_line("q", PLAN, Descriptors(11, 12, 13, 14, None, None, 18, 19, 17))
    assert line[line.index(PLAN.cmdline) + 1 :][: len(ADD_SEED) + 2 + len(DATA)] == [*ADD_SEED, *IO_THREAD, *DATA]
    assert "tap,id=net0,fd=18,vhost=on,vhostfd=19" in line


@FUZZ
@given(st.from_regex(r"(?:/[^/,\s\x00-\x1f\x7f]+){1,4}", fullmatch=True) | st.text(alphabet=",=/a", min_size=1))
def test_a_path_never_becomes_an_option(source: str) -> None:
    plan = PLAN._replace(mounts=(Mount("home", "9p", source, source, True),))
    (share,) = (
        word for word in command_line("q", plan, Descriptors(1, 2, 3, 4, None, None)) if word.startswith("local,")
    )
    # QEMU's own rule: a comma ends a value unless it is doubled
    options = share.replace(",,", "\0").split(",")
    assert [option.partition("=")[0] for option in options] == [
        "local",
        "id",
        "path",
        "security_model",
        "multidevs",
        "readonly",
    ]
    assert options[2].replace("\0", ",") == f"path={source}"


USERNET = """\
Hub -1 (net0):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[HOST_FORWARD]  19       127.0.0.1 38087       10.0.2.15    22     0     0
  UDP[236 sec]       23       10.0.2.15 47811        10.0.2.3    53     0     0
"""


def test_the_forwarded_port_of_real_text() -> None:
    assert forwarded_port(USERNET) == 38087
    assert forwarded_port(USERNET.replace("\n", "\r\n")) == 38087


@pytest.mark.parametrize(
    ("was", "becomes", "port"),
    [
        ("38087", "22", None), ("38087", "1023", None), ("38087", "1024", 1024), ("38087", "65536", None),
        ("38087", "-38087", None), ("38087", "²", None), ("38087", "0x80", None), ("38087", "9" * 5000, None),
        ("127.0.0.1", "0.0.0.0", None), ("HOST_FORWARD", "ESTABLISHED", None), ("   22 ", "   23 ", None),
        (" 38087 ", " ", None), ("TCP", "\x1b[31mTCP", None),
    ],
)  # fmt: skip
def test_other_text_has_no_port_or_a_legal_one(was: str, becomes: str, port: Optional[int]) -> None:
    assert was in USERNET
    assert forwarded_port(USERNET.replace(was, becomes)) == port


_WORDS = (
    st.sampled_from(["TCP[HOST_FORWARD]", "127.0.0.1", "22", "38087", "\n", "²", "٣", "10.0.2.15", "0"]) | st.text()
)


@FUZZ
@given(st.text() | st.lists(_WORDS).map(" ".join) | _WORDS.map(lambda word: USERNET.replace("38087", word)))
def test_hostile_text_gives_an_unprivileged_port_or_none(text: str) -> None:
    port = forwarded_port(text)
    assert port is None or 1024 <= port <= 65535


def test_much_text_costs_little() -> None:
    assert forwarded_port("x\n" * 200 + USERNET) is None
