"""A job of the embedded batch system as a value: what was asked for, whose it is, how far it has come."""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Mapping
from typing import Any, Optional

from vsub.engines.local import resources
from vsub.engines.local.depend import Dependency
from vsub.engines.local.process import Mark
from vsub.engines.local.submission import Account, Submission


class Phase(enum.Enum):
    """How far a job is; the value is what is stored."""

    QUEUED = "queued"
    PROLOGUE = "prologue"
    RUNNING = "running"
    EPILOGUE = "epilogue"
    DELIVERY = "delivery"
    COMPLETE = "complete"

    @property
    def letter(self) -> str:
        """The state as qstat shows it."""
        letters = {"queued": "Q", "prologue": "R", "running": "R", "complete": "C"}
        return letters.get(self.value, "E")


@dataclasses.dataclass
class Job:
    """One job. Only the server and the attempt that it runs change it; every change of phase is stored."""

    id: str
    number: int
    owner: Account
    asked: Submission
    created: float
    phase: Phase = Phase.QUEUED
    exec_host: str = ""
    processors: int = 1
    cookie: str = ""
    attempts: int = 0
    requeues: int = 0
    script_started: bool = False
    session: int = 0
    started: Optional[float] = None
    used: dict[str, str] = dataclasses.field(default_factory=dict)
    exit_status: Optional[int] = None
    reason: str = ""
    completed: Optional[float] = None
    marks: list[Mark] = dataclasses.field(default_factory=list)
    held: bool = False
    """Whether its owner keeps it from starting; one that runs goes on, and waits when it is queued again."""
    rerun: bool = False
    """Whether this start is to be its end for now, and the job to be queued again."""
    depends: tuple[Dependency, ...] = ()
    """The dependencies that are not met yet."""
    index: Optional[int] = None
    """Which member of an array this is."""

    @property
    def letter(self) -> str:
        """The state as qstat shows it: held and waiting jobs are queued ones that may not start."""
        if self.phase is not Phase.QUEUED:
            return self.phase.letter
        if self.held or self.depends:
            return "H"
        return "W" if self.starts_in(time.time()) > 0 else "Q"

    def starts_in(self, now: float) -> float:
        """Seconds until `-a` lets it start; not above 0 when it may."""
        return (self.asked.execute_at or 0.0) - now

    @property
    def name(self) -> str:
        """The job's name; members of an array have their index in it."""
        return self.asked.name if self.index is None else f"{self.asked.name}-{self.index}"

    @property
    def variables(self) -> dict[str, str]:
        """The variables that travel with the job."""
        return self.asked.variables if self.index is None else {**self.asked.variables, "PBS_ARRAYID": str(self.index)}

    @property
    def array_id(self) -> Optional[str]:
        """The array that this is a member of."""
        if self.index is None:
            return None
        head, _, server = self.id.partition(f"[{self.index}].")
        return f"{head}[].{server}"

    @property
    def prefix(self) -> str:
        """What the names of the job's files begin with: its id, written without brackets."""
        return self.id.replace("[", "-", 1).replace("]", "", 1)

    def resource(self, name: str) -> Optional[str]:
        """The value of one item of the resource list."""
        return dict(self.asked.resources).get(name)

    @property
    def node_request(self) -> resources.NodeRequest:
        """What `-l nodes=` asked for; one node when it was not given."""
        return resources.NodeRequest.of(self.asked.resources)

    def resource_list(self) -> list[resources.Item]:
        """The list as the server completes it: as submitted, then what the server adds."""
        items = list(self.asked.resources)
        if self.resource("nodes") is None:
            items.append(("nodes", "1"))
        return [*items, ("neednodes", self.resource("nodes") or "1")]

    def output_name(self, stream: str) -> str:
        """Default name of an output file; `stream` is "o" or "e"."""
        member = "" if self.index is None else f"-{self.index}"
        return f"{self.asked.name}.{stream}{self.number}{member}"

    def streams(self) -> tuple[str, ...]:
        """The output files that this job has."""
        return {"oe": ("o",), "eo": ("e",)}.get(self.asked.join, ("o", "e"))

    def to_json(self) -> dict[str, Any]:
        """The stored form; what a member has in common with its array is not in it."""
        stored = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        stored["phase"] = self.phase.value
        if self.index is None:
            stored.update(owner=dataclasses.asdict(self.owner), asked=dataclasses.asdict(self.asked))
        else:
            del stored["owner"], stored["asked"]
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], array: Optional[Job] = None) -> Job:
        """Read the stored form, which only the daemon writes; `array` is a member as it was submitted.

        Raises KeyError, TypeError or ValueError.
        """
        fields = dict(stored)
        if array is None:
            owner, asked = Account.from_json(fields["owner"]), Submission.from_json(fields["asked"])
        else:
            owner, asked = array.owner, array.asked
        fields.update(owner=owner, asked=asked, phase=Phase(fields["phase"]))
        fields["marks"] = [Mark(*mark) for mark in fields["marks"]]
        fields["depends"] = tuple((kind, job) for kind, job in fields.get("depends", ()))
        return cls(**fields)
