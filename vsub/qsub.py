"""Calling `qsub` and keeping what it says."""

from __future__ import annotations

from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vsub.process import Ended, run_captured


class Submitted(NamedTuple):
    """A call of `qsub` (`argv`), how it ended, and the job directory of a guest job that it took.

    `taken` says whether the batch system has the job: a signal may come when it has.
    """

    argv: list[str]
    ended: Ended
    guest: bool
    directory: Optional[str] = None
    silent: bool = False

    @property
    def taken(self) -> bool:
        return is_taken(self.ended)

    @property
    def output(self) -> bytes:
        """What is to be printed: nothing where the user wants no id."""
        return b"" if self.silent else self.ended.output


def is_taken(ended: Ended) -> bool:
    """Whether `qsub` gave the job to the batch system."""
    return ended.status == 0 or (ended.interrupted and bool(ended.output.split()))


def run_qsub(argv: list[str], environment: Optional[dict[str, str]] = None) -> Ended:
    """Run `qsub`, in our environment or another.

    Raises VTorqueError (VT-ENGINE) if it cannot start, KeyboardInterrupt if a signal came in time.
    """
    try:
        ended = run_captured(argv, environment)
    except (OSError, ValueError) as err:
        raise VTorqueError(f"cannot run {argv[0]}: {err}", code=Code.ENGINE) from err
    if ended.interrupted and not is_taken(ended):
        raise KeyboardInterrupt
    return ended
