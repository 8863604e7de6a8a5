"""Brings a job's output files to where the user wants them, with the user's rights and in bounded time.

Everything here runs in a child that has become the user: a home directory may hang, a destination may be a
FIFO. The files themselves are opened by root beforehand, in a directory that only root can change.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Callable, NamedTuple

from vsub.engines.local import process
from vsub.engines.local.job import Job
from vsub.engines.local.machine import Machine
from vsub.engines.local.process import Mark, Streams

log = logging.getLogger("vtorque-local")

CHUNK = 1 << 20


class Delivery(NamedTuple):
    """One output file on its way: a descriptor to read, the wanted path, and the name within a directory."""

    source: int
    path: str
    name: str
    suffix: str = ""
    """What a path that is no directory has added to it."""


def expand(path: str, variables: dict[str, str]) -> str:
    """Replace `$NAME` and `${NAME}` of the few variables that TORQUE knows in output paths."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda match: variables.get(match[1] or match[2], match[0]), path)


def destination(delivery: Delivery) -> str:
    """The file to write: the path itself, or the default name in it when it is a directory."""
    path = delivery.path  # not a Path: a trailing slash must survive
    if path.endswith("/") or os.path.isdir(path):  # noqa: PTH112
        return os.path.join(path, delivery.name)  # noqa: PTH118
    return path + delivery.suffix


def _copy(source: int, target: int) -> None:
    os.lseek(source, 0, os.SEEK_SET)
    while True:
        data = os.read(source, CHUNK)
        if not data:
            return
        view = memoryview(data)
        while view:
            view = view[os.write(target, view) :]


def _copy_new(source: int, path: Path, mode: int) -> None:
    """Copy to a file that did not exist: it appears whole or not at all."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    try:
        try:
            _copy(source, descriptor)
            os.fchmod(descriptor, mode)
        finally:
            os.close(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise


def deliver(delivery: Delivery, mode: int) -> None:
    """Copy one file; an existing destination keeps its owner and mode, as `cp` does it. Raises OSError."""
    path = Path(destination(delivery))
    try:
        seen = os.lstat(path)
    except FileNotFoundError:
        _copy_new(delivery.source, path, mode)
        return
    if stat.S_ISDIR(seen.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CREAT | os.O_NOCTTY, mode)
    try:
        _copy(delivery.source, descriptor)
    finally:
        os.close(descriptor)


def plan(job: Job, stream: str) -> Delivery:
    """Where a stream of a job goes; the descriptor is not open yet."""
    asked, name = job.asked, job.output_name(stream)
    if stream in asked.keep and asked.keep != "n":
        return Delivery(-1, f"{job.owner.home}/{job.name}.{stream}{job.number}", name)
    known = {
        "HOME": job.owner.home,
        "PBS_JOBID": job.id,
        "PBS_JOBNAME": job.name,
        "PBS_O_WORKDIR": asked.work_dir,
    }
    known.update(LOGNAME=job.owner.name, USER=job.owner.name, PBS_QUEUE=asked.queue)
    if job.index is not None:
        known["PBS_ARRAYID"] = str(job.index)
    path = expand(asked.output if stream == "o" else asked.error, known)
    return Delivery(-1, path, name, "" if job.index is None or path == os.devnull else f"-{job.index}")


def _deliver_all(deliveries: list[Delivery], umask: int) -> int:
    """In the child: deliver each; bit n of the status is set when the nth could not be."""
    os.umask(0o077)
    status = 0
    for number, delivery in enumerate(deliveries):
        try:
            deliver(delivery, 0o666 & ~umask)
        except OSError as error:
            status |= 1 << number
            process.complain(f"{delivery.path}: {error.strerror}; ")
    return status


async def send(
    machine: Machine,
    job: Job,
    timeout_s: float,
    record: Callable[[Mark], None],
    forget: Callable[[Mark], None],
) -> str:
    """Deliver the job's output; what could not be is kept in `undelivered`. Returns "" or what went wrong."""
    streams = job.streams()
    sources = [machine.layout.output_file(job.prefix, stream) for stream in streams]
    deliveries: list[Delivery] = []
    null, told = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), os.memfd_create("delivery")
    try:
        for stream, source in zip(streams, sources):
            descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            deliveries.append(plan(job, stream)._replace(source=descriptor))
        child = process.start(
            lambda: _deliver_all(deliveries, job.asked.umask),
            identity=job.owner.identity,
            streams=Streams(null, null, told),
            record=record,
            place=machine.place,
            keep=[delivery.source for delivery in deliveries],
        )
        ended = await child.wait(timeout_s)
        if ended is None:
            await process.end_session(child.mark)
            await child.wait(5)
        if child.ended:
            forget(child.mark)
        failed = ended.status if ended is not None and not ended.signal else 0xFF
        why = os.pread(told, 4096, 0).decode("utf-8", "replace").strip("; \n")
    finally:
        for descriptor in (null, told, *(delivery.source for delivery in deliveries)):
            os.close(descriptor)
    for number, source in enumerate(sources):
        if failed >> number & 1:
            source.rename(machine.layout.undelivered / source.name)
    if not failed:
        return ""
    return f"output kept in {machine.layout.undelivered}: {why or 'not delivered in time'}"
