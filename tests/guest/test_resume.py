"""A suspended job goes on in another attempt: real guests, saved by QEMU, read back by the agent's own way."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guestmachine import BOOT_TIMEOUT_S
from guestsetup import image_or_skip
from nodejob import Job, Jobs, account
from suspendedjob import Suspended, give, left_in, ssh, suspend

from vmgr.jobspec import Disk, GuestGroup
from vmgr.node.client import AgentLink
from vmgr.node.user import look_up
from vmgr.topology.model import Layout

pytestmark = [pytest.mark.guest, pytest.mark.root]

POLICY: dict[str, object] = {"ram": {"min": "192M"}, "suspend": {"enabled": True}, "disk": {"enabled": True}}
FIELDS: dict[str, Any] = {"suspend": True, "asked": ("suspend",)}
COUNTS = "cd /tmp; (i=0; while :; do i=$((i+1)); echo $i >/tmp/count; sleep 0.1; done) >/dev/null 2>&1 & sleep 1"
LOOKS = "a=$(cat /tmp/count); sleep 1; b=$(cat /tmp/count); [ $b -gt $a ] && echo goes on; echo made >~/made; hostname"


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """A node of this module's own, that stores suspended jobs."""
    if os.geteuid() != 0:
        pytest.skip("needs root: adds a user, starts hypervisors")
    image_or_skip("micro")
    with tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp") as base, account() as owner:
        folder = Path(base, "suspended")
        folder.mkdir()
        Path(base).chmod(0o755)
        folder.chmod(0o1777)
        yield Jobs(Path(base), owner, suspended={"folder": str(folder)}, policy=POLICY)


@pytest.fixture(scope="module")
def suspended(jobs: Jobs) -> Suspended:
    """A job whose guest counts. What is stored of it is gone when it has gone on, in the last test."""
    return suspend(jobs, jobs.submit("#!/bin/sh\n", **FIELDS), COUNTS)


