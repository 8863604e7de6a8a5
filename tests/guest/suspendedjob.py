"""A job that has been suspended: its guests booted and stored, and nothing of an agent."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Optional

from guestmachine import BOOT_TIMEOUT_S
from nodejob import Jobs

from vmgr.jobspec import SpecPath
from vmgr.node import record
from vmgr.node.allocation import find
from vmgr.node.boot import boot
from vmgr.node.checkedjob import Call, checked_job
from vmgr.node.crew import Crew
from vmgr.node.guestjob import Job
from vmgr.node.hookargs import place_name
from vmgr.node.state import Progress
from vmgr.node.suspending import NodeGuests
from vmgr.node.undo import undo
from vmgr.node.user import User, look_up
from vmgr.suspended.entry import Entry, NodePart, dump_entry, dump_part
from vmgr.suspended.store import Store

KEY = "f" * 16
"""Stands for the attempt that was suspended: those of a test's own process all look like one."""


class Suspended(NamedTuple):
    """What lies in the store, and the job directory that it belongs to."""

    path: SpecPath
    folder: Path
    entry: Entry
    part: NodePart

    def write(self, entry: Optional[Entry] = None, part: Optional[NodePart] = None) -> None:
        """Write the entry as it is, or another one in its place."""
        (self.folder / "job.json").write_bytes(dump_entry(entry or self.entry))
        (self.folder / "node.0.json").write_bytes(dump_part(part or self.part))


def ssh(jobs: Jobs, path: SpecPath, port: int, host_key: str, command: str) -> str:
    """What a command prints in the guest."""
    known = jobs.node.base / "known_hosts"
    known.write_text(f"[127.0.0.1]:{port} {' '.join(host_key.split()[:2])}\n")
    key = jobs.node.base / "key"
    key.write_bytes(Path(path.directory, "key").read_bytes())
    key.chmod(0o600)
    words = [
        "ssh",
        "-F", "none",
        "-T",
        "-i", str(key),
        "-p", str(port),
        "-o", "BatchMode=yes",
        "-o", "IdentitiesOnly=yes",
        "-o", "StrictHostKeyChecking=yes",
        "-o", f"UserKnownHostsFile={known}",
        f"{jobs.owner.pw_name}@127.0.0.1",
        command,
    ]  # fmt: skip
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BOOT_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done
    return done.stdout


def suspend(jobs: Jobs, path: SpecPath, begin: str, job_id: str = "12.host") -> Suspended:
    """Boot the job's guests on one node, run the command `begin` in the first, and store them."""
    return asyncio.run(_suspend(jobs, path, begin, job_id))


async def _suspend(jobs: Jobs, path: SpecPath, begin: str, job_id: str) -> Suspended:
    node, user = jobs.node, look_up(jobs.owner.pw_name)
    place = record.new_place(node.config.paths, job_id)
    lock, listener = record.create(place, {"job_id": job_id, "user": user.name})
    call = Call(job_id, user.name, path, 0, "batch")
    allocation = await find(None, None, 0, place.attempt, timeout_s=10)
    job, held = await checked_job(call, node.config, place, user, allocation)
    crew = await boot(job, node.config, node.base / "templates", Progress(place.start, {}), lambda _: None)
    try:
        await asyncio.gather(*(guest.ready(BOOT_TIMEOUT_S) for guest in crew.guests))
        port, *_ = await crew.open_ssh()
        await asyncio.get_running_loop().run_in_executor(
            None, lambda: ssh(jobs, path, port, crew.host_key.public, begin)
        )
        return await _store(jobs, path, job, crew)
    finally:
        await crew.kill()
        if held is not None:
            os.close(held)
        os.close(lock)
        listener.close()
        assert undo(place) == []


async def _store(jobs: Jobs, path: SpecPath, job: Job, crew: Crew) -> Suspended:
    store = Store(jobs.node.config, job.user, job.place)
    guests = NodeGuests(job, crew, store, save_s=BOOT_TIMEOUT_S)
    await store.begin(job.job_id, need_bytes=await guests.check())
    await guests.stop(lambda _text: None)
    await guests.save(lambda _text: None)
    entry = Entry(
        job.job_id, job.user.name, path.sha256, job.image.reference, KEY, 1, len(crew.guests), int(time.time()), 1
    )  # fmt: skip
    await store.complete(job.job_id, entry)
    found = await store.find(job.job_id)
    assert found is not None and found[0] == entry
    folder = Path(str(jobs.node.config.suspended.folder), job.user.name, place_name(job.job_id))
    return Suspended(path, folder, entry, found[1][0])


def give(user: User, *paths: Path) -> None:
    for path in paths:
        os.chown(path, user.uid, user.gid)
        path.chmod(0o700 if path.is_dir() else 0o600)


def left_in(folder: Path) -> Iterable[str]:
    """The names of the entries in a user's part of the store."""
    return sorted(path.name for path in folder.parent.iterdir())
