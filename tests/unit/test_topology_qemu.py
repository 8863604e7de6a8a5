"""QEMU takes the layouts of plans as they are: vCPUs in the places, cells and sizes that the plan says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
from placements import GIB, machine, uniform, whole

from vmgr.topology.model import Layout, Topology
from vmgr.topology.plan import Ask, plan

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86_64")

SMT = machine(4, 4, 4, 4, threads=2, per_package=2, memory=(512, 512, 2 * GIB, 2 * GIB))
FAR = SMT._replace(distances={(one, other): 10 if one == other else 255 for one, other in SMT.distances})


def command(layout: Layout, ram_mib: int) -> list[str]:
    """A machine with this layout and nothing else, that does not run (AMD models want more for threads: topoext)."""
    vcpus = layout.sockets * layout.cores * layout.threads
    arguments = [
        str(QEMU), "-S", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio",
        "-machine", "q35", "-accel", "tcg", "-cpu", "max,vendor=GenuineIntel", "-m", f"size={ram_mib}M",
        "-smp", f"cpus={vcpus},sockets={layout.sockets},cores={layout.cores},threads={layout.threads}",
    ]  # fmt: skip
    for number, cell in enumerate(layout.cells):
        cpus = "".join(f",cpus={vcpu}" for vcpu in cell.vcpus)
        arguments += [
            "-object", f"memory-backend-ram,id=m{number},size={cell.ram_mib}M",
            "-numa", f"node,nodeid={number}{cpus},memdev=m{number}",
        ]  # fmt: skip
    for one, row in enumerate(layout.distances):
        for other, distance in enumerate(row):
            arguments += ["-numa", f"dist,src={one},dst={other},val={distance}"]
    return arguments


def asked(layout: Layout, ram_mib: int) -> tuple[list[dict[str, Any]], str]:
    """What QEMU says of the vCPUs, and its `info numa`."""
    commands = (
        {"execute": "qmp_capabilities"},
        {"execute": "query-cpus-fast"},
        {"execute": "human-monitor-command", "arguments": {"command-line": "info numa"}},
        {"execute": "quit"},
    )
    done = subprocess.run(
        command(layout, ram_mib),
        input="".join(map(json.dumps, commands)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    results = [answer["return"] for answer in answers if "return" in answer]
    return results[1], results[2]


@pytest.mark.parametrize(
    ("topology", "ask"),
    [
        (SMT, Ask(1, 1, 257)),
        (SMT, Ask(1, 3, 512)),
        (SMT, Ask(1, 10, 1025)),  # two cells, uneven
        (SMT, Ask(1, 16, GIB)),
        (FAR, Ask(1, 32, 3 * GIB)),  # two sockets of two cells each, siblings
        (SMT, Ask(2, 16, GIB)),
        (machine(1, 1, memory=(256, GIB)), Ask(1, 1, GIB)),
        (machine(1, 1, memory=(256, GIB)), Ask(1, 1, GIB + 128)),  # a cell without vCPUs
        (machine(2, 1), Ask(1, 3, 513)),
        (uniform(4, 4, threads=2), Ask(1, 16, 512)),
    ],
)
def test_a_guest_starts_with_the_layout_of_its_plan(topology: Topology, ask: Ask) -> None:
    for guest in plan(topology, whole(topology), ask).guests:
        layout = guest.layout
        cpus, numa = asked(layout, ask.ram_mib)
        assert len(cpus) == ask.vcpus
        cells = {vcpu: number for number, cell in enumerate(layout.cells) for vcpu in cell.vcpus}
        for cpu in cpus:
            vcpu, props = cpu["cpu-index"], cpu["props"]
            core, thread = divmod(vcpu, layout.threads)
            socket, core = divmod(core, layout.cores)
            assert (props["socket-id"], props["core-id"], props["thread-id"]) == (socket, core, thread)
            assert props["node-id"] == cells[vcpu]
        sizes = [int(size) for size in re.findall(r"node \d+ size: (\d+) MB", numa)]
        assert sizes == [cell.ram_mib for cell in layout.cells]
