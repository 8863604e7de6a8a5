"""Runs all checks of a node, each in a process of its own: one that hangs is a finding, and holds up no other."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from vmgr.doctor import (
    batchsystem,
    clock,
    confinement,
    hypervisor,
    images,
    kernel,
    kvm,
    leftovers,
    memory,
    network,
    programs,
    rights,
    seeds,
    settings,
    shares,
    storage,
    suspension,
)
from vmgr.doctor.finding import Check, Finding, Level, Node, from_plain
from vmgr.errors import VTorqueError
from vmgr.node.process import dies_with

CHECKS: Mapping[str, Check] = {
    "configuration": settings.check,
    "kernel": kernel.check,
    "KVM": kvm.check,
    "hypervisor": hypervisor.check,
    "programs": programs.check,
    "images": images.check,
    "seeds": seeds.check,
    "memory": memory.check,
    "storage": storage.check,
    "shares": shares.check,
    "network": network.check,
    "rights": rights.check,
    "confinement": confinement.check,
    "batch system": batchsystem.check,
    "suspension": suspension.check,
    "clock": clock.check,
    "leftovers": leftovers.check,
}
"""Every check by its subject, in the order in which they are told."""

LIMIT_SECONDS = 30.0
"""What a check may take beside `hypervisor.probe_seconds`: most take less than one."""

MAX_BYTES = 1 << 20
_REPORT = "see the reason; report it where it is a fault of vTorque's"


def examine(node: Node, checks: Mapping[str, Check] = CHECKS, *, limit_s: float = LIMIT_SECONDS) -> list[Finding]:
    """All findings about a node, by subject. The checks run side by side, for no longer than `limit_s` in all."""
    deadline = time.monotonic() + limit_s
    started = {subject: _start(check, node) for subject, check in checks.items()}
    found: list[Finding] = []
    for subject, (pid, results) in started.items():
        try:
            found += _gather(subject, results, deadline, limit_s)
        finally:
            os.close(results)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _collect(pid)
    return found


def _start(check: Check, node: Node) -> tuple[int, int]:
    """The process of a check, and where to read what it finds."""
    results, out = os.pipe2(os.O_CLOEXEC)
    dies = dies_with(os.getpid())
    pid = os.fork()
    if pid == 0:
        try:
            os.close(results)
            os.setsid()  # what it starts is ended with it, by the same request to the kernel
            dies()
            _child(check, node, out)
        finally:
            os._exit(1)
    os.close(out)
    return pid, results


def _child(check: Check, node: Node, out: int) -> None:
    answer: dict[str, Any]
    try:
        answer = {"findings": [finding.as_plain() for finding in check(node)]}
    except VTorqueError as err:
        answer = {"failed": err.message, "remedy": err.hint}
    except Exception as err:
        answer = {"failed": f"fault in the check: {type(err).__name__}: {err}"}
    with os.fdopen(out, "wb") as stream:
        stream.write(json.dumps(answer).encode())
    os._exit(0)


def _gather(subject: str, results: int, deadline: float, limit_s: float) -> list[Finding]:
    """What a check has found, by its answer; a failure where there is none in time."""
    data = b""
    poll = select.poll()
    poll.register(results, select.POLLIN)
    while len(data) < MAX_BYTES:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            what = f"the check did not end within {limit_s:g} s"
            return [Finding(subject, Level.FAILURE, what, "does a file system hang, or a name service?")]
        part = os.read(results, 65536)
        if not part:
            break
        data += part
    try:
        answer = json.loads(data)
        if "failed" in answer:
            return [Finding(subject, Level.FAILURE, str(answer["failed"]), answer.get("remedy") or _REPORT)]
        return [from_plain(finding) for finding in answer["findings"]]
    except (ValueError, KeyError, TypeError):
        return [Finding(subject, Level.FAILURE, "the check died before its end", "is there enough memory?")]


def _collect(pid: int) -> None:
    """Collect a killed child; one that hangs in the kernel is left behind."""
    fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if poll.poll(1000):
            os.waitpid(pid, 0)
    finally:
        os.close(fd)
