"""The words by which commands name a job, one of its guests, a path in it: `JOB[:RANK][:PATH]`."""

from __future__ import annotations

import re
from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.units import parse_count

MAX_RANK = 10_000_000

_JOB = re.compile(
    r"[0-9]{1,20}(?:\[[0-9]{1,10}\]|[-_][0-9]{1,10})?(?:\.[A-Za-z0-9](?:[A-Za-z0-9._-]{0,253}[A-Za-z0-9])?)?"
)


class Target(NamedTuple):
    """A job, named as the batch system takes it (`12`, `12[3]`, `12.server`, `12_3`), and a guest of it by rank.

    `rank` is None where none is named.
    """

    job: str
    rank: Optional[int] = None

    def __str__(self) -> str:
        return self.job if self.rank is None else f"{self.job}:{self.rank}"


def parse_target(text: str) -> Target:
    """The job and the guest in `JOB[:RANK]`. Raises VTorqueError (VT-VALUE)."""
    job, colon, rank = text.partition(":")
    number = parse_count(rank) if colon else None
    if not _is_job(job) or (colon and (number is None or number > MAX_RANK)):
        raise VTorqueError(
            f"{text[:80]!r} names no guest",
            code=Code.VALUE,
            hint="JOB or JOB:RANK is needed, such as 12 or 12.server:1",
        )
    return Target(job, number)


def parse_remote_path(text: str) -> Optional[tuple[Target, str]]:
    """The guest and the path in `JOB[:RANK]:PATH`; None for what is a path of this machine.

    As with scp(1) a path with a slash before its first colon is one of this machine, and so is one that begins with
    no job's id. An empty path is the working directory, the user's home.
    """
    head, colon, rest = text.partition(":")
    if not colon or not _is_job(head):
        return None
    rank, colon, path = rest.partition(":")
    number = parse_count(rank)
    if colon and number is not None and number <= MAX_RANK:
        return Target(head, number), path
    return Target(head), rest


def _is_job(text: str) -> bool:
    return bool(_JOB.fullmatch(text)) and ".." not in text
