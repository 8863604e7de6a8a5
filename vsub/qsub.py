"""Calling `qsub` and keeping what it says."""

from __future__ import annotations

from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vsub.process import run_captured


class Submitted(NamedTuple):
    """What `qsub` gave: its exit status and its standard output, and the job directory of a job that it took."""

    status: int
    output: bytes
    directory: Optional[str]


def run_qsub(argv: list[str]) -> tuple[int, bytes]:
    """Run `qsub`; gives its exit status and standard output. Raises VTorqueError (VT-ENGINE) if it cannot start."""
    try:
        return run_captured(argv)
    except (OSError, ValueError) as err:
        raise VTorqueError(f"cannot run {argv[0]}: {err}", code=Code.ENGINE) from err
