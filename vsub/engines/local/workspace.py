"""The files around one start of a job: script, node file, task file, output."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from vsub.engines.local import hooks
from vsub.engines.local.job import Job
from vsub.engines.local.machine import Machine
from vsub.engines.local.process import Streams
from vsub.engines.local.records import write_whole


def make(records: Path, machine: Machine, job: Job, nodes: list[str]) -> None:
    """The script, which an interactive job has not, from the server's records, and the node file. Raises OSError."""
    layout = machine.layout
    if not job.asked.interactive:
        script = layout.jobs / f"{job.prefix}.SC"
        script.unlink(missing_ok=True)
        stored = records / f"{job.array_id or job.id}.SC"
        _copy_owned(os.fspath(stored), os.fspath(script), job.owner.uid, job.owner.gid)
    node_file = hooks.node_file(machine, job)
    node_file.write_text("".join(f"{line}\n" for line in nodes), encoding="ascii")
    node_file.chmod(0o644)


def _copy_owned(source: str, target: str, uid: int, gid: int) -> None:
    """Copy the script to a file that the job's user owns and can run."""
    reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            while os.sendfile(writer, reader, None, 1 << 24) > 0:
                pass
            os.fchown(writer, uid, gid)
            os.fchmod(writer, 0o700)
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def _kept(records: Path, job: Job, stream: str) -> Path:
    """Where the server keeps the output of earlier starts while the job is on no node."""
    return records / f"{job.prefix}.{'OU' if stream == 'o' else 'ER'}"


def open_output(records: Path, machine: Machine, job: Job) -> Streams:
    """The job's output files, with what earlier starts wrote, to be added to; nothing as input. Raises OSError."""
    opened = {}
    for stream in job.streams():
        path = machine.layout.output_file(job.prefix, stream)
        with contextlib.suppress(FileNotFoundError):
            _kept(records, job, stream).rename(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.fchown(descriptor, job.owner.uid, job.owner.gid)
        opened[stream] = descriptor
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    return Streams(null, opened.get("o", opened.get("e", -1)), opened.get("e", opened.get("o", -1)))


def nowhere() -> Streams:
    """Streams of a job whose output nobody reads."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    return Streams(null, null, null)


def append_error(machine: Machine, job: Job, text: str) -> None:
    """Add a line to the job's standard error, if that is a file."""
    if job.asked.interactive:
        return
    path = machine.layout.output_file(job.prefix, job.streams()[-1])
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, text.encode("utf-8", "backslashreplace"))
    finally:
        os.close(descriptor)


def task_file(machine: Machine, job: Job) -> Path:
    """`<prefix>.JB`, what a mom knows of a job."""
    return machine.layout.jobs / f"{job.prefix}.JB"


def write_task_file(machine: Machine, job: Job) -> None:
    """Write the task file: when a single-node job's prologues are over, when those of the sisters are for others."""
    items = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in job.resource_list())
    text = (
        f'<?xml version="1.0"?>\n<job>\n<jobid>{job.id}</jobid>\n<attributes>\n'
        f"<Job_Name>{escape(job.name)}</Job_Name>\n<exec_host>{job.exec_host}</exec_host>\n"
        f"<cookie>{job.cookie}</cookie>\n<Resource_List>{items}</Resource_List>\n</attributes>\n</job>\n"
    )
    write_whole(task_file(machine, job), text.encode("utf-8", "backslashreplace"), durable=False)


def remove(records: Path, machines: Sequence[Machine], job: Job) -> None:
    """Remove everything of a job from its nodes, and the output that the server keeps. Raises OSError."""
    for path in _own_files(machines, job):
        path.unlink(missing_ok=True)
    for stream in "oe":
        machines[0].layout.output_file(job.prefix, stream).unlink(missing_ok=True)
        _kept(records, job, stream).unlink(missing_ok=True)


def leave(records: Path, machines: Sequence[Machine], job: Job) -> None:
    """Leave the nodes: the server keeps the output so far, the rest goes. Can be done again. Raises OSError."""
    for stream in job.streams():
        with contextlib.suppress(FileNotFoundError):
            machines[0].layout.output_file(job.prefix, stream).rename(_kept(records, job, stream))
    for path in _own_files(machines, job):
        path.unlink(missing_ok=True)


def _own_files(machines: Sequence[Machine], job: Job) -> list[Path]:
    """What a start makes on the job's nodes beside output, the mother superior first."""
    script = machines[0].layout.jobs / f"{job.prefix}.SC"
    return [script, hooks.node_file(machines[0], job), *(task_file(machine, job) for machine in machines)]
