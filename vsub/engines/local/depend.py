"""`-W depend=…`: jobs that start when others have started or ended.

Facts: lib/Libcmds/parse_depend.c and server/req_register.c of TORQUE 6.1.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from typing import Optional

Dependency = tuple[str, str]
"""Its type and the id of the job that it waits for."""

TYPES = ("after", "afterok", "afternotok", "afterany")
REFUSED = frozenset(
    ["on", "synccount", "syncwith", "before", "beforeok", "beforenotok", "beforeany"]
    + [f"{when}{what}array" for when in ("after", "before") for what in ("start", "ok", "notok", "any")]
)
"""What TORQUE knows as well."""
MAX_DEPENDENCIES = 256

_JOB = re.compile(r"\d{1,15}(?:\[\d{0,5}\])?(?:\.[A-Za-z0-9._-]{1,255})?", re.ASCII)


class Outcome(enum.Enum):
    """Whether a dependency lets its job start."""

    OPEN = "open"
    MET = "met"
    NEVER = "never"


def parse(text: str) -> tuple[Dependency, ...]:
    """Read `TYPE:JOB[:JOB…][,TYPE:…]`. Raises ValueError, with text when a type of TORQUE's is not supported."""
    found: list[Dependency] = []
    for part in text.split(","):
        kind, *jobs = part.strip().split(":")
        if kind in REFUSED:
            raise ValueError(f"{kind} is not supported by the embedded batch system, only {', '.join(TYPES)}")
        if kind not in TYPES or not jobs or not all(_JOB.fullmatch(job) for job in jobs):
            raise ValueError
        found.extend((kind, job) for job in jobs)
    if len(found) > MAX_DEPENDENCIES:
        raise ValueError(f"more than {MAX_DEPENDENCIES} jobs")
    return tuple(dict.fromkeys(found))


def shown(dependencies: Iterable[Dependency]) -> str:
    """The attribute `depend` as qstat shows it: one list of jobs for each type."""
    jobs: dict[str, list[str]] = {}
    for kind, job in dependencies:
        jobs.setdefault(kind, [kind]).append(job)
    return ",".join(":".join(words) for words in jobs.values())


def outcome(kind: str, *, started: bool, exit_status: Optional[int]) -> Outcome:
    """What a dependency of this type makes of another job: has it started, how did it end (None: it has not).

    A job that is deleted before it started has not started and has a status that is not 0.
    """
    if kind == "after":
        if started:
            return Outcome.MET
        return Outcome.OPEN if exit_status is None else Outcome.NEVER
    if exit_status is None:
        return Outcome.OPEN
    good = {"afterok": exit_status == 0, "afternotok": exit_status != 0, "afterany": True}[kind]
    return Outcome.MET if good else Outcome.NEVER
