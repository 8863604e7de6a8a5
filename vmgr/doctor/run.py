"""Runs a program of the node's for a check: bounded in time and output, ended with the check, without a shell."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

from vmgr.node.process import dies_with

SECONDS = 10.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Ran(NamedTuple):
    """How a program ended. `problem` says why it did not run to its end, else it is None."""

    status: int
    out: str
    err: str
    problem: Optional[str] = None

    @property
    def reason(self) -> str:
        """Why it did not succeed, as one line."""
        said = (self.err.strip() or self.out.strip()).splitlines()
        return self.problem or (said[-1][:200] if said else f"it ended with {self.status}")


def run(
    argv: Sequence[str],
    *,
    text: str = "",
    timeout_s: float = SECONDS,
    uid: Optional[int] = None,
    gid: Optional[int] = None,
    passed: Sequence[str] = (),
) -> Ran:
    """Run a program with `text` as its input; as another user where `uid` and `gid` are given.

    Of our variables it has those in `passed`, where they are set.
    """
    options: dict[str, Any] = {} if uid is None else {"user": uid, "group": gid, "extra_groups": []}
    try:
        done = subprocess.run(
            argv,
            input=text.encode(),
            capture_output=True,
            timeout=timeout_s,
            env={"PATH": _PATH, "LANG": "C.UTF-8", **{name: os.environ[name] for name in passed if name in os.environ}},
            cwd="/",
            preexec_fn=dies_with(os.getpid()),
            **options,
        )
    except OSError as err:
        return Ran(-1, "", "", f"{argv[0]}: {err.strerror}")
    except subprocess.TimeoutExpired:
        return Ran(-1, "", "", f"{argv[0]} did not end within {timeout_s:g} s")
    return Ran(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))
