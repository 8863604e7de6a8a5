"""Fixtures for the embedded batch system: a real daemon in a spool of its own, and real unprivileged users."""

from __future__ import annotations

import ctypes
import json
import os
import pwd
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import pytest

from vsub.engines.local import client, daemon, network, protocol, qsub

REPOSITORY = Path(__file__).resolve().parents[2]
DAEMON = (
    f"import sys; sys.path.insert(0, {os.fspath(REPOSITORY)!r}); "
    "from vsub.engines.local.daemon import main; sys.exit(main(sys.argv[1:]))"
)
PATIENCE_S = 20.0
SETTINGS = {"prologalarm_s": 2, "kill_delay_s": 2, "deliver_timeout_s": 1.5, "requeue_limit": 3}

RECORDER = """#!/bin/sh
# notes how it was called, then does what the test wants
me=$(basename "$0")
stdout=$(readlink /proc/$$/fd/1)
out=$(mktemp "@RECORD@/$me.XXXXXX")
{
    echo "uid=$(id -u)"; echo "gid=$(id -g)"; echo "cwd=$(pwd -P)"; echo "umask=$(umask)"; echo "count=$#"
    echo "session=$(cut -d' ' -f6 /proc/$$/stat)"; echo "pid=$$"; echo "stdin=$(readlink /proc/$$/fd/0)"
    echo "host=$(uname -n)"; echo "stdout=$stdout"; echo "stderr=$(readlink /proc/$$/fd/2)"
    sed -n 's/^SigIgn:[[:space:]]*/sigign=/p' /proc/$$/status
    i=1; for a; do echo "arg$i=$a"; i=$((i + 1)); done
    env | sed 's/^/env:/'
} > "$out"
echo "$me $1 $(uname -n)" >> "@RECORD@/order"
@EXTRA@
exit 0
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs root: it changes users and starts the daemon."""
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.fspath).parents:
            item.add_marker(pytest.mark.root)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs root: starts jobs as other users"))


class Result(NamedTuple):
    """What a client did."""

    status: int
    out: str
    err: str


class User(NamedTuple):
    """An account made for the tests."""

    name: str
    uid: int
    gid: int
    home: Path

    def call(
        self,
        body: Callable[[], int],
        *,
        cwd: Optional[Path] = None,
        env: Optional[dict[str, str]] = None,
        stdin: bytes = b"",
    ) -> Result:
        """Run `body` in a child that is this user, with streams of its own."""
        files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 - closed below
        files[0].write(stdin)
        files[0].seek(0)
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                os.initgroups(self.name, self.gid)
                os.setresgid(self.gid, self.gid, self.gid)
                os.setresuid(self.uid, self.uid, self.uid)
                os.chdir(cwd or self.home)
                os.environ.clear()
                os.environ.update({"HOME": str(self.home), "LOGNAME": self.name, "PATH": "/bin:/usr/bin"})
                os.environ.update(env or {})
                for number, file in enumerate(files):
                    os.dup2(file.fileno(), number)
                sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
                status = body()
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
        _, raw = os.waitpid(pid, 0)
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read().decode())
            file.close()
        return Result(os.waitstatus_to_exitcode(raw), texts[1], texts[2])

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        """A file of this user's in their home."""
        path = self.home / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        os.chown(path, self.uid, self.gid)
        return path

    def processes(self) -> list[int]:
        """Living processes with this uid."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                alive = entry.name.isdigit() and entry.stat().st_uid == self.uid
                if alive and ") Z " not in (entry / "stat").read_text():
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                pass
        return found


ROOT = User("root", 0, 0, Path("/root"))


def _make_user() -> User:
    name = f"vtl{secrets.token_hex(4)}"
    subprocess.run(["useradd", "-m", "-k", "/nonexistent", "-s", "/bin/bash", "-d", f"/home/{name}", name], check=True)
    entry = pwd.getpwnam(name)
    return User(name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


def _users() -> Iterator[User]:
    user = _make_user()
    try:
        yield user
        assert user.processes() == []
    finally:
        subprocess.run(["userdel", "-r", user.name], check=True, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def account() -> Iterator[User]:
    yield from _users()


@pytest.fixture(scope="session")
def other_account() -> Iterator[User]:
    yield from _users()


def _empty(home: Path) -> None:
    for path in home.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@pytest.fixture
def user(account: User) -> Iterator[User]:
    """A user with an empty home and, afterwards, no processes."""
    yield account
    left = account.processes()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    _empty(account.home)
    assert left == []


@pytest.fixture
def other(other_account: User) -> Iterator[User]:
    """Another user."""
    yield other_account
    _empty(other_account.home)
    assert other_account.processes() == []


def alive(pid: int) -> bool:
    """Whether there is such a process that is more than a zombie."""
    try:
        return pid > 0 and ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


class Gate:
    """A FIFO between a job and the test: each waits for the other without polling."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        path.chmod(0o666)
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def wait(self) -> str:
        """A line that a job has written."""
        ready, _, _ = select.select([self._descriptor], [], [], PATIENCE_S)
        assert ready, f"nothing came through {self.path}"
        return os.read(self._descriptor, 4096).decode()

    def open(self) -> None:
        """Let one reader go on."""
        os.write(self._descriptor, b"go\n")

    def close(self) -> None:
        os.close(self._descriptor)