def settled(job: Job, then: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """What the agent says when its guest goes on, or has failed; then that is looked at, and the job is over."""

    stored = Path(str(job.node.config.suspended.folder), job.owner.pw_name, "any")

    async def follow() -> dict[str, Any]:
        link = await AgentLink.open(job.node.config.paths, job.job_id)
        link.send("follow")
        try:
            while True:
                snapshot = await link.snapshot()
                assert snapshot is not None
                if snapshot["state"] == "ready":
                    assert left_in(stored) != [], "its script is not within reach yet"
                    link.send("started")
                if snapshot["state"] in ("running", "failed"):
                    await asyncio.get_running_loop().run_in_executor(None, then, snapshot)
                    return snapshot
        finally:
            link.send("end", status=0)
            link.close()

    return asyncio.run(asyncio.wait_for(follow(), BOOT_TIMEOUT_S))


async def reset(jobs: Jobs, job_id: str, rank: int) -> None:
    """Press a guest's reset button, and wait until it is ready again."""
    link = await AgentLink.open(jobs.node.config.paths, job_id)
    try:
        async for _ in link.order("power", action="reset", rank=rank, now=True, wait=True):
            pass
    finally:
        link.close()


def refused(jobs: Jobs, suspended: Suspended) -> str:
    """Why the job does not go on; what is stored of it is still there."""
    with jobs.job(suspended.path) as job:
        said = settled(job)
    assert said["state"] == "failed", said
    assert left_in(suspended.folder) == [suspended.folder.name]
    return f"{said['code']}: {said['reason']}"


def test_what_is_not_this_jobs_is_refused(jobs: Jobs, suspended: Suspended) -> None:
    entry, part = suspended.entry, suspended.part
    (guest,) = part.guests
    try:
        for changed, why in (
            (part._replace(guests=(guest._replace(mac="02:00:00:00:00:01"),)), "the MAC address of guest 0"),
            (part._replace(guests=(guest._replace(address="10.0.2.16"),)), "the address of guest 0"),
            (part._replace(guests=(guest._replace(name="vn1-2"),)), "vn1-2 is not how guest 1 of a node is called"),
            (part._replace(guests=(guest._replace(layout=Layout.flat(2, 256)),)), "has 2 vCPUs there, not 1"),
        ):
            suspended.write(part=changed)
            said = refused(jobs, suspended)
            assert said.startswith("VT-SUSPEND: what is stored of the suspended job 12.host does not fit: ")
            assert why in said and "\n" not in said
        suspended.write(part=part._replace(guests=(guest._replace(rank=1),)))
        assert refused(jobs, suspended).startswith("VT-SUSPEND: ")
        suspended.write(entry._replace(user="root"))
        assert refused(jobs, suspended).startswith("VT-SUSPEND: ")
        suspended.write(entry._replace(spec_sha256="0" * 64))
        assert "the SHA-256 of the specification there is 000" in refused(jobs, suspended)
        suspended.write(entry._replace(image="debian-12@1"))
        assert "its image is debian-12@1, and the job asks for micro" in refused(jobs, suspended)
    finally:
        suspended.write()


def test_another_hypervisor_is_told(jobs: Jobs, suspended: Suspended) -> None:
    try:
        suspended.write(part=suspended.part._replace(accelerator="kvm"))
        assert refused(jobs, suspended).startswith(
            "VT-LAUNCH: the guests were suspended under KVM, and this node has emulation"
        )
        suspended.write(part=suspended.part._replace(qemu="6.2.0 (Debian 1:6.2)"))
        assert refused(jobs, suspended).startswith(
            "VT-LAUNCH: the guests were suspended by QEMU 6.2.0 (Debian 1:6.2), and this node has "
        )
    finally:
        suspended.write()


def test_a_state_that_cannot_be_read_ends_quickly_in_one_line(jobs: Jobs, suspended: Suspended) -> None:
    """QEMU says so; the file may be anything, of any length."""
    (guest,) = suspended.part.guests
    state = suspended.folder / "0.state"
    whole = state.with_name("whole")
    state.rename(whole)
    try:
        data = whole.read_bytes()
        for hostile in (
            data[: len(data) // 2],
            data[:200],
            os.urandom(1 << 16),
            data[:100] + os.urandom(1 << 16),
            b"x",
        ):
            state.write_bytes(hostile)
            give(look_up(jobs.owner.pw_name), state)
            part = suspended.part._replace(guests=(guest._replace(state_bytes=len(hostile), state_crc32=None),))
            suspended.write(part=part)
            started = time.monotonic()
            said = refused(jobs, suspended)
            assert said.startswith("VT-LAUNCH: QEMU did not go on from the guest's saved state: "), said
            assert "load of migration failed" in said and "\n" not in said
            assert time.monotonic() - started < 60
        suspended.write()
        assert refused(jobs, suspended).startswith("VT-SUSPEND: ")  # not as long as it says
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 1  # in a page, which QEMU takes as it is
        state.write_bytes(damaged)
        give(look_up(jobs.owner.pw_name), state)
        assert f"VT-SUSPEND: the memory of {guest.name} in the suspended job 12.host is damaged" in refused(
            jobs, suspended
        )
    finally:
        state.unlink(missing_ok=True)
        whole.rename(state)
        suspended.write()


def test_a_guest_goes_on(jobs: Jobs, suspended: Suspended) -> None:
    """Its process has gone on, its shares are there, it has its name and its key, and obeys to its end."""
    (guest,) = suspended.part.guests

    def look(snapshot: dict[str, Any]) -> None:
        assert snapshot["resumed"] is True and snapshot["guests"] == [guest.name]
        assert snapshot["ssh"]["host_key"] == suspended.part.host_key
        said = ssh(jobs, suspended.path, snapshot["ssh"]["port"], suspended.part.host_key, LOOKS)
        assert said.split("\n") == ["goes on", guest.name, ""]

    with jobs.job(suspended.path) as job:
        said = settled(job, look)
    assert said["state"] == "running", said
    stages = [stage["name"] for stage in said["stages"]]
    assert stages[stages.index("pinned and running") :] == [
        "pinned and running", "resumed", "ready", "job started",
    ], stages  # fmt: skip
    assert (Path(jobs.owner.pw_dir) / "made").read_text() == "made\n"
    assert left_in(suspended.folder) == []
    log = Path(str(jobs.node.config.logging.file)).read_text()
    assert "epilogue after" in log, "it has obeyed the order to end"


@pytest.mark.slow
def test_guests_on_a_network_of_their_own_go_on(jobs: Jobs) -> None:
    """They find one another, under the names that they have had."""
    path = jobs.submit("#!/bin/sh\n", groups=(GuestGroup("micro", 2, 1, 256),), network="job", **FIELDS)
    begin = f"{COUNTS}; ssh $(sed -n 2p /run/vtorque/nodefile) {shlex.quote(COUNTS)}"
    suspended = suspend(jobs, path, begin, "14.host")
    _, second = suspended.part.guests

    def look(snapshot: dict[str, Any]) -> None:
        port = snapshot["members"][0]["port"]
        said = ssh(jobs, path, port, suspended.part.host_key, f"{LOOKS}; ssh {second.name} {shlex.quote(LOOKS)}")
        assert said.split() == ["goes", "on", snapshot["guest"], "goes", "on", second.name]
        # reset, it boots by a seed of this attempt: another host key, vouched for by the job's
        asyncio.run(reset(jobs, "14.host", 1))
        said = ssh(jobs, path, port, suspended.part.host_key, f"ssh {second.name} 'ls /tmp/count || hostname'")
        assert said.strip() == second.name

    with jobs.job(path, "14.host") as job:
        said = settled(job, look)
    assert said["state"] == "running", said
    assert left_in(suspended.folder) == []


@pytest.mark.slow
def test_a_guest_with_a_disk_goes_on(jobs: Jobs) -> None:
    """What it has written is on its overlay and its persistent disk, what it has not read yet comes from the image."""
    group = GuestGroup("debian-12", 1, 2, max(512, image_or_skip("debian-12").min_ram_mib))
    path = jobs.submit(
        "#!/bin/sh\n", groups=(group,), **{**FIELDS, "disk": Disk(None, 64), "asked": ("disk", "suspend")}
    )
    writes = "head -c 8388608 /dev/urandom >/var/tmp/written; sync; sha256sum </var/tmp/written >/var/tmp/sum"
    suspended = suspend(jobs, path, f"echo kept >/data/kept; {writes}; {COUNTS}", "13.host")
    (guest,) = suspended.part.guests
    assert guest.overlay_bytes and guest.overlay_bytes > 8 << 20

    def look(snapshot: dict[str, Any]) -> None:
        reads = "dd if=/var/tmp/written iflag=direct bs=1M status=none | sha256sum | cmp - /var/tmp/sum; cat /data/kept"
        said = ssh(
            jobs, path, snapshot["ssh"]["port"], suspended.part.host_key, f"{LOOKS}; {reads}; find /usr -type f | wc -l"
        )
        assert re.fullmatch(rf"goes on\n{guest.name}\nkept\n\d{{4,}}\n", said), said

    with jobs.job(path, "13.host") as job:
        said = settled(job, look)
    assert said["state"] == "running", said
    assert left_in(suspended.folder) == []
