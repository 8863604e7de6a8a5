"""The embedded batch system (engine `local`) as vsub sees it; the batch system itself is `vsub.engines.local`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

from vmgr.config import Config
from vmgr.errors import Code, Unanswered, VTorqueError
from vmgr.paths import Installation
from vsub.engines import PHASES, JobState, PlacedJob, shell_status
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

    @property
    def session_qsub(self) -> str:
        return self.qsub

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

    def nodes(self, timeout_s: float) -> tuple[str, ...]:
        """All nodes, from the daemon."""
        from vsub.engines.listing import known_nodes  # for those who look after guests, not for a submission

        return known_nodes((self._ask({"op": "nodes"}, timeout_s) or {}).get("nodes"))

    def server(self, timeout_s: float) -> str:
        """The server's name, from the daemon."""
        return str((self._ask({"op": "nodes"}, timeout_s) or {}).get("server"))

    def placed(self, job_id: Optional[str], timeout_s: float) -> tuple[PlacedJob, ...]:
        """Jobs that have nodes, from the daemon."""
        from vsub.engines.listing import placed_job  # as above

        answer = self._ask({"op": "stat", "job": job_id, "members": True}, timeout_s) or {"jobs": []}
        found = (placed_job(name, dict(attributes)) for name, attributes in answer["jobs"])
        return tuple(job for job in found if job is not None)

    def hold(self, job_id: str, timeout_s: float) -> bool:
        """Hold a job, which the daemon does."""
        return self._change("hold", job_id, timeout_s).get("new") is True

    def release(self, job_id: str, timeout_s: float) -> None:
        """Release a job, which the daemon does."""
        self._change("release", job_id, timeout_s)

    def requeue(self, job_id: str, timeout_s: float) -> None:
        """Requeue a job, which the daemon does for root."""
        self._change("rerun", job_id, timeout_s)

    def check_requeue(self, timeout_s: float) -> None:
        """Root may, and nobody else."""
        if os.geteuid() != 0:
            raise VTorqueError("the embedded batch system lets only root requeue jobs", code=Code.ACCESS)

    def _change(self, operation: str, job_id: str, timeout_s: float) -> dict[str, Any]:
        """The daemon's answer. Raises VTorqueError, Unanswered where there is none in time."""
        answer = self._ask({"op": operation, "job": job_id}, timeout_s)
        if answer is None:
            raise VTorqueError(f"job {job_id} is not known to the batch system", code=Code.ENGINE, hint="see qstat")
        return answer

    def _ask(self, message: Mapping[str, object], timeout_s: float) -> Optional[dict[str, Any]]:
        """The daemon's answer; None for a job that it does not know. Raises VTorqueError."""
        from vsub.engines.local import protocol

        try:
            return protocol.request(self._socket, message, timeout_s=timeout_s)
        except protocol.Refused as refusal:
            if refusal.code == protocol.UNKNOWN_JOB:
                return None
            if refusal.code == protocol.PERMISSION and message.get("job") and not refusal.detail:
                raise VTorqueError(f"job {message['job']} is another user's", code=Code.ACCESS) from None
            code = Code.ACCESS if refusal.code == protocol.PERMISSION else Code.ENGINE
            raise VTorqueError(f"the batch system refuses: {refusal}", code=code) from None
        except (OSError, protocol.ProtocolError) as err:
            import socket

            raise (Unanswered if isinstance(err, socket.timeout) else VTorqueError)(
                f"the batch system does not answer at {self._socket}: {err}",
                code=Code.ENGINE,
                hint="is vtorque-local started?",
            ) from None
