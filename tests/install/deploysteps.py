"""Work on files that is killed before each single change that it makes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, Callable

STEPS = {
    "os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.utime",
}  # fmt: skip
"""Audit events of the interpreter for what changes a file system, beside files opened for writing."""


def killed_before(step: int, work: Callable[[], object]) -> bool:
    """Do `work` in a child that is killed before its change number `step`; whether it was, and not done before."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in STEPS:
                count += 1
                if count > step:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(watch)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, f"not killed, and failed before step {step}"
    return False


def every_step(work: Callable[[], object], stride: int = 1) -> Iterator[int]:
    """Do `work` again and again, killed `stride` steps later each time; the caller sets all back in between."""
    step = int(time.time()) % stride
    while killed_before(step, work):
        yield step
        step += stride
    assert step > 20, "it was killed at none of its steps"