class System:
    """A daemon with a spool of its own."""

    def __init__(self, root: Path, nodes: int = 1) -> None:
        self.root = root
        self.own = root / "own"
        self.volatile = root / "volatile"
        self._nodes = ["--nodes", str(nodes), "--private", str(self.own), "--volatile", str(self.volatile)]
        self.spool = root / "spool"
        self.mom_priv = self.spool / "mom_priv"
        self.record = root / "record"
        self.socket = os.fspath(root / "sock")
        self.settings = root / "settings.json"
        self.host = socket.gethostname()
        self._gates: list[Gate] = []
        self.record.mkdir()
        self.record.chmod(0o1777)
        (self.record / "order").touch()
        (self.record / "order").chmod(0o666)
        self.configure()

    def configure(self, **changes: float) -> None:
        """Write the settings file."""
        self.settings.write_text(json.dumps({**SETTINGS, **changes}))

    def daemon(self, command: str, *more: str) -> subprocess.CompletedProcess[str]:
        """Run vtorque-local."""
        arguments = [sys.executable, "-I", "-c", DAEMON, command, "--spool", os.fspath(self.spool)]
        if command != "stop":
            arguments += ["--socket", self.socket]
        if command == "start":
            arguments += ["--settings", os.fspath(self.settings), *self._nodes]
        return subprocess.run([*arguments, *more], capture_output=True, text=True, timeout=60, check=False)

    def start(self) -> None:
        """Start it from a fork of this process, which saves the time of an interpreter."""
        arguments = ["--spool", str(self.spool), "--socket", self.socket, "--settings", str(self.settings)]
        arguments += self._nodes
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                status = daemon.main(["start", *arguments])
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    def stop(self) -> None:
        try:
            pid = self.pid
        except FileNotFoundError:
            pid = 0
        assert daemon.main(["stop", "--spool", str(self.spool)]) == 0
        assert not alive(pid)

    @property
    def pid(self) -> int:
        return int(json.loads((self.spool / "server_priv" / "pid").read_text())["pid"])

    def kill(self) -> None:
        """SIGKILL for the daemon, and its end."""
        pidfd = os.pidfd_open(self.pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], PATIENCE_S)[0]
        os.close(pidfd)

    def log(self) -> str:
        return (self.spool / "server_priv" / "log").read_text()

    def gate(self, name: str) -> Gate:
        gate = Gate(self.record / name)
        self._gates.append(gate)
        return gate

    def enter(self, node: str, *command: str) -> str:
        """The output of a command of root's in a simulated node; it must succeed."""
        arguments = [sys.executable, "-I", "-c", DAEMON, "enter", "--spool", str(self.spool), node, *command]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def node_spools(self) -> list[Path]:
        """The spool directories of simulated nodes."""
        return sorted((self.spool / "nodes").glob("n[0-9]*"))

    def traces(self) -> list[str]:
        """What simulated nodes would leave on the machine: links, and mounts or namespaces of processes."""
        found = [link.name for link in Path("/sys/class/net").iterdir() if link.name == network.link_name(self.spool)]
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.root) in (process / "mountinfo").read_text():
                    found.append(f"mounts of {process.name}")
            except OSError:
                pass  # it has ended
        return found

    def hook(self, name: str, extra: str = "", *, mode: int = 0o755, directory: Optional[Path] = None) -> Path:
        """A hook that records its call and then runs `extra`."""
        path = (directory or self.mom_priv) / name
        path.write_text(RECORDER.replace("@RECORD@", str(self.record)).replace("@EXTRA@", extra))
        path.chmod(mode)
        return path

    def order(self) -> list[str]:
        """Names of the hooks that ran, in order."""
        return [line.split()[0] for line in (self.record / "order").read_text().splitlines()]

    def order_on_nodes(self) -> list[str]:
        """`node:hook` for each hook that ran, in order."""
        lines = [line.split() for line in (self.record / "order").read_text().splitlines()]
        return [f"{node}:{name}" for name, _, node in lines]

    def calls(self, name: str) -> list[dict[str, str]]:
        """What was recorded of each call of a hook."""
        found = []
        for path in sorted(self.record.glob(f"{name}.??????"), key=lambda path: path.stat().st_mtime_ns):
            found.append(dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line))
        return found

    def qsub(self, user: User, *arguments: str, script: Optional[str] = None, **more: object) -> Result:
        """qsub as the user; `script` goes through standard input."""
        stdin = (script or "").encode()
        return user.call(lambda: qsub.qsub_main(list(arguments), self.socket), stdin=stdin, **more)  # type: ignore[arg-type]

    def submit(self, user: User, *arguments: str, script: str = "true\n", **more: object) -> str:
        """qsub that must succeed: the job's id."""
        done = self.qsub(user, *arguments, script=script, **more)
        assert (done.status, done.err) == (0, "")
        return done.out.strip()

    def result(self, job: str) -> dict[str, object]:
        """Wait for the end of a job."""
        with client.completion(self.socket, job) as connection:
            connection.settimeout(PATIENCE_S)
            return protocol.decode(protocol.read_line(connection))

    def run(self, user: User, *arguments: str, script: str = "true\n", **more: object) -> tuple[str, object]:
        """Submit and wait: job id and exit status."""
        job = self.submit(user, *arguments, script=script, **more)
        return job, self.result(job)["exit_status"]

    def qdel(self, *arguments: str) -> int:
        return client.qdel_main(list(arguments), self.socket)

    def qhold(self, *arguments: str) -> int:
        return client.qhold_main(list(arguments), self.socket)

    def qrls(self, *arguments: str) -> int:
        return client.qrls_main(list(arguments), self.socket)

    def qrerun(self, *arguments: str) -> int:
        return client.qrerun_main(list(arguments), self.socket)

    def leftovers(self) -> list[str]:
        """Files of jobs that should be gone."""
        spools = [self.spool, *self.node_spools()]
        layout = [spool / name for spool in spools for name in ("mom_priv/jobs", "aux", "spool")]
        found = [path for directory in layout for path in directory.iterdir()]
        found += [path for path in (self.spool / "server_priv" / "jobs").iterdir() if path.suffix != ".json"]
        return [str(path) for path in found]

    def close(self) -> None:
        for gate in self._gates:
            gate.close()


