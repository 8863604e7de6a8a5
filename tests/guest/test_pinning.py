"""The threads of a real guest's QEMU: where each may run, and where its RAM lies."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import pytest
from guestsetup import image_or_skip

from vmgr.errors import VTorqueError
from vmgr.node import process
from vmgr.node.jobgroup import JobGroup
from vmgr.node.launch import Files, pin_and_run, start
from vmgr.node.qemu import GuestPlan
from vmgr.node.user import User
from vmgr.topology.model import Cell, Layout, Placement

pytestmark = [pytest.mark.guest, pytest.mark.root]
CPUS = tuple(sorted(os.sched_getaffinity(0)))
USER = User("ada", 12345, 12346, "lovelace", "/home/ada", "/bin/sh", ())
POOL = Path("/proc/sys/vm/nr_hugepages")
FLAT = Layout.flat(2, 256)
BOUND = Layout(1, 2, 1, (Cell((0, 1), 256, 0),), ((10,),))
TWO_CELLS = Layout(2, 1, 1, (Cell((0,), 128, 0), Cell((1,), 128, 0)), ((10, 21), (21, 10)))


class Found(NamedTuple):
    """Of a guest that runs: the CPUs of each vCPU thread, those of all other threads by name, and its memory's map."""

    vcpus: dict[str, set[int]]
    others: dict[str, set[int]]
    numa_maps: str


@pytest.fixture
def files() -> Iterator[Files]:
    """An empty seed and an empty disk."""
    if os.geteuid() != 0:
        pytest.skip("needs root: starts a hypervisor as another user")
    with tempfile.NamedTemporaryFile() as stream, open(stream.name, "rb") as reader:
        stream.truncate(1 << 16)
        yield Files(reader.fileno(), data=stream.fileno())


def look(
    placement: Optional[Placement], files: Files, *, layout: Layout = FLAT, hugepage_kib: Optional[int] = None
) -> Found:
    image = image_or_skip("micro")
    plan = GuestPlan(
        name="5[1].host-g",
        layout=layout,
        accelerator="tcg",
        kernel=image.path("kernel"),
        initrd=image.path("initrd"),
        cmdline=image.cmdline,
        disk_format="raw",
        mac="52:54:00:00:00:01",
        mounts=(),
        hugepage_kib=hugepage_kib,
    )
    pids: list[int] = []

    async def work() -> Found:
        guest, qmp = start("qemu-system-x86_64", plan, files, USER, kvm_gid=None, group=JobGroup(), started=pids.append)
        try:
            await pin_and_run(guest, qmp, placement, timeout_s=60)
            tasks = {tid: Path(f"/proc/{guest.child.pid}/task/{tid}/comm") for tid in process.threads(pids[0])}
            names = {tid: comm.read_text().strip() for tid, comm in tasks.items()}
            where = {name: os.sched_getaffinity(tid) for tid, name in names.items()}
            return Found(
                {name: cpus for name, cpus in where.items() if name.startswith("CPU ")},
                {name: cpus for name, cpus in where.items() if not name.startswith("CPU ")},
                Path(f"/proc/{guest.child.pid}/numa_maps").read_text(),
            )
        finally:
            await guest.kill()
            await guest.close()
            guest.port.close()
            qmp.close()
            assert process.identify(pids[0]) is None

    return asyncio.run(work())


@pytest.mark.parametrize(
    "vcpus", [((CPUS[-1],), (CPUS[0],)), (CPUS, (CPUS[-1],)), ((CPUS[0],), (CPUS[0],))], ids=["auto", "map", "one"]
)
def test_each_thread_may_run_exactly_where_it_is_placed(vcpus: tuple[tuple[int, ...], ...], files: Files) -> None:
    emulator, io = (CPUS[-1],), (CPUS[0],)
    found = look(Placement(vcpus, emulator, io, (), FLAT), files)
    assert found.vcpus == {"CPU 0/TCG": set(vcpus[0]), "CPU 1/TCG": set(vcpus[1])}
    assert found.others.pop("IO io0") == set(io)
    assert found.others and all(cpus == set(emulator) for cpus in found.others.values()), found.others


def test_without_a_place_they_may_run_where_the_agent_may(files: Files) -> None:
    found = look(None, files)
    assert found.vcpus == {"CPU 0/TCG": set(CPUS), "CPU 1/TCG": set(CPUS)}


@pytest.mark.parametrize("layout", [BOUND, TWO_CELLS], ids=["one", "two"])
def test_ram_is_bound_to_its_node(layout: Layout, files: Files) -> None:
    assert "bind:0" not in look(None, files).numa_maps
    assert look(None, files, layout=layout).numa_maps.count("bind:0") >= len(layout.cells)


def test_ram_in_huge_pages(files: Files) -> None:
    """Real ones, set aside for this test; with too few QEMU does not start, and says so."""
    before = POOL.read_text()
    subprocess.run(["sysctl", "-qw", "vm.nr_hugepages=140"], check=True)
    try:
        if int(POOL.read_text()) < 140:
            pytest.skip("this machine has no memory in one piece for 140 huge pages")
        maps = look(None, files, layout=BOUND, hugepage_kib=2048).numa_maps
        (line,) = (line for line in maps.splitlines() if "huge" in line)
        assert "bind:0" in line and "kernelpagesize_kB=2048" in line and "N0=128" in line
        with pytest.raises(VTorqueError, match=r"QEMU did not start: exit status 1: .*memory"):
            look(None, files, layout=Layout.flat(2, 512), hugepage_kib=2048)
    finally:
        POOL.write_text(before)
        assert POOL.read_text() == before
