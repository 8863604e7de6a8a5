"""Which batch system the node side works with: the only place where it asks, so that nothing else has to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from vmgr.node.hookcall import GroupPath, HookCall, OwnJob

if TYPE_CHECKING:
    from vmgr.node.jobgroup import JobGroup
    from vmgr.node.record import Place

_MODULES = {"torque": "hookargs", "local": "hookargs", "slurm": "slurmfacts"}


class Facts(Protocol):
    """What a batch system tells its hooks and the processes of its jobs: a module for each."""

    def parse_prologue(self, argv: Sequence[str], environ: Mapping[str, str]) -> HookCall:
        """The call of a hook that runs before a job, on each of its nodes. Raises ValueError when it is not one."""

    def parse_epilogue(self, argv: Sequence[str], environ: Mapping[str, str]) -> HookCall:
        """The call of a hook that runs after a job, on each of its nodes. Raises ValueError when it is not one."""

    def for_commands(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The variables of a hook's environment without which the batch system's commands do not find it."""

    async def guests_group(self, paths: Sequence[GroupPath], place: Place) -> JobGroup:
        """The control groups that guests go into, once the batch system has made the job's in one of `paths` each.

        What is made for that is in the record of `place`. Raises VTorqueError (VT-LAUNCH).
        """

    def leader(self) -> int:
        """The first process of the hook that the caller belongs to."""

    def own_job(self, environ: Mapping[str, str]) -> OwnJob:
        """The job that the calling process belongs to."""

    def passed(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The variables of a job's environment on its node that hold in its guest too."""


def facts(engine: str) -> Facts:
    """The facts of the batch system that the configuration names (`engine`)."""
    return cast(Facts, import_module(f"vmgr.node.{_MODULES[engine]}"))
