"""What a root hook was told of its job, whatever the batch system: each has a module that reads it."""

from __future__ import annotations

from typing import NamedTuple, Optional

from vmgr.jobspec import SpecPath


class GroupPath(NamedTuple):
    """Where a control group of a job is in a hierarchy that has one: `job`, in the batch system's own `root`.

    Both are below the mount of the hierarchy, and may have several parts.
    """

    root: str
    job: str

    @property
    def path(self) -> str:
        return f"{self.root}/{self.job}"


class HookCall(NamedTuple):
    """One call of a prologue or epilogue.

    `directory` is the job directory of a guest job, None for a job without guests. `node_index` is 0 on the mother
    superior. `queue` is None where the batch system names none.

    The nodes of the job are told in one of two ways. Either the hook knows them: then `nodes` names them, the mother
    superior first, and `key` the attempt, alike on all of them. Or the batch system writes them down: then `task_file`
    is what it writes about a job of several nodes once every sister's prologue has ended, and `node_file` (mother
    superior only) names the nodes before; None where there is none.

    `tag` tells the job from others with the same job directory, where the job's id does not: it goes into the names of
    what the agent writes there.

    `groups` are the places where the control groups of the job may be on this node.
    """

    job_id: str
    user: str
    directory: Optional[SpecPath]
    node_index: int
    queue: Optional[str]
    task_file: Optional[str] = None
    node_file: Optional[str] = None
    nodes: Optional[tuple[str, ...]] = None
    key: Optional[str] = None
    tag: Optional[str] = None
    groups: tuple[GroupPath, ...] = ()


class OwnJob(NamedTuple):
    """The job that a process belongs to, as the process itself is told.

    `member` is the index of a member of a job array. `may_come_back` says whether a job that the batch system ends by a
    signal may have to start again, so that its directory has to stay. `leads` says whether the process stands for the
    job: that of an interactive one may be started on each of its nodes. `marked` is the job as the batch system's
    commands take it, where what leads root to the job directory stands in something of the user's, who is to have that
    back; None where it does not.
    """

    job_id: str
    member: Optional[int] = None
    may_come_back: bool = False
    leads: bool = True
    marked: Optional[str] = None
