"""What the benchmarks of the node side share: an installation of their own, its hooks called as TORQUE calls them.

`open_site` puts the toolkit under a prefix of its own with a configuration, a pool and an account of its own, and takes
all of it away again, also after Ctrl-C. No batch system is needed: a prologue is a session leader with TORQUE's 8
arguments, an epilogue one with 11.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import resource
import secrets
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from vmgr.errors import VTorqueError  # noqa: E402
from vmgr.images.pool import Image, Pool  # noqa: E402
from vmgr.jobspec import GuestGroup, Pinning, Spec, SpecPath, dump_spec, spec_hash  # noqa: E402

POOL = Path("/var/lib/vtorque/images")
PATIENCE_S = 300
SETTLE_S = 1.0

CONFIG = """\
engine: torque
paths: {{spool: {root}/spool, run: {run}}}
images: {{pool: {root}/images, overlays: {root}/overlays, overlays_max: 100G}}
hypervisor: {{allow_emulation: true}}
policy: {{img: {{default: micro}}, vcpus: {{max: 64}}, ram: {{max: 64G}}}}
mounts:
  - {{name: home, source: "{{home}}", target: "{{home}}"}}
guest: {{vm_hooks: {root}/vm}}
timeouts: {{boot: {patience}}}
logging: {{file: {root}/log/node.log}}
"""


class Cost(NamedTuple):
    """Milliseconds that a program took: wall, and CPU with that of its children."""

    wall: float
    cpu: float


def measure(argv: Sequence[str], user: Optional[int] = None) -> Cost:
    """Run a program as a session leader, with the rights of `user` or the caller's."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, check=True, user=user
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(wall * 1000, (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000)


def median(costs: Sequence[Cost]) -> Cost:
    return Cost(statistics.median(cost.wall for cost in costs), statistics.median(cost.cpu for cost in costs))


class Job:
    """One guest job of the site's: its hooks and its agent."""

    def __init__(self, site: Site, job_id: str, directory: str) -> None:
        self.site, self.job_id = site, job_id
        self.resources = f"prologue={directory}/prologue,walltime=01:00:00"
        self._link: Optional[socket.socket] = None
        self._answers: Iterator[bytes] = iter(())
        self.stages: dict[str, float] = {}

    def prologue(self) -> Cost:
        return measure(self.site.prologue_argv(self.job_id, self.resources))

    def epilogue(self) -> Cost:
        return measure(self.site.epilogue_argv(self.job_id, self.resources))

    def wait_for(self, stage: str) -> dict[str, float]:
        """Follow the agent up to a stage; gives the stages so far, in seconds since the hook started."""
        if self._link is None:
            (address,) = (self.site.run / "jobs" / self.job_id).glob("*.sock")
            self._link = socket.socket(socket.AF_UNIX)
            self._link.settimeout(PATIENCE_S)
            self._link.connect(str(address))
            self._link.sendall(b'{"op": "follow"}\n')
            self._answers = iter(self._link.makefile("rb"))
        while stage not in self.stages:
            answer = json.loads(next(self._answers, b"{}"))
            if not answer or (answer.get("code") and stage != "gone"):
                raise RuntimeError(f"job {self.job_id} did not reach {stage!r}: {answer or 'its agent is gone'}")
            self.stages = {entry["name"]: entry["t"] for entry in answer["stages"]}
        return self.stages

    def pid(self, role: str) -> int:
        """The process that stands in the attempt's record as `agent` or `qemu`."""
        (record,) = (self.site.root / "spool" / "jobs" / self.job_id).glob("*/record")
        steps = [json.loads(line) for line in record.read_text().splitlines()]
        return next(int(step["pid"]) for step in steps if step.get("role") == role)

    def end(self) -> float:
        """The job is over: seconds until its agent has ended, and the guest with it."""
        agent = os.pidfd_open(self.pid("agent"))
        assert self._link is not None
        started = time.perf_counter()
        self._link.sendall(b'{"op": "end"}\n')
        self.wait_for("gone")
        self.leave()
        wait_for_end(agent)
        return time.perf_counter() - started

    def leave(self) -> None:
        """Do not follow the agent any longer."""
        if self._link is not None:
            self._link.shutdown(socket.SHUT_RDWR)
            self._link.close()
            self._link = None


def wait_for_end(pidfd: int) -> None:
    """Wait until the process behind a pidfd has ended, and close it."""
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(PATIENCE_S * 1000):
            raise RuntimeError("a process does not end")
    finally:
        os.close(pidfd)


class Site:
    """An installation for one benchmark."""

    def __init__(self, word: str) -> None:
        self.prefix, self.root = Path(f"/opt/vtorque-bench-{word}"), Path(f"/var/lib/vtorque-bench-{word}")
        self.run = Path(f"/run/vtb-{word}")  # the path of a socket has to be short
        self.account = f"vtb{word}"
        self.home = self.root / "home"
        self.pool = Pool(self.root / "images")
        self._jobs: list[Job] = []

    @property
    def python(self) -> str:
        return str(self.prefix / "venv" / "bin" / "python3")

    def install(self) -> None:
        for folder in (self.root, self.root / "vm", self.root / "log", self.home, self.pool.path):
            folder.mkdir(mode=0o755)
        (self.root / "site.yaml").write_text(CONFIG.format(root=self.root, run=self.run, patience=PATIENCE_S))
        install = [str(REPOSITORY / "install.sh"), "--prefix", str(self.prefix), "--no-links"]
        subprocess.run(
            [*install, "--config", str(self.root / "site.yaml")],
            env={**os.environ, "TMPDIR": str(self.root)},
            check=True,
        )
        _account("useradd", "--no-create-home", "--home-dir", str(self.home), "--shell", "/bin/sh", self.account)
        self._give(self.home)

    def adopt(self, name: str) -> Image:
        """An image of this machine's pool, by hard links, in the site's own."""
        image = Pool(POOL).get(name)
        with self.pool.staging(name) as work:
            for file in image.files:
                _link(image.directory / file, work / file)
            return self.pool.publish(work, name, _facts(image))

    def with_disk(self, name: str, size: int, like: Image) -> Image:
        """An image that boots like `like`, and has a qcow2 disk that really takes `size` bytes."""
        with self.pool.staging(name) as work:
            for part in (like.kernel, like.initrd, like.packages):
                assert part
                _link(like.directory / part, work / part)
            subprocess.run(
                [
                    "qemu-img", "create", "-q",
                    "-f", "qcow2",
                    "-o", "preallocation=falloc",
                    str(work / "disk.qcow2"),
                    str(size),
                ],
                check=True,
            )  # fmt: skip
            # nobody asks here for the checksum of the disk's 20 GB
            known = {"disk.qcow2": {"sha256": "0" * 64, "size": (work / "disk.qcow2").stat().st_size}}
            self.pool.publish(work, name, {**_facts(like), "disk": "disk.qcow2", "virtual_size": size}, known=known)
        return self.pool.get(name)

    def job(self, image: str, *, vcpus: int = 1, ram_mib: int = 256) -> Job:
        """A new job of the site's user, submitted as far as a node can see."""
        number = len(self._jobs) + 1
        ruid = f"bench{number:05d}"
        folder = self.home / ".vtorque" / ruid
        key = self.root / "key"
        if not key.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(key)], check=True)
        spec = Spec(
            ruid=ruid,
            groups=(GuestGroup(image, 1, vcpus, ram_mib),),
            asked=(),
            distro=None,
            arch=None,
            pinning=Pinning("auto", None),
            fs_type="overlay",
            disk=None,
            metadata=None,
            mounts=("home",),
            network="user",
            iocm=None,
            suspend=False,
            vrdma=False,
            unclot_mib=None,
            workdir=str(self.home),
            shell=None,
            interactive=False,
            array=None,
            script="0" * 64,
            arguments="",
            vm_prologue=None,
            vm_epilogue=None,
            ssh_public_key=key.with_suffix(".pub").read_text().strip(),
            keep=False,
        )
        data = dump_spec(spec)
        path = SpecPath(str(self.home), ruid, spec_hash(data))
        Path(path.directory).mkdir(parents=True)
        (Path(path.directory) / "spec.json").write_bytes(data)
        for theirs in (folder.parent, folder, Path(path.directory), Path(path.directory) / "spec.json"):
            self._give(theirs)
        job = Job(self, f"{number}.bench", path.directory)
        self._jobs.append(job)
        return job

    def prologue_argv(self, job_id: str, resources: str) -> list[str]:
        return [self._hook("prologue"), job_id, self.account, self.account, "bench", resources, "batch", "", "/bench"]

    def epilogue_argv(self, job_id: str, resources: str) -> list[str]:
        session, used, status = "1", "cput=00:00:00,walltime=00:00:01", "0"
        return [
            self._hook("epilogue"),
            job_id, self.account, self.account, "bench",
            session, resources, used, "batch", "", status, "/bench",
        ]  # fmt: skip

    def left(self) -> list[str]:
        """What jobs have left: processes, and files of theirs."""
        found = [
            str(path)
            for parent, place in (
                (self.root, "spool/jobs"),
                (self.root, "overlays"),
                (self.run, "jobs"),
                (self.run, "tombstones"),
                (self.run, "ended"),
            )
            for path in (parent / place).glob("*")
        ]
        return found + [f"process {pid}: {line[:100]}" for pid, line in self._processes()]

    def assert_clean(self) -> None:
        """Nothing is left of the jobs so far; a killed agent's child that writes a user's file may still finish."""
        left = self.left()
        deadline = time.monotonic() + SETTLE_S
        while left and time.monotonic() < deadline:
            time.sleep(0.005)
            left = self.left()
        if left:
            raise RuntimeError(f"left behind: {left}")

    def remove(self) -> list[str]:
        """Take the site away; gives what its jobs would have left behind."""
        for job in self._jobs:
            if (self.root / "spool" / "jobs" / job.job_id).exists():
                with contextlib.suppress(OSError, subprocess.SubprocessError):
                    job.epilogue()
        left = self.left()
        for pid, _ in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if any(entry.pw_name == self.account for entry in pwd.getpwall()):
            _account("userdel", self.account)
        for folder in (self.prefix, self.root, self.run):
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                left.append(str(folder))
        return left

    def _hook(self, name: str) -> str:
        return str(self.prefix / "share" / "vtorque" / "mom_priv_hooks" / name)

    def _give(self, path: Path) -> None:
        entry = pwd.getpwnam(self.account)
        os.chown(path, entry.pw_uid, entry.pw_gid)
        path.chmod(0o700 if path.is_dir() else 0o600)

    def _processes(self) -> Iterator[tuple[int, str]]:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                if str(self.prefix) in line or str(self.root) in line:
                    yield int(path.parent.name), line


