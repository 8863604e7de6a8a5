"""The same for many nodes at once: `vmgr doctor` on each of them, reached by pdsh, bounded in time.

pdsh takes the set of nodes (`n[01-16],n20`), connects to many of them side by side, and puts a node's name before each
line that comes from it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Optional

from vmgr.doctor.finding import Finding, from_plain
from vmgr.errors import Code, VTorqueError, printable
from vmgr.node.process import dies_with

CONNECT_SECONDS = 10
FANOUT = 64
MAX_NODES = 4000
"""Their names are one argument of pdsh's, which the kernel bounds to 128 KiB."""
MAX_NODE_BYTES = 1 << 20
"""So much of what one node says is read."""

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
    done = _pdsh(["-R", rcmd, "-w", nodes, "-Q"])
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    if done.returncode or _MARK not in lines:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
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
    done = _pdsh(
        [
            "-b",
            "-R", rcmd,
            "-t", str(CONNECT_SECONDS),
            "-u", str(timeout_s),
            "-f", str(FANOUT),
            "-w", ",".join(names),
            *(command if rcmd == "exec" else [shlex.join(command)]),
        ],
        limit_s=rounds * (CONNECT_SECONDS + timeout_s) + 10,
    )  # fmt: skip
    said, complained = by_node(done.stdout, names), by_node(done.stderr, names)
    return [report(name, said[name], complained[name]) for name in names]


def by_node(data: bytes, names: Iterable[str]) -> dict[str, str]:
    """What came from each node, from lines `NODE: …`, or `pdsh@HERE: NODE: …` for what pdsh says of one."""
    texts: dict[str, list[str]] = {name: [] for name in names}
    sizes = dict.fromkeys(texts, 0)
    for line in data.decode("utf-8", "replace").splitlines():
        name, _, rest = line.partition(": ")
        if name.startswith("pdsh@"):
            name, _, rest = rest.partition(": ")
        if name in texts and sizes[name] < MAX_NODE_BYTES:
            texts[name].append(rest)
            sizes[name] += len(rest) + 1
    return {name: "\n".join(lines) for name, lines in texts.items()}


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


def _pdsh(arguments: Sequence[str], *, limit_s: float = 20.0) -> subprocess.CompletedProcess[bytes]:
    """Run pdsh. When the time is over it is ended, and what was said until then is given."""
    try:
        child = subprocess.Popen(
            ["pdsh", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=dies_with(os.getpid()),
        )
    except OSError as err:
        raise VTorqueError(
            f"pdsh cannot be started: {err.strerror}", code=Code.ACCESS, hint="apt-get install pdsh"
        ) from err
    try:
        out, complaints = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        _end(child)
        out, complaints = child.communicate()
    except BaseException:
        _end(child)
        child.communicate()
        raise
    return subprocess.CompletedProcess(child.args, child.returncode, out, complaints)


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
