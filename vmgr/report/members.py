"""Which job a member of a job array was, where it has a number of its own: noted for when the batch system forgets it.

The agent of the mother superior notes it beside the logs of jobs, by the word of the job's own wrapper: so in a file
for each array and owner, which names jobs of that owner alone. Each line is `INDEX JOB`; the last one for an index
counts.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple, Optional

from vmgr.logs import LOGGER, MEMBERS, open_for

MAX_BYTES = 1 << 22

_CLUSTER = r"[A-Za-z0-9][A-Za-z0-9._-]{0,253}"
_NAMED = re.compile(rf"([0-9]{{1,20}})(?:\[([0-9]{{1,10}})\]|[_-]([0-9]{{1,10}}))(?:\.({_CLUSTER}))?")
_WHOLE = re.compile(rf"[0-9]{{1,20}}\.{_CLUSTER}")


class Named(NamedTuple):
    """A member as a user names it: the array, its place in it (the index), the name of the cluster or none."""

    array: str
    place: str
    cluster: Optional[str] = None


def parse_named(text: object) -> Optional[Named]:
    """The member that is named so; None for what names none."""
    match = _NAMED.fullmatch(text) if isinstance(text, str) else None
    return None if match is None else Named(match[1], match[2] or match[3], match[4])


def is_whole(job_id: str) -> bool:
    """Whether this is the whole id of a job that has a number of its own."""
    return _WHOLE.fullmatch(job_id) is not None


def note(folder: Path, name: object, job_id: str, reader: int) -> None:
    """Note in the folder of the jobs' logs that the job `job_id` of the user `reader` is named so as a member."""
    named = parse_named(name)
    if named is None or not is_whole(job_id):
        return
    cluster = job_id.partition(".")[2]
    try:
        fd = open_for(_file(folder, named.array, cluster, reader), reader)
        try:
            if os.fstat(fd).st_size < MAX_BYTES:
                os.write(fd, f"{named.place} {job_id}\n".encode())
        finally:
            os.close(fd)
    except OSError as err:
        LOGGER.debug("the number of the array's member is not noted: %s", err)


def noted(folder: Path, named: Named, cluster: str, reader: Optional[int]) -> Optional[str]:
    """The whole id of a member whose agent was on this node. `reader` is the caller, None for root, who sees all."""
    files = sorted(folder.glob(f"{named.array}.{cluster}{MEMBERS}*")) if reader is None else []
    for path in files if reader is None else [_file(folder, named.array, cluster, reader)]:
        found = _last(path, named.place)
        if found is not None:
            return found
    return None


def _file(folder: Path, array: str, cluster: str, reader: int) -> Path:
    return folder / f"{array}.{cluster}{MEMBERS}{reader}"


def _last(path: Path, index: str) -> Optional[str]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as stream:
            lines = stream.read(MAX_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return None
    found = [line.partition(" ")[2] for line in lines if line.partition(" ")[0] == index]
    return found[-1] if found and is_whole(found[-1]) else None
