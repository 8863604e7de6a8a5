"""The same for many nodes at once: `vmgr doctor` on each of them, reached by pdsh, bounded in time.

pdsh takes the set of nodes (`n[01-16],n20`), connects to many of them side by side, and puts a node's name before each
line that comes from it.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import shlex
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Callable, NamedTuple, Optional

from vmgr.doctor.finding import Finding, from_plain
from vmgr.errors import Code, VTorqueError, printable
from vmgr.node.process import dies_with

CONNECT_SECONDS = 10
FANOUT = 64
MAX_NODES = 4000
"""Their names are one argument of pdsh's, which the kernel bounds to 128 KiB."""
MAX_NODE_BYTES = 1 << 20
"""So much of what one node says is read."""

END_SECONDS = 2.0
_CHUNK = 1 << 16

_SET = re.compile(r"[A-Za-z0-9._,\[\]-]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_MARK = "-- Target nodes --"


class Report(NamedTuple):
    """What one node says; `problem` is why it says nothing, else None."""

    node: str
    findings: tuple[Finding, ...] = ()
    problem: Optional[str] = None


def expand(nodes: str, rcmd: str = "ssh") -> list[str]:
    """The names in a set of nodes, each once, in the order of people (n2 before n10).

    Raises VTorqueError: VT-VALUE for a set that is none, VT-ACCESS without pdsh.
    """
    if not _SET.fullmatch(nodes) or nodes.startswith("-"):
        raise _no_set(nodes)
    out, complaints = bytearray(), bytearray()
    status = _pdsh(["-R", rcmd, "-w", nodes, "-Q"], out.extend, complaints.extend)  # it asks nobody
    lines = out.decode("utf-8", "replace").splitlines()
    if status or _MARK not in lines:
        said = complaints.decode("utf-8", "replace").strip().splitlines()
        raise VTorqueError(f"--nodes {nodes}: pdsh: {said[-1] if said else 'no answer'}", code=Code.VALUE, hint=_HINT)
    names = lines[lines.index(_MARK) + 1].split(",") if lines[-1] != _MARK else []
    if not names or not all(_NAME.fullmatch(name) for name in names):
        raise _no_set(nodes)
    if len(names) > MAX_NODES:
        raise VTorqueError(f"--nodes {nodes}: {len(names)} nodes", code=Code.VALUE, hint=f"at most {MAX_NODES}")
    return sorted(set(names), key=natural)


_HINT = "a set such as n[01-16],n20 is needed"


def _no_set(nodes: str) -> VTorqueError:
    return VTorqueError(f"--nodes {nodes}: no set of nodes", code=Code.VALUE, hint=_HINT)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key by which n2 comes before n10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", name) if part]


def ask(names: Sequence[str], command: Sequence[str], *, rcmd: str, timeout_s: int) -> list[Report]:
    """Run `command`, which prints findings as JSON, on all nodes; a report for each, in their order."""
    rounds = -(-len(names) // FANOUT)
    said, complained = Heard(names), Heard(names)
    _pdsh(
        [
            "-b",
            "-R", rcmd,
            "-t", str(CONNECT_SECONDS),
            "-u", str(timeout_s),
            "-f", str(FANOUT),
            "-w", ",".join(names),
            *(command if rcmd == "exec" else [shlex.join(command)]),
        ],
        said.feed,
        complained.feed,
        limit_s=rounds * (CONNECT_SECONDS + timeout_s) + 10,
    )  # fmt: skip
    texts, complaints = said.by_node(), complained.by_node()
    return [report(name, texts[name], complaints[name]) for name in names]


class Heard:
    """What comes from each node, in lines `NODE: …`, or `pdsh@HERE: NODE: …` for what pdsh says of one; so much of it.

    One node that says more than it should takes the room of no other, nor this machine's.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._texts: dict[str, list[str]] = {name: [] for name in names}
        self._sizes = dict.fromkeys(self._texts, 0)
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take what comes next."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._add(line)
        self._rest = self._rest[:MAX_NODE_BYTES]

    def by_node(self) -> dict[str, str]:
        """The text of each node, now that all has come."""
        self._add(self._rest)
        self._rest = b""
        return {name: "\n".join(lines) for name, lines in self._texts.items()}

    def _add(self, line: bytes) -> None:
        name, _, rest = line.decode("utf-8", "replace").rstrip("\r").partition(": ")
        if name.startswith("pdsh@"):
            name, _, rest = rest.partition(": ")
        if name in self._texts and self._sizes[name] < MAX_NODE_BYTES:
            self._texts[name].append(rest)
            self._sizes[name] += len(rest) + 1


def report(node: str, out: str, err: str) -> Report:
    """A node's findings, or why there are none."""
    try:
        data = json.loads(out)
        return Report(node, tuple(map(from_plain, _findings(data))))
    except (ValueError, RecursionError):
        lines = [line for line in err.splitlines() if line.strip()]
        telling = [line for line in lines if "exited with exit code" not in line] or lines or ["no answer"]
        return Report(node, problem=printable(telling[0])[:300])


def _findings(data: Any) -> list[Any]:
    found = data.get("findings") if isinstance(data, Mapping) else None
    if not isinstance(found, list):
        raise ValueError("no findings")
    return found


Hear = Callable[[bytes], object]


def _pdsh(arguments: Sequence[str], out: Hear, err: Hear, *, limit_s: float = 20.0) -> int:
    """Run pdsh, and hand on what it prints as it comes; gives its status. When the time is over it is ended."""
    try:
        child = subprocess.Popen(
            ["pdsh", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=dies_with(os.getpid()),
        )
    except OSError as error:
        raise VTorqueError(
            f"pdsh cannot be started: {error.strerror}", code=Code.ACCESS, hint="apt-get install pdsh"
        ) from error
    assert child.stdout is not None and child.stderr is not None
    with child, selectors.DefaultSelector() as streams:
        streams.register(child.stdout, selectors.EVENT_READ, out)
        streams.register(child.stderr, selectors.EVENT_READ, err)
        try:
            if not _listen(streams, limit_s):
                _end(child)
                _listen(streams, END_SECONDS)
            with suppress(subprocess.TimeoutExpired):
                return child.wait(END_SECONDS)
            _end(child)
            return child.wait()
        except BaseException:
            _end(child)
            raise


def _listen(streams: selectors.BaseSelector, limit_s: float) -> bool:
    """Hand on what comes from the streams; whether all of them have ended in time."""
    deadline = time.monotonic() + limit_s
    while streams.get_map():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        for key, _ in streams.select(left):
            data = os.read(key.fd, _CHUNK)
            if data:
                key.data(data)
            else:
                streams.unregister(key.fileobj)
    return True


def _end(child: subprocess.Popen[bytes]) -> None:
    """End pdsh with what it has started: each is in a session of its own, and outlives pdsh (seen on 2.34)."""
    import psutil

    try:
        started = psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    child.kill()
    for each in started:
        with suppress(psutil.NoSuchProcess):
            each.kill()
