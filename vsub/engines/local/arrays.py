"""Job arrays, `-t RANGE[%LIMIT]`: which members there are, and what the array as a whole looks like.

A member is a job of its own, `ID[i].server`. The array, `ID[].server`, holds what they have in common. Facts:
server/job_array.cpp, server/array_func.c and lib/Libutils/u_misc.c of TORQUE 6.1.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from vsub.engines.local.depend import Dependency
from vsub.engines.local.job import Job, Phase
from vsub.engines.local.submission import Account, Submission

MAX_INDEX = 99999
MAX_TEXT = 4096


class Range(NamedTuple):
    """The members in their order, and how many may run at one time (None: all)."""

    indices: tuple[int, ...]
    limit: Optional[int]

    @classmethod
    def parse(cls, text: str) -> Range:
        """Read `N[-M][,…][%LIMIT]`; a single number is one member of that index. Raises ValueError.

        Bounded in what it makes: indices up to 99999, no more of them than that.
        """
        if len(text) > MAX_TEXT:
            raise ValueError(f"longer than {MAX_TEXT} characters")
        ranges, percent, limit = text.partition("%")
        if percent and not re.fullmatch(r"[1-9]\d{0,5}", limit, re.ASCII):
            raise ValueError(f"{limit!r} is not a slot limit")
        found: dict[int, None] = {}
        total = 0
        for part in re.split(r"[,\s]+", ranges.strip(", \t")):
            match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, re.ASCII)
            if match is None:
                raise ValueError(f"{part[:20]!r} is not a range")
            first, last = int(match[1]), int(match[2] or match[1])
            if first > last or last > MAX_INDEX:
                raise ValueError(f"{part} is not a range within 0-{MAX_INDEX}")
            total += last - first + 1
            if total > MAX_INDEX + 1:
                raise ValueError("too many members")
            found.update(dict.fromkeys(range(first, last + 1)))
        return cls(tuple(found), int(limit) if percent else None)


@dataclasses.dataclass
class Array:
    """What the members of one array have in common, and the members, which the record of the array does not hold."""

    id: str
    number: int
    owner: Account
    asked: Submission
    created: float
    held: bool = False
    depends: tuple[Dependency, ...] = ()
    """As of a job; each member that has not started has the same."""
    members: list[Job] = dataclasses.field(default_factory=list)

    @classmethod
    def make(
        cls,
        number: int,
        server: str,
        owner: Account,
        asked: Submission,
        created: float,
        depends: tuple[Dependency, ...] = (),
    ) -> Array:
        """A new array with new members. Raises ValueError when there can be none."""
        array = cls(f"{number}[].{server}", number, owner, asked, created, held=asked.held, depends=depends)
        array._make_members()
        return array

    def _make_members(self) -> None:
        head, _, server = self.id.partition("[].")
        self.members = [
            Job(
                f"{head}[{index}].{server}",
                self.number,
                self.owner,
                self.asked,
                self.created,
                held=self.held,
                depends=self.depends,
                index=index,
            )
            for index in Range.parse(self.asked.array or "").indices
        ]

    @property
    def complete(self) -> bool:
        """Whether all members are; the last ones, which mostly end last, are looked at first."""
        return all(job.phase is Phase.COMPLETE for job in reversed(self.members))

    @property
    def letter(self) -> str:
        """The state as qstat shows it: an array is queued, running or complete."""
        if self.complete:
            return "C"
        return "R" if any(job.letter == "R" for job in self.members) else "Q"

    @property
    def exit_status(self) -> Optional[int]:
        """How the array ended: 0 if every member did, else the status of the last that did not; None before."""
        if not self.complete:
            return None
        bad = [(job.completed or 0.0, place, job) for place, job in enumerate(self.members) if job.exit_status != 0]
        return max(bad)[2].exit_status if bad else 0

    @property
    def reason(self) -> str:
        """Why it ended so: the reason of the member whose status it has."""
        status = self.exit_status
        return next((job.reason for job in reversed(self.members) if status and job.exit_status == status), "")

    def to_json(self) -> dict[str, Any]:
        """The stored form."""
        stored = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del stored["members"]
        stored.update(owner=dataclasses.asdict(self.owner), asked=dataclasses.asdict(self.asked))
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Array:
        """Read the stored form; the members are as they were submitted. Raises KeyError, TypeError or ValueError."""
        fields = dict(stored)
        fields["owner"], fields["asked"] = Account.from_json(fields["owner"]), Submission.from_json(fields["asked"])
        fields["depends"] = tuple((kind, job) for kind, job in fields["depends"])
        array = cls(**fields)
        array._make_members()
        return array
