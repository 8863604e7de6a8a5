"""Many nodes at once: pdsh, or ClusterShell's clush, runs a command for each, so many of them side by side.

Both take a set of nodes (`n[01-16],n20`) and put a node's name before each line that comes from it. Nothing but the
standard library is used here: an installation begins with it.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Callable, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.node.process import dies_with
from vmgr.signals import undisturbed

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
_SPEAKERS = ("pdsh@", "clush")
_HINT = "a set such as n[01-16],n20 is needed"

PDSH, CLUSH = "pdsh", "clush"


def tool(wanted: Optional[str] = None) -> str:
    """The program that reaches the nodes: the one that is wanted, else pdsh where it is, else clush.

    Raises VTorqueError (VT-ACCESS) where it is not installed.
    """
    for name in [wanted] if wanted else [PDSH, CLUSH]:
        if shutil.which(name):
            return name
    raise _missing(wanted or PDSH)


def _missing(name: str) -> VTorqueError:
    package = {PDSH: "pdsh", CLUSH: "clustershell"}[name]
    return VTorqueError(f"{name} is not installed", code=Code.ACCESS, hint=f"apt-get install {package}")


def expand(nodes: str, rcmd: str = "ssh", program: str = PDSH) -> list[str]:
    """The names in a set of nodes, each once, in the order of people (n2 before n10).

    Raises VTorqueError: VT-VALUE for a set that is none, VT-ACCESS without the program.
    """
    if not _SET.fullmatch(nodes) or nodes.startswith("-"):
        raise _no_set(nodes)
    out, complaints = bytearray(), bytearray()
    asks = ["pdsh", "-R", rcmd, "-w", nodes, "-Q"] if program == PDSH else ["nodeset", "-e", nodes]
    status = run(asks, out.extend, complaints.extend)  # it asks nobody
    lines = out.decode("utf-8", "replace").splitlines()
    if status or (program == PDSH and _MARK not in lines):
        said = complaints.decode("utf-8", "replace").strip().splitlines()
        told = said[-1] if said else "no answer"
        raise VTorqueError(f"--nodes {nodes}: {asks[0]}: {told}", code=Code.VALUE, hint=_HINT)
    if program == PDSH:
        names = lines[lines.index(_MARK) + 1].split(",") if lines[-1] != _MARK else []
    else:
        names = " ".join(lines).split()
    if not names or not all(_NAME.fullmatch(name) for name in names):
        raise _no_set(nodes)
    if len(names) > MAX_NODES:
        raise VTorqueError(f"--nodes {nodes}: {len(names)} nodes", code=Code.VALUE, hint=f"at most {MAX_NODES}")
    return sorted(set(names), key=natural)


def _no_set(nodes: str) -> VTorqueError:
    return VTorqueError(f"--nodes {nodes}: no set of nodes", code=Code.VALUE, hint=_HINT)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key by which n2 comes before n10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", name) if part]


def here_for_each(
    program: str, names: Sequence[str], command: Sequence[str], *, fanout: int, limit_s: int
) -> list[str]:
    """The command line that runs `command` on this machine for each node, `%h` in it standing for the node's name."""
    if program == PDSH:
        return ["pdsh", "-R", "exec", "-f", str(fanout), "-u", str(limit_s), "-w", ",".join(names), *command]
    return [
        "clush", "-R", "exec", "-f", str(fanout), "-u", str(limit_s), "-w", ",".join(names), " ".join(command),
    ]  # fmt: skip


class Heard:
    """What comes from each node, in lines `NODE: …`, or `pdsh@HERE: NODE: …` for what pdsh says of one; so much of it.

    One node that says more than it should takes the room of no other, nor this machine's. `tell` is called with each
    line, and the node from which it came.
    """

    def __init__(self, names: Iterable[str], tell: Optional[Callable[[str, str], None]] = None) -> None:
        self._texts: dict[str, list[str]] = {name: [] for name in names}
        self._sizes = dict.fromkeys(self._texts, 0)
        self._rest = b""
        self._tell = tell

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
        if name not in self._texts and name.startswith(_SPEAKERS):
            name, _, rest = rest.partition(": ")
        if name in self._texts and self._sizes[name] < MAX_NODE_BYTES:
            self._texts[name].append(rest)
            self._sizes[name] += len(rest) + 1
            if self._tell is not None:
                self._tell(name, rest)


Hear = Callable[[bytes], object]


def run(argv: Sequence[str], out: Hear, err: Hear, *, limit_s: float = 20.0) -> int:
    """Run one of the programs, and hand on what it prints as it comes; gives its status.

    When the time is over it is ended, with all that it has started. Raises VTorqueError (VT-ACCESS) where it is not
    installed.
    """
    child: Optional[subprocess.Popen[bytes]] = None
    try:
        with undisturbed() as mask:  # an exception of a signal's would lose what has just been started
            child = _start(argv, mask)
        return _follow(child, out, err, limit_s)
    except BaseException:
        if child is not None:
            with undisturbed(), child:  # a second signal would leave the rest
                _end(child)
        raise


def _start(argv: Sequence[str], mask: Iterable[int]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=dies_with(os.getpid(), mask=mask),
        )
    except FileNotFoundError:
        raise _missing(PDSH if argv[0] == PDSH else CLUSH) from None
    except OSError as error:
        raise VTorqueError(f"{argv[0]} cannot be started: {error.strerror}", code=Code.ACCESS) from error


def _follow(child: subprocess.Popen[bytes], out: Hear, err: Hear, limit_s: float) -> int:
    assert child.stdout is not None and child.stderr is not None
    with child.stdout, child.stderr, selectors.DefaultSelector() as streams:
        streams.register(child.stdout, selectors.EVENT_READ, out)
        streams.register(child.stderr, selectors.EVENT_READ, err)
        if not _listen(streams, limit_s):
            _end(child)
            _listen(streams, END_SECONDS)
        with suppress(subprocess.TimeoutExpired):
            return child.wait(END_SECONDS)
        _end(child)
        return child.wait()


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
    child.send_signal(signal.SIGSTOP)  # it starts no more meanwhile
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    started = _descendants(child.pid)
    child.kill()
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _descendants(parent: int) -> list[int]:
    """All processes below one."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            fields = stat.read_bytes().rpartition(b")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, left = [], [parent]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found
