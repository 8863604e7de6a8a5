"""The vCPU threads of a real guest: where each may run under every kind of pinning."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest
from guestsetup import image_or_skip

from vmgr.node.cpus import Affinity
from vmgr.node.launch import Files, pin_and_run, start
from vmgr.node.qemu import GuestPlan
from vmgr.node.userio import User

pytestmark = [pytest.mark.guest, pytest.mark.root]
CPUS = sorted(os.sched_getaffinity(0))
USER = User("ada", 12345, 12346, "lovelace", "/home/ada", "/bin/sh", ())


@pytest.fixture
def seed() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root: starts a hypervisor as another user")
    with tempfile.NamedTemporaryFile() as stream:
        stream.truncate(1 << 16)
        yield Path(stream.name)


def vcpu_threads(affinity: Optional[Affinity], seed: Path) -> dict[str, set[int]]:
    """Where each vCPU thread of a guest with two vCPUs may run, once the guest runs."""
    image = image_or_skip("micro")
    plan = GuestPlan(
        "5[1].host-g",
        2,
        256,
        "tcg",
        image.path("kernel"),
        image.path("initrd"),
        image.cmdline,
        "qcow2",
        "52:54:00:00:00:01",
        (),
    )

    async def work() -> dict[str, set[int]]:
        guest, qmp = start(
            "qemu-system-x86_64", plan, Files(seed, None, None), USER, kvm_gid=None, started=lambda _: None
        )
        try:
            await pin_and_run(guest, qmp, affinity, timeout_s=60)
            tasks = list(Path(f"/proc/{guest.child.pid}/task").iterdir())
            names = {int(task.name): (task / "comm").read_text().strip() for task in tasks}
            return {name: os.sched_getaffinity(tid) for tid, name in names.items() if name.startswith("CPU ")}
        finally:
            await guest.kill()
            await guest.close()
            guest.port.close()
            qmp.close()

    return asyncio.run(work())


@pytest.mark.parametrize(
    "affinity", [[{CPUS[-1]}, {CPUS[0]}], [set(CPUS), {CPUS[-1]}], [{CPUS[0]}, {CPUS[0]}]], ids=["auto", "map", "one"]
)
def test_each_thread_may_run_exactly_where_it_was_bound_to(affinity: Affinity, seed: Path) -> None:
    assert vcpu_threads(affinity, seed) == {"CPU 0/TCG": affinity[0], "CPU 1/TCG": affinity[1]}


def test_without_pinning_they_may_run_where_the_agent_may(seed: Path) -> None:
    assert vcpu_threads(None, seed) == {"CPU 0/TCG": set(CPUS), "CPU 1/TCG": set(CPUS)}
