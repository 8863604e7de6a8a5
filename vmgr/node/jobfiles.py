"""The job directory as the job's own processes see it: names that no two of them share, the result, its end.

The members of a job array share one directory, and may run at once, on one node or on several, so whatever they or
their agents write carries the member's index and the node.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
import time
from pathlib import Path
from typing import Optional, Union

from vmgr.errors import VTorqueError
from vmgr.jobspec import MAX_SPEC_BYTES, Spec, SpecPath, members, parse_spec

READ_SECONDS = 5.0
REMOVE_TRIES = 40
REMOVE_PAUSE_SECONDS = 0.025


def own_name(kind: str, tag: Union[int, str, None], *parts: str) -> str:
    """The name of a file that one job alone writes: `kind`, what tells an array's member from others, then `parts`."""
    return ".".join((kind, *(() if tag is None else (str(tag),)), *parts))


def status_name(tag: Optional[str], node: str) -> str:
    """Where a node's agent says how far the job is; `tag` as in `HookCall`."""
    return own_name("status", tag, node, "json")


class JobFiles:
    """The directory of one job, or of the member `index` of an array.

    `spec` is None where it cannot be read as it was.
    """

    def __init__(self, path: SpecPath, index: Optional[int]) -> None:
        self.directory = Path(path.directory)
        self.spec = _read_spec(path)
        self._index = index

    def leave(self, status: int, code: Optional[str]) -> None:
        """At the job's end: leave the result for a `vsub` that waits for it, else take the directory away.

        Of an array, the last member to end takes it away. Raises OSError when the result cannot be written.
        """
        if self.spec is not None and self.spec.keep:
            self._write_result(status, code)
        elif self._index is None or (self.spec is not None and self._is_last(self.spec)):
            remove(self.directory.parent)

    def _write_result(self, status: int, code: Optional[str]) -> None:
        temporary = self.directory / own_name(".result", self._index, str(os.getpid()))
        temporary.write_text(json.dumps({"v": 1, "status": status, "code": code}))
        temporary.replace(self.directory / own_name("result", self._index, "json"))

    def _is_last(self, spec: Spec) -> bool:
        """Mark this member as ended; whether all of the array have ended.

        Each marks before it looks, so the last one to mark sees all marks, and where two are last at once both do. On
        NFS too: one's own mark makes the client look at the directory anew. The search begins behind this member,
        because members mostly end in order, and stops at the first that has not ended.
        """
        indexes = members(spec.array) if spec.array is not None else frozenset()
        if self._index not in indexes:
            return False
        try:
            self._mark(self._index).touch(mode=0o600)
        except OSError:
            return False
        later = sorted(index for index in indexes if index > self._index)
        earlier = sorted(index for index in indexes if index < self._index)
        return all(os.path.lexists(self._mark(index)) for index in (*later, *earlier))

    def _mark(self, index: int) -> Path:
        return self.directory / f"done.{index}"


def _read_spec(path: SpecPath) -> Optional[Spec]:
    """The specification, or None: also where the file is none, or its file system does not answer in time.

    A thread of its own reads it, because nothing else gives up on a file system that hangs; the process may end
    without it.
    """
    found: list[Spec] = []

    def read() -> None:
        try:
            fd = os.open(f"{path.directory}/spec.json", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            with open(fd, "rb") as stream:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    found.append(parse_spec(stream.read(MAX_SPEC_BYTES + 1), sha256=path.sha256, source=""))
        except (OSError, VTorqueError):
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(READ_SECONDS)
    return found[0] if found else None


def remove(folder: Path) -> None:
    """Take a job's folder away. An agent may be writing its last status into it, so it can take a second try."""
    for _ in range(REMOVE_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return
        time.sleep(REMOVE_PAUSE_SECONDS)
