"""The embedded batch system (engine `local`) as vsub sees it; the batch system itself is `vsub.engines.local`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from vmgr.config import Config
from vmgr.paths import Installation
from vsub.engines import PHASES, JobState, shell_status
from vsub.engines.pbs import QsubDialect

if TYPE_CHECKING:
    import socket


class Embedded(QsubDialect):
    """The batch server of this machine, reached through its own `qsub` and its socket."""

    def __init__(self, config: Config, install: Installation) -> None:
        self._socket = config.local.socket
        self._qsub = install.local_qsub

    @property
    def qsub(self) -> str:
        return self._qsub

    def state(self, job_id: str, timeout_s: Optional[float] = None) -> JobState:
        """The state of a job, from the daemon."""
        from vsub.engines.local.client import job_state  # loaded only by a vsub that asks
        from vsub.engines.local.protocol import ProtocolError, Refused

        try:
            found = job_state(self._socket, job_id, timeout_s)
        except (OSError, ProtocolError, Refused):
            return JobState("unknown")
        if found is None:
            return JobState("gone")
        status = None if found.exit_status is None else shell_status(found.exit_status)
        return JobState(PHASES.get(found.letter, "unknown"), status)

    def check_state(self) -> None:
        """The daemon is asked when the job is there: without it, there is none."""

    def completion(self, job_id: str) -> Optional[socket.socket]:
        """The daemon's word when the job is complete and its output delivered; None when it cannot be reached."""
        from vsub.engines.local.client import completion

        try:
            return completion(self._socket, job_id)
        except OSError:
            return None

    def read_completion(self, line: bytes) -> JobState:
        """The end of a job: `{"exit_status": N|null, "reason": …}` or `{"error": number, "detail": …}`."""
        import json

        try:
            answer = json.loads(line)
        except ValueError:
            return JobState("unknown")
        if not isinstance(answer, dict):
            return JobState("unknown")
        if "error" in answer:
            return JobState("gone")
        status = answer.get("exit_status")
        return JobState("completed", shell_status(status) if type(status) is int else None)