def _processes_with(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if text in command:
                    found.append(f"{entry.name} {command}")
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


@pytest.fixture
def system() -> Iterator[System]:
    """A running daemon; afterwards nothing of it is left."""
    yield from _systems(1)


@pytest.fixture
def cluster() -> Iterator[System]:
    """Likewise with three simulated nodes."""
    yield from _systems(3)


def _systems(nodes: int) -> Iterator[System]:
    root = Path(tempfile.mkdtemp(prefix="vtorque-local-", dir="/var/tmp"))
    root.chmod(0o755)
    made = System(root, nodes)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        left, running, traces = made.leftovers(), _processes_with(str(root)), made.traces()
        made.close()
        shutil.rmtree(root)
    assert (left, running, traces) == ([], [], [])


@pytest.fixture
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mount point where every access hangs: a FUSE file system that nobody serves."""
    if not Path("/dev/fuse").exists():
        pytest.skip("no /dev/fuse: a path that hangs cannot be made")
    libc = ctypes.CDLL(None, use_errno=True)
    directory = Path(tempfile.mkdtemp(prefix="vtorque-hang-", dir="/var/tmp"))
    descriptor = os.open("/dev/fuse", os.O_RDWR)
    data = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"hang", os.fsencode(directory), b"fuse", 0, data) != 0:
        os.close(descriptor)
        directory.rmdir()
        pytest.skip(f"cannot mount: {os.strerror(ctypes.get_errno())}")
    try:
        yield directory
    finally:
        libc.umount2(os.fsencode(directory), 2)
        os.close(descriptor)
        directory.rmdir()
