"""Namespaces of Linux: making, entering and filling them, for simulated nodes (namespaces(7), setns(2), mount(2)).

The numbers are those of <sched.h>, <sys/mount.h> and <sys/prctl.h>; Python 3.9 has no `os.setns`. Loaded only
where there are nodes. All of it holds for a process of one thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import Callable, NamedTuple, Union

NEWNS = 0x00020000
NEWUTS = 0x04000000
NEWPID = 0x20000000
NEWNET = 0x40000000

MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

_libc = ctypes.CDLL(None, use_errno=True)


def _raise(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(kinds: int) -> None:
    """Go into new namespaces; of process ids, the children. Raises OSError."""
    if _libc.unshare(kinds) != 0:
        _raise("unshare")


def setns(descriptor: int, kind: int) -> None:
    """Go into a namespace; of process ids, the children. Raises OSError."""
    if _libc.setns(descriptor, kind) != 0:
        _raise("setns")


def mount(source: Union[str, Path], target: Union[str, Path], kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError with the target in its text."""
    texts = [os.fsencode(text) for text in (source, target, kind)]
    if _libc.mount(*texts, ctypes.c_ulong(flags), os.fsencode(data) if data else None) != 0:
        _raise(f"mount {target}")


def die_with_parent() -> None:
    """Be killed when the parent ends, whose end before this call is not noticed."""
    if _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        _raise("prctl")


def set_name(name: str) -> None:
    """What `ps` and `top` call this process, up to 15 bytes."""
    _libc.prctl(_PR_SET_NAME, os.fsencode(name), 0, 0, 0)


def open_namespace(pid: Union[int, str], kind: str) -> int:
    """A descriptor of a namespace of a process: `kind` is a name in /proc/PID/ns. Raises OSError."""
    return os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def _fork_after(change: Callable[[], None]) -> int:
    """Fork a child into the namespace of process ids that `change` chooses; later ones are in our own again.

    In the child, which returns 0, nothing of that is undone. Raises OSError.
    """
    own = open_namespace("self", "pid")
    pid = -1
    try:
        change()
        pid = os.fork()
    finally:
        if pid != 0:
            setns(own, NEWPID)
        os.close(own)
    return pid


def fork_first() -> int:
    """Fork the first process of a new namespace of process ids; 0 in the child. Raises OSError."""
    return _fork_after(lambda: unshare(NEWPID))


def new_network() -> int:
    """A network namespace that lives as long as this descriptor of it."""
    own = open_namespace("self", "net")
    try:
        unshare(NEWNET)
        try:
            return open_namespace("self", "net")
        finally:
            setns(own, NEWNET)
    finally:
        os.close(own)


class Place(NamedTuple):
    """The namespaces of a node, as descriptors."""

    node: str
    pid: int
    net: int
    uts: int
    mnt: int

    @classmethod
    def of(cls, node: str, process: int) -> Place:
        """Those of a process. Raises OSError."""
        opened: list[int] = []
        try:
            for kind in cls._fields[1:]:
                opened.append(open_namespace(process, kind))
        except OSError:
            for descriptor in opened:
                os.close(descriptor)
            raise
        return cls(node, *opened)

    @property
    def descriptors(self) -> tuple[int, ...]:
        return self[1:]

    def fork(self) -> int:
        """Fork a child into the node's namespace of process ids; it has to `enter` the others.

        Raises OSError, with the node's name when the node has gone.
        """
        try:
            return _fork_after(lambda: setns(self.pid, NEWPID))
        except OSError as error:
            raise OSError(error.errno, f"no process can be started in node {self.node}: {error.strerror}") from None

    def enter(self) -> None:
        """Go into the other namespaces of the node, at its root; then let go of the descriptors. Raises OSError."""
        setns(self.net, NEWNET)
        setns(self.uts, NEWUTS)
        setns(self.mnt, NEWNS)
        self.close()

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