def _account(*command: str) -> None:
    """Change the accounts of this machine, which somebody else may be doing too."""
    for attempt in range(20):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return
        time.sleep(0.1 * (attempt + 1))
    raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _facts(image: Image) -> dict[str, Any]:
    own = {"folder", "name", "revision", "created", "files"}
    return {key: value for key, value in image._asdict().items() if key not in own}


@contextlib.contextmanager
def open_site(name: str) -> Iterator[Site]:
    """A site that is gone afterwards. Raises RuntimeError when its jobs left something behind."""
    site = Site(secrets.token_hex(3))
    print(f"{name}: installing under {site.prefix}", file=sys.stderr)
    left = ["everything"]
    try:
        site.install()
        yield site
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        left = site.remove()
        if left:
            print(f"{name}: left behind and removed: {left}", file=sys.stderr)
    if left:
        raise RuntimeError("the jobs of this benchmark left something behind")


def run(name: str, body: Callable[[], None]) -> int:
    """A benchmark's main: `body` as root, its failures in one line. Gives the exit status."""
    if os.geteuid() != 0:
        print(f"{name}: needs root (sudo bench/{name})")
        return 1

    def stop(signum: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        body()
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    except (VTorqueError, RuntimeError, OSError, subprocess.SubprocessError) as err:
        print(f"{name}: {err}", file=sys.stderr)
        return 1
    return 0


def tell(round_number: int, rounds: int, text: str = "") -> None:
    """Progress of a long benchmark, on standard error."""
    print(f"round {round_number} of {rounds}{': ' + text if text else ''}", file=sys.stderr)
