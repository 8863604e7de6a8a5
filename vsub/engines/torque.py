"""TORQUE: the reference. Submission by its own `qsub`; the state of a job from `qstat -f`.

Facts: job states and attribute names from qstat(1B); `qstat` ends with 153 (PBSE_UNKJOBID modulo 256) for a
job that the server does not know, or not any more (`keep_completed`). `qhold` and `qrls` change the user's hold (`u`),
which a job's owner, operators and managers may; `qrerun` needs an operator or manager (server/req_holdjob.c,
server/req_rerun.c of TORQUE 6.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from vmgr.config import Config
from vmgr.errors import Code, VTorqueError
from vsub.engines import PHASES, JobState, PlacedJob, for_this_host, host_name, shell_status
from vsub.engines.pbs import QsubDialect

if TYPE_CHECKING:
    import socket

_UNKNOWN_JOB = 153
_QSTAT_TIMEOUT_S = 60


class Torque(QsubDialect):
    """One TORQUE server, reached through its own commands."""

    def __init__(self, config: Config) -> None:
        self._submit = config.submit

    @property
    def qsub(self) -> str:
        return for_this_host(self._submit.qsub, "submit.qsub")

    @property
    def session_qsub(self) -> str:
        return self.qsub

    def state(self, job_id: str, timeout_s: Optional[float] = None) -> JobState:
        """The state of a job, from `qstat -f`."""
        import os  # what only a vsub that asks needs is not loaded by one that just submits
        import subprocess

        try:
            done = subprocess.run(
                [for_this_host(self._submit.qstat, "submit.qstat"), "-f", job_id],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_QSTAT_TIMEOUT_S if timeout_s is None else timeout_s,
                env={**os.environ, "LC_ALL": "C"},
            )
        except (OSError, subprocess.TimeoutExpired):
            return JobState("unknown")
        if done.returncode == _UNKNOWN_JOB or b"Unknown Job Id" in done.stderr:
            return JobState("gone")
        return parse_qstat(done.stdout.decode(errors="replace")) if done.returncode == 0 else JobState("unknown")

    def check_state(self) -> None:
        """Refuse a qstat that cannot be run. Raises VTorqueError (VT-ENGINE)."""
        import os  # as above

        qstat = for_this_host(self._submit.qstat, "submit.qstat")
        if not os.access(qstat, os.X_OK):
            raise VTorqueError(f"cannot run {qstat} to wait for the job", code=Code.ENGINE, hint="set submit.qstat")

    def completion(self, job_id: str) -> Optional[socket.socket]:
        return None

    def read_completion(self, line: bytes) -> JobState:
        return JobState("unknown")

    def nodes(self, timeout_s: float) -> tuple[str, ...]:
        """All nodes, from `pbsnodes`."""
        from vsub.engines.listing import ask, parse_pbsnodes  # for those who look after guests, not for a submission

        program = for_this_host(self._submit.pbsnodes, "submit.pbsnodes")
        return parse_pbsnodes(ask([program], "submit.pbsnodes", timeout_s) or "")

    def server(self, timeout_s: float) -> str:
        """The server's name, from `qstat -B -f`."""
        from vsub.engines.listing import ask, parse_server_name  # as above

        program = for_this_host(self._submit.qstat, "submit.qstat")
        return parse_server_name(ask([program, "-B", "-f"], "submit.qstat", timeout_s) or "")

    def placed(self, job_id: Optional[str], timeout_s: float) -> tuple[PlacedJob, ...]:
        """Jobs that have nodes, from `qstat -f`."""
        from vsub.engines.listing import ask, parse_jobs  # as above

        program = for_this_host(self._submit.qstat, "submit.qstat")
        argv = [program, "-f", *(["-t"] if job_id is None else [job_id])]
        return parse_jobs(ask(argv, "submit.qstat", timeout_s, unknown=_UNKNOWN_JOB) or "")

    def hold(self, job_id: str, timeout_s: float) -> bool:
        """Hold a job by `qhold`; whether it was held before is in `qstat -f`."""
        from vsub.engines.listing import ask, hold_by, parse_holds  # as above

        qstat = for_this_host(self._submit.qstat, "submit.qstat")
        text = ask([qstat, "-f", job_id], "submit.qstat", timeout_s, unknown=_UNKNOWN_JOB)
        if text is None:
            raise VTorqueError(f"job {job_id} is not known to the batch system", code=Code.ENGINE, hint="see qstat")
        program = for_this_host(self._submit.qhold, "submit.qhold")
        return hold_by([program, "-h", "u", job_id], "submit.qhold", timeout_s, is_new="u" not in parse_holds(text))

    def release(self, job_id: str, timeout_s: float) -> None:
        """Release a job by `qrls`."""
        from vsub.engines.listing import change  # as above

        program = for_this_host(self._submit.qrls, "submit.qrls")
        change([program, "-h", "u", job_id], "submit.qrls", timeout_s)

    def requeue(self, job_id: str, timeout_s: float) -> None:
        """Requeue a job by `qrerun`."""
        from vsub.engines.listing import change  # as above

        program = for_this_host(self._submit.qrerun, "submit.qrerun")
        change([program, job_id], "submit.qrerun", timeout_s, denied=_operator_hint(_own_name()))

    def check_requeue(self, timeout_s: float) -> None:
        """Look for the programs, and among managers and operators, by the `qmgr` beside `qrerun`."""
        import os  # as above
        import socket

        from vsub.engines.listing import ask
        from vsub.engines.operators import may_requeue, parse_server

        for key, setting in (("submit.qhold", self._submit.qhold), ("submit.qrerun", self._submit.qrerun)):
            program = for_this_host(setting, key)
            if not os.access(program, os.X_OK):
                raise VTorqueError(f"cannot run {program}", code=Code.ENGINE, hint=f"install it, or set {key}")
        qmgr = f"{os.path.dirname(for_this_host(self._submit.qrerun, 'submit.qrerun'))}/qmgr"  # noqa: PTH120
        text = ask([qmgr, "-c", "list server"], "submit.qrerun, beside which it is looked for", timeout_s)
        user = _own_name()
        if not may_requeue(parse_server(text or ""), user, {host_name(), socket.getfqdn()}):
            raise VTorqueError(
                f"{user}@{host_name()} is neither operator nor manager", code=Code.ACCESS, hint=_operator_hint(user)
            )


def _own_name() -> str:
    import os  # as above
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _operator_hint(user: str) -> str:
    who = f"{user}@{host_name()}"
    return f"make {who} an operator: qmgr -c 'set server operators += {who}'"


def parse_qstat(text: str) -> JobState:
    """The state in the output of `qstat -f`; phase `unknown` when it has none."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.partition(" = ")
        if equals and name.strip() in ("job_state", "exit_status"):
            found[name.strip()] = value.strip()
    try:
        status = shell_status(int(found["exit_status"])) if "exit_status" in found else None
    except ValueError:
        status = None
    return JobState(PHASES.get(found.get("job_state", ""), "unknown"), status)
