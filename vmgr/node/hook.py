"""The root hooks: parse the arguments, make the record, start the agent, return.

A hook opens nothing that a user controls and always ends with 0: a slow or failing one takes the node down with it.
What goes wrong is told to the user by the job wrapper, which finds no agent, and to the administrator on standard
error, which on the mother superior is the job's own.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn, Optional

from vmgr.config import Config, load_config
from vmgr.node import process, record
from vmgr.node.batch import facts
from vmgr.node.hookcall import HookCall
from vmgr.paths import Installation, installation

PATIENCE_SECONDS = 0.25
"""How long an epilogue waits for the processes that it kills; the janitor comes back for one that hangs."""

AGENT_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


def main(argv: Sequence[str]) -> NoReturn:
    """Run the hook named by `argv[0]` (`prologue` or `epilogue`) with the batch system's arguments.

    Ends the process, with 0.
    """
    try:
        install = installation()
        config = load_config(install)
        batch = facts(config.engine)
        start = record.hook_start(batch.leader())
        if argv[0] == "prologue":
            environment = {**AGENT_ENVIRONMENT, **batch.for_commands(os.environ)}
            _prologue(batch.parse_prologue(argv[1:], os.environ), start, config, install, environment)
        else:
            _epilogue(batch.parse_epilogue(argv[1:], os.environ), start, config)
    except Exception as err:
        print(f"vtorque: {argv[0] if argv else 'hook'}: {err}", file=sys.stderr)
    finally:
        os._exit(0)  # the batch system waits, and taking the interpreter apart is a tenth of the hook


def _prologue(
    call: HookCall, start: int, config: Config, install: Installation, environment: Mapping[str, str]
) -> None:
    if call.directory is None:
        return
    if record.has_begun(config.paths, call.job_id, start, call.key):
        return  # the site's own hook has called ours already
    place = record.new_place(config.paths, call.job_id, start)
    lock, listener = record.create(place, {**call._asdict(), "directory": list(call.directory)})
    _start_agent(install, place, lock, listener.fileno(), environment)


def _start_agent(
    install: Installation, place: record.Place, lock: int, listener: int, environment: Mapping[str, str]
) -> None:
    """Start the node agent in a session of its own, with nothing of the batch system's but the lock and the socket.

    It has that session when this returns: slurmd kills what is left in a hook's own.
    """
    begun, begin = os.pipe()
    if os.fork():
        os.close(begin)
        os.read(begun, 1)  # until the other end is closed
        return
    try:
        os.setsid()
        os.close(begin)
        os.umask(0o077)
        os.chdir("/")
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 200) for fd in (lock, listener)]
        for kept, fd in zip((3, 4), high):
            os.dup2(fd, kept)
        os.closerange(5, 4096)
        program = install.libexec / "vtorque-agent"
        os.execve(program, [str(program), str(place.folder)], environment)
    finally:
        os._exit(127)


def _epilogue(call: HookCall, start: int, config: Config) -> None:
    here = record.places(config.paths, call.job_id)
    if call.directory is None and not here:
        record.take_end(config.paths, call.job_id)  # a job that is over, and whose user has the comment back
        return
    end_job(config, call.job_id, start)


def end_job(config: Config, job_id: str, start: Optional[int] = None) -> None:
    """End every attempt of a job that started before the calling hook, which began at `start`; undo what it made.

    The tombstone comes first and is looked at by every prologue and agent after it has made its record, so that one
    of the two always sees the other. It goes again when all that could still come up is known to be gone.
    """
    record.bury(config.paths, job_id, start)
    here = [place for place in record.places(config.paths, job_id) if record.is_buried(config.paths, job_id, place)]
    settled = record.take_end(config.paths, job_id) or bool(here)
    for place in here:
        if record.is_held(place) and not any(step.get("role") == "agent" for step in record.steps(place)):
            settled = False  # its agent is about to start, will see the tombstone and undo what it finds
            continue
        _let_shut_down(place, config.timeouts.disk)
        _let_follow(place, config.timeouts.sisters)
        from vmgr.node.undo import undo  # most epilogues find that the agent has undone everything

        failures = undo(place, patience_s=PATIENCE_SECONDS)
        for failure in failures:
            print(f"vtorque: epilogue: {failure}", file=sys.stderr)
        settled = settled and not failures
        record.take_end(config.paths, job_id)  # of an agent that was just about to end by itself
    if settled:
        record.exhume(config.paths, job_id)


def _let_shut_down(place: record.Place, timeout_s: float) -> None:
    """Where a guest has a persistent disk, tell its agent that the job is over and wait, within a bound, for the guest.

    Only the mother superior's record has such a step. The agent hears of a deleted job by the end of its wrapper too,
    but not of one that has not come.
    """
    steps = list(record.steps(place))
    if not any(step.get("do") == "disk" for step in steps):
        return
    deadline = time.monotonic() + timeout_s
    for role, sig in (("agent", signal.SIGTERM), ("qemu", 0)):  # 0: only wait
        for step in steps:
            if step.get("role") == role:
                left = 0.0 if sig else max(0.0, deadline - time.monotonic())
                try:
                    process.end(process.recorded(step), timeout_s=left, sig=sig)
                except (OSError, ValueError, KeyError, TypeError, OverflowError):
                    pass  # the undoing that follows meets it too, and says so


def _let_follow(place: record.Place, timeout_s: float) -> None:
    """On a sister with guests, wait, within a bound, for the agent, which ends when the mother superior calls it over.

    Only Slurm says that a node is a sister. It runs no processes of the job there, so that of a job that it ends the
    Epilog comes at once: while the script on the mother superior has been told, and may have work for all guests. An
    agent that has been called over before takes too long, or its job is ended a second time.
    """
    facts = record.begun(place)
    index, nodes = facts.get("node_index"), facts.get("nodes")
    if not isinstance(index, int) or index < 1 or not nodes:
        return
    steps = list(record.steps(place))
    if any(step.get("do") == "over" for step in steps) or not any(step.get("role") == "qemu" for step in steps):
        return
    for step in steps:
        if step.get("role") == "agent":
            try:
                process.end(process.recorded(step), timeout_s=timeout_s, sig=0)
            except (OSError, ValueError, KeyError, TypeError, OverflowError):
                pass  # as above
