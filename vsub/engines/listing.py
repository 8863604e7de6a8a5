"""What batch systems say of their nodes and of the jobs on them: for `vmgr`, which looks there for guests.

A user's text (a job's name, its variables, paths) stands in what `qstat` prints. So what is found says where to look
and nothing more: node agents say what is there. Formats: qstat(1B), pbsnodes(8B) of TORQUE 6.1.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

from vmgr.errors import Code, Unanswered, VTorqueError, printable
from vmgr.node.allocation import MAX_NODES, parse_exec_host
from vmgr.slurmvars import unfiltered
from vsub.engines import PlacedJob

MAX_TEXT_BYTES = 64 << 20
MAX_JOBS = 100_000

_JOB_ID = re.compile(r"[0-9]{1,20}(?:\[[0-9]{1,10}\]|-[0-9]{1,10})?\.[A-Za-z0-9][A-Za-z0-9.-]{0,254}")
_WANTED = ("Job_Owner", "exec_host", "job_state")
_PERMISSION = 159
"""PBSE_PERM modulo 256."""
_DENIED = (b"Unauthorized Request", b"Invalid user id", b"Access/permission denied")
"""What TORQUE's commands say, and Slurm's."""


def ask(
    argv: Sequence[str],
    key: str,
    timeout_s: float,
    *,
    unknown: Optional[int] = None,
    unknown_words: bytes = b"Unknown Job Id",
    errors: str = "replace",
) -> Optional[str]:
    """What a command of the batch system prints, bounded.

    None when it fails because it does not know the job: with the status `unknown`, or, where that is given, with these
    words. `key` is the setting that names the command, `errors` what becomes of bytes that are no UTF-8. Raises
    VTorqueError (VT-ENGINE).
    """
    done = _run(argv, key, timeout_s)
    if done.returncode and unknown is not None and (done.returncode == unknown or unknown_words in done.stderr):
        return None
    if done.returncode:
        said = _last_line(done.stderr)
        raise VTorqueError(
            f"{argv[0]} ended with status {done.returncode}{': ' + said if said else ''}", code=Code.ENGINE
        )
    return done.stdout[:MAX_TEXT_BYTES].decode(errors=errors)


def change(argv: Sequence[str], key: str, timeout_s: float, *, denied: Optional[str] = None) -> None:
    """Run a command of the batch system that changes a job; `denied` is the hint for a caller who may not.

    Raises VTorqueError with what the command says: VT-ACCESS for a caller who may not, else VT-ENGINE. A status is an
    error number modulo 256, which may be 0: what it says of the failure on standard error counts as well. Unanswered is
    raised where it says nothing in time.
    """
    done = _run(argv, key, timeout_s, late=Unanswered)
    said = _last_line(done.stderr)
    if not done.returncode and not said.startswith(f"{Path(argv[0]).name}: "):
        return
    text = said or f"{argv[0]} ended with status {done.returncode}"
    if done.returncode == _PERMISSION or any(words in done.stderr for words in _DENIED):
        raise VTorqueError(text, code=Code.ACCESS, hint=denied)
    raise VTorqueError(text, code=Code.ENGINE)


def _run(
    argv: Sequence[str], key: str, timeout_s: float, *, late: type[VTorqueError] = VTorqueError
) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            env={**unfiltered(os.environ), "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise late(f"{argv[0]} has not answered within {timeout_s:g} s", code=Code.ENGINE) from None
    except OSError as err:
        raise VTorqueError(f"cannot run {argv[0]}: {err.strerror}", code=Code.ENGINE, hint=f"set {key}") from None


def hold_by(argv: Sequence[str], key: str, timeout_s: float, *, is_new: bool) -> bool:
    """Run a command that holds a job, which its user had not held before if that `is_new`; gives that.

    Raises VTorqueError as `change`.
    """
    try:
        change(argv, key, timeout_s)
    except Unanswered as err:
        err.is_new = is_new
        raise
    return is_new


def _last_line(said: bytes) -> str:
    lines = said[-500:].decode(errors="replace").strip().splitlines()
    # scontrol says the same once more, without the job
    telling = [line for line in lines if not line.startswith("slurm_suspend error: ")] or lines
    return printable(telling[-1]) if telling else ""


def parse_pbsnodes(text: str) -> tuple[str, ...]:
    """The nodes in the output of `pbsnodes`: each name starts a line, its attributes are indented."""
    return known_nodes([line.strip() for line in text.split("\n") if line and not line[0].isspace()])


def known_nodes(names: object) -> tuple[str, ...]:
    """What of `names` are names of nodes, each once."""
    found: dict[str, None] = {}
    for name in names if isinstance(names, list) else ():
        parsed = parse_exec_host(name) if isinstance(name, str) and "/" not in name and "+" not in name else None
        if parsed is not None and len(found) < MAX_NODES:
            found[parsed[0]] = None
    return tuple(found)


def parse_jobs(text: str) -> tuple[PlacedJob, ...]:
    """The jobs that have nodes in the output of `qstat -f`; a long value goes on in lines that begin with a tab.

    Of an attribute that stands twice the first counts.
    """
    jobs: list[PlacedJob] = []
    job_id: Optional[str] = None
    found: dict[str, str] = {}
    last: Optional[str] = None

    def end() -> None:
        job = placed_job(job_id, found) if job_id is not None else None
        if job is not None and len(jobs) < MAX_JOBS:
            jobs.append(job)

    for line in text.split("\n"):
        if line.startswith("Job Id:"):
            end()
            job_id, found, last = line.partition(":")[2].strip(), {}, None
        elif line.startswith("\t"):
            if last is not None:
                found[last] += line[1:]
        else:
            name, equals, value = line.partition(" = ")
            last = name.strip() if equals and name.strip() in _WANTED and name.strip() not in found else None
            if last is not None:
                found[last] = value
    end()
    return tuple(jobs)


def parse_server_name(text: str) -> str:
    """The server in the output of `qstat -B -f`, without its port. Raises VTorqueError (VT-ENGINE) for none."""
    found = re.search(r"^Server: ([A-Za-z0-9][A-Za-z0-9.-]{0,254})(?::[0-9]+)?$", text, re.MULTILINE)
    if found is None:
        raise VTorqueError("the batch system does not say its server's name", code=Code.ENGINE)
    return found[1]


def parse_holds(text: str) -> str:
    """The letters of what holds a job in the output of `qstat -f` of it: `u` its user, `o`, `s`, `n` for nothing."""
    for line in text.split("\n"):
        name, equals, value = line.partition(" = ")
        if equals and name == "    Hold_Types":
            return value.strip()
    return ""


def placed_job(job_id: object, attributes: Mapping[str, object]) -> Optional[PlacedJob]:
    """A job from its attributes as `qstat -f` names them; None for one without nodes, or that is complete."""
    owner, exec_host, state = (attributes.get(name) for name in _WANTED)
    if not isinstance(job_id, str) or not _JOB_ID.fullmatch(job_id) or state in ("C", "F", "Q", "H", "W", "T"):
        return None
    nodes = parse_exec_host(exec_host) if isinstance(exec_host, str) else None
    if nodes is None or not isinstance(owner, str):
        return None
    return PlacedJob(job_id, owner.rpartition("@")[0], nodes)
