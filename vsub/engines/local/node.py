"""One simulated node: the first process of its namespaces, and what that mounts for it.

The process is a fork of the daemon and does nothing but reap. It dies when the daemon does, whatever ends that, and
with it the kernel ends every process of the node.
"""

from __future__ import annotations

import os
import re
import signal
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

from vsub.engines.local import namespaces
from vsub.engines.local.namespaces import Place


class Own(NamedTuple):
    """A folder of which each node has its own: below the spool, or in memory and so empty at each start."""

    path: Path
    volatile: bool


def own_folders(spool: Path, private: Iterable[Path], volatile: Iterable[Path]) -> list[Own]:
    """What each node gets for its own, outer folders first; what lies in another one needs no mount of its own.

    Raises ValueError for a folder that would hide the spool from the nodes.
    """
    found: list[Own] = []
    wanted = {path: Own(path, False) for path in private}
    wanted.update({path: Own(path, True) for path in volatile})
    for path, own in sorted(wanted.items()):
        if spool == path or path in spool.parents:
            raise ValueError(f"{path} cannot be each node's own: {spool}, which all nodes need, lies in it")
        around = [other for other in found if other.path in path.parents]
        if not around or (own.volatile and not any(other.volatile for other in around)):
            found.append(own)
    return found


class Plan(NamedTuple):
    """What a node is to be."""

    name: str
    folder: Path
    """Below the daemon's spool."""
    hosts: Path
    """The file that is /etc/hosts in the node."""
    own: tuple[Own, ...]

    def source(self, own: Own) -> Path:
        """The folder that lies over another one in this node."""
        return self.folder / "own" / os.fspath(own.path).lstrip("/")

    def create(self) -> None:
        """Make the node's own folders as the machine's are, and the machine's where it has none. Raises OSError."""
        (self.folder / "own").mkdir(mode=0o711, exist_ok=True)
        for own in self.own:
            own.path.mkdir(mode=0o755, parents=True, exist_ok=True)
            if not own.volatile:
                seen, source = own.path.stat(), self.source(own)
                source.mkdir(mode=0o755, parents=True, exist_ok=True)
                os.chown(source, seen.st_uid, seen.st_gid)
                source.chmod(stat.S_IMODE(seen.st_mode))


def _mount_sys(folder: Path) -> None:
    """/sys of this network namespace, with what is mounted in the machine's (cgroups and the like)."""
    new = folder / "sys"
    new.mkdir(mode=0o755, exist_ok=True)
    namespaces.mount("sysfs", new, "sysfs", namespaces.MS_NOSUID | namespaces.MS_NODEV | namespaces.MS_NOEXEC)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4])
        inside = point.partition("/sys/")
        if inside[0] == "" and inside[1] and (new / inside[2]).is_dir():
            namespaces.mount(point, new / inside[2], flags=namespaces.MS_BIND)
    namespaces.mount(new, "/sys", flags=namespaces.MS_MOVE)


def _mount_all(plan: Plan) -> None:
    plain = namespaces.MS_NOSUID | namespaces.MS_NODEV
    namespaces.mount("proc", "/proc", "proc", plain | namespaces.MS_NOEXEC)
    _mount_sys(plan.folder)
    namespaces.mount(plan.hosts, "/etc/hosts", flags=namespaces.MS_BIND)
    for own in plan.own:
        own.path.mkdir(mode=0o755, parents=True, exist_ok=True)  # in the node: it may lie in an own one
        if own.volatile:
            mode = stat.S_IMODE(own.path.stat().st_mode)
            namespaces.mount("tmpfs", own.path, "tmpfs", plain, f"mode={mode:o}")
        else:
            namespaces.mount(plan.source(own), own.path, flags=namespaces.MS_BIND)


def _be_first(plan: Plan, go: int, tell: int) -> NoReturn:
    """The first process of a node; never returns."""
    try:
        namespaces.die_with_parent()
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        namespaces.set_name(f"vtorque-{plan.name}")
        _keep_only(go, tell)
        namespaces.unshare(namespaces.NEWNS | namespaces.NEWNET | namespaces.NEWUTS)
        namespaces.mount("none", "/", flags=namespaces.MS_REC | namespaces.MS_PRIVATE)
        os.write(tell, b"r")
        if os.read(go, 1) == b"g":  # else the daemon is gone or gave up
            import socket

            socket.sethostname(plan.name)
            _mount_all(plan)
            os.chdir("/")
            os.write(tell, b"k")
            os.close(tell)
            while True:
                signal.sigwait({signal.SIGCHLD})
                _reap()
    except BaseException as error:
        os.write(tell, f"node {plan.name}: {error}".encode("utf-8", "replace"))
    finally:
        os._exit(1)


def _keep_only(*wanted: int) -> None:
    """Standard streams that lead nowhere, and no other descriptors but these."""
    null = os.open("/dev/null", os.O_RDWR)
    for target in (0, 1, 2):
        os.dup2(null, target)
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if int(entry) not in {0, 1, 2, *wanted}:
            try:
                os.close(int(entry))
            except OSError:
                pass  # the descriptor of the listing itself


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


class Node:
    """A node in the making, then running: `process` is the pid of its first process."""

    def __init__(self, plan: Plan) -> None:
        self.name = plan.name
        go, self._go = os.pipe()
        self._told, tell = os.pipe()
        try:
            self.process = namespaces.fork_first()
            if self.process == 0:
                _be_first(plan, go, tell)
        finally:
            os.close(go)
            os.close(tell)

    def place(self) -> Place:
        """Its namespaces, as soon as it has made them. Raises OSError."""
        self._expect(b"r")
        return Place.of(self.name, self.process)

    def finish(self) -> None:
        """Let it mount what it needs; returns when processes can be started in it. Raises OSError."""
        os.write(self._go, b"g")
        self._expect(b"k")
        os.close(self._go)
        os.close(self._told)

    def _expect(self, word: bytes) -> None:
        told = os.read(self._told, 4096)
        if told != word:
            raise OSError(told.decode("utf-8", "replace") or f"node {self.name} was killed while it started")
