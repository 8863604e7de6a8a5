"""The parts of all nodes of a job: this node's from its file, the others' as `vmgr report --part` there says."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import NamedTuple, Protocol

from vmgr.config import Config, Paths
from vmgr.errors import Code, VTorqueError, printable
from vmgr.logs import jobs_folder
from vmgr.node.record import newest_socket
from vmgr.paths import installation
from vmgr.report.parts import BEGINNING, MAX_BYTES, SUFFIX, Part, read_parts
from vmgr.topology.allowed import names_a_folder

AT_ONCE = 64
"""So many nodes are asked at the same time."""
ALIVE = b'"alive": true, '
ALL_TIMES = 3
"""So many times as long as one of them all may take."""


class Answer(Protocol):
    """How a program on a node ended, and what it printed."""

    @property
    def status(self) -> int: ...

    @property
    def out(self) -> bytes: ...

    @property
    def err(self) -> bytes: ...


class Run(Protocol):
    """Runs a program on a node, as the caller, within a time. Raises VTorqueError when that is not possible."""

    def __call__(self, node: str, argv: Sequence[str], *, timeout_s: float) -> Answer: ...


class Gathered(NamedTuple):
    """What was said, and why of some nodes nothing is known."""

    parts: list[Part]
    missing: Mapping[str, str]


def job_file(config: Config, job_id: str, suffix: str) -> Path:
    """The file that is kept of a job under this suffix; it may not be there.

    Raises VTorqueError: VT-VALUE for what can be no job's id, VT-CONFIG where nothing is kept of jobs.
    """
    folder = jobs_folder(config.logging)
    if folder is None:
        raise VTorqueError(
            "nothing is kept of jobs here: logging.file is not set", code=Code.CONFIG, hint="ask the administrator"
        )
    if not names_a_folder(job_id):
        raise VTorqueError(f"{printable(job_id[:80])} is no job's id", code=Code.VALUE, hint="such as 12.server")
    return folder / f"{job_id}{suffix}"


def open_kept(path: Path, job_id: str, what: str) -> int:
    """A descriptor of what is kept of a job on this node.

    Raises VTorqueError: VT-VALUE when there is none, VT-ACCESS when it is another user's, VT-CONFIG when the site lets
    nobody look.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise VTorqueError(
            f"there is no {what} of job {job_id} on this node",
            code=Code.VALUE,
            hint="name it whole, with the server's or cluster's name, and a node that it had",
        ) from None
    except PermissionError:
        if not os.access(path.parent, os.X_OK):
            raise VTorqueError(
                f"{path.parent} is closed to you", code=Code.CONFIG, hint="ask the administrator"
            ) from None
        raise VTorqueError(f"the {what} of job {job_id} is another user's", code=Code.ACCESS) from None
    except OSError as err:
        raise VTorqueError(f"cannot read {path}: {err.strerror}", code=Code.ACCESS) from None


def read_here(config: Config, job_id: str) -> bytes:
    """This node's part, as `parts.read_parts` takes it. Raises VTorqueError as `job_file` and `open_kept` do."""
    path = job_file(config, job_id, SUFFIX)
    with open(open_kept(path, job_id, "report"), "rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if _agent_lives(config.paths, job_id) and data.startswith(BEGINNING):
        return BEGINNING + ALIVE + data[len(BEGINNING) :]
    return data


def _agent_lives(paths: Paths, job_id: str) -> bool:
    """Whether somebody listens at the socket of the job's newest attempt on this node."""
    path = newest_socket(paths, job_id)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # EAGAIN: more callers than it takes in, of which anybody may be one (connect(2))
        return path is not None and probe.connect_ex(os.fspath(path)) in (0, errno.EAGAIN)


def found_here(config: Config, job_id: str) -> list[Part]:
    """What this node knows of a job, which may be nothing. Raises VTorqueError (VT-ACCESS, VT-AGENT)."""
    try:
        return understood(read_here(config, job_id), "this node")
    except VTorqueError as err:
        if err.code in (Code.VALUE, Code.CONFIG):
            return []
        raise


def understood(data: bytes, where: str) -> list[Part]:
    """The attempts in what a node has said. Raises VTorqueError (VT-AGENT) for what is none of it."""
    try:
        if len(data) > MAX_BYTES + len(ALIVE):
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        return read_parts(data)
    except ValueError as err:
        raise VTorqueError(
            f"the report of {where} cannot be read: {err}", code=Code.AGENT, hint="is it of another version of vTorque?"
        ) from None


def refusal(node: str, answer: Answer) -> VTorqueError:
    """Why `vmgr` on a node has failed: its own failure, or what was said last."""
    lines = answer.err[-4096:].decode("utf-8", "replace").strip().splitlines() or [f"it ended with {answer.status}"]
    code, colon, text = lines[-1].partition(": ")
    known = Code.named(code) if colon else Code.INTERNAL
    if known is not Code.INTERNAL:
        return VTorqueError(text, code=known)
    return VTorqueError(f"node {node} does not answer as vTorque does: {lines[-1][:300]}", code=Code.CONNECT)


def gather(job_id: str, nodes: Sequence[str], run: Run, *, timeout_s: float) -> Gathered:
    """What `nodes` say of their part in a job, each asked for at most `timeout_s`, all of them for three times that.

    Nodes that do not answer in time, or with nothing, are named.
    """
    argv = [f"{installation().prefix}/bin/vmgr", "report", "--part", job_id]

    def ask(node: str) -> list[Part]:
        answer = run(node, argv, timeout_s=timeout_s)
        if answer.status != 0:
            raise refusal(node, answer)
        before = max(answer.out.find(BEGINNING), 0)  # a user's shell may print lines of its own
        return understood(answer.out[before:], f"node {node}")

    parts: list[Part] = []
    missing: dict[str, str] = {}
    deadline = time.monotonic() + ALL_TIMES * timeout_s
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="node")
    try:
        for node, asked in [(node, pool.submit(ask, node)) for node in nodes]:
            try:
                parts += asked.result(max(0.0, deadline - time.monotonic()))
            except VTorqueError as err:
                missing[node] = err.detail
            except FutureTimeout:
                missing[node] = "it was not heard in time"
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return Gathered(parts, missing)
