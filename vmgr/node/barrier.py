"""The user prologue: waits, as the job's user, until the guest is ready or is known not to come up.

TORQUE does not charge this time to the job. It always ends with 0, because another status would requeue the job for
ever or lose its output: the job wrapper waits again, and tells the reason. A prologue of the user's own
(`qsub -l prologue=`) comes after that, whatever became of the guest, and then its status counts: that is the user's
own decision. It is run and judged as TORQUE 6.1.3 does it (src/resmom/prolog.c: check_if_pelog_exists,
check_pelog_permissions).

Where the site ends what a job leaves running (`guest.kill_user_processes`) it is a child instead, and what it leaves
becomes ours until the agent has seen it: processes that have left their parents and session are found in no other way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import sys
from collections.abc import Sequence
from typing import Optional

from vmgr.config import Config, load_config
from vmgr.errors import printable
from vmgr.node.client import AgentLink
from vmgr.node.process import adopt_orphans, given_environment
from vmgr.node.terminal import Terminal
from vmgr.paths import installation

JOIN_SECONDS = 5.0
KEYS = (signal.SIGINT, signal.SIGQUIT)
"""What a terminal sends to us as well; the user's own prologue decides what becomes of it."""

NOT_RUN = 255
"""What TORQUE makes of a prologue that it may not run: a failure like any status but 0 and 1."""


def main(argv: Sequence[str]) -> int:
    """Called with the arguments of a prologue, the job's id first.

    `--then PATH --` before them names a prologue of the user's own.
    """
    then = ""
    if len(argv) >= 3 and (argv[0], argv[2]) == ("--then", "--"):
        then, argv = argv[1], argv[3:]
    config = None
    try:
        config = load_config(installation())
        asyncio.run(_wait(config, argv[0]))
    except Exception:
        pass  # the job wrapper finds the same and says it on the job's own error stream
    if not then:
        return 0
    return _watched(config, then, argv) if config is not None and config.kill_user_processes else become(then, argv)


async def _wait(config: Config, job_id: str) -> None:
    await asyncio.wait_for(_until_settled(config, job_id), config.timeouts.barrier)


async def _until_settled(config: Config, job_id: str) -> None:
    link = await AgentLink.open(config.paths, job_id)
    terminal = Terminal.open(1)  # an interactive job's; of a batch job this is the output file
    async for snapshot in link.follow():
        if terminal is not None:
            terminal.progress(snapshot)
        if snapshot["state"] not in ("starting", "staging", "booting"):
            break
    if terminal is not None:
        terminal.end_progress()


def _watched(config: Config, path: str, argv: Sequence[str]) -> int:
    """Run the user's own prologue, and show the agent what it has left running. Gives its status, or ends as it did."""
    adopt_orphans()
    _join(config, argv[0])
    before = {sig: signal.signal(sig, signal.SIG_IGN) for sig in KEYS}
    child = os.fork()
    if child == 0:
        try:
            for sig, handler in before.items():
                signal.signal(sig, handler)
            os._exit(become(path, argv))
        finally:
            os._exit(NOT_RUN)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _join(config, argv[0])
    if status < 0:
        with contextlib.suppress(OSError):  # KILL and STOP have no handlers
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _join(config: Config, job_id: str) -> None:
    """Tell the agent that we, and what we have started, are the job's; without one there is nobody to end anything."""

    async def join() -> None:
        link = await AgentLink.open(config.paths, job_id)
        link.send("join")
        await link.snapshot()
        link.close()

    async def in_time() -> None:
        await asyncio.wait_for(join(), JOIN_SECONDS)

    try:
        asyncio.run(in_time())
    except Exception:
        pass  # as above


def become(path: str, argv: Sequence[str]) -> int:
    """Become the user's own prologue; returns only where there is none (0), or it may not or cannot be run."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        return 0
    except OSError as err:
        return _not_run(path, err.strerror)
    reason = _refused(info)
    if reason is not None:
        return _not_run(path, reason)
    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; SIGPIPE is ignored by TORQUE itself
        os.execve(path, [path, *argv], given_environment())
    except OSError as err:
        return _not_run(path, err.strerror)


def _not_run(path: str, reason: Optional[str]) -> int:
    print(f"vtorque: the prologue {printable(path)} was not run: {reason}", file=sys.stderr)
    return NOT_RUN


def _refused(info: os.stat_result) -> Optional[str]:
    """Why TORQUE does not run a prologue of the user's own, None where it does."""
    if not stat.S_ISREG(info.st_mode):
        return "it is no regular file"
    if info.st_uid != os.geteuid():
        return "it does not belong to the job's user"
    if info.st_mode & (stat.S_IRUSR | stat.S_IXUSR) != stat.S_IRUSR | stat.S_IXUSR:
        return "its owner may not read and execute it"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write it"
    return None
