"""A whole installation of its own for the end-to-end tests: real users, a batch system, real guests.

That is the embedded one, unless a module says otherwise: `ENGINES` of one names those that its tests run on. One with
a configuration of its own has a fixture `site` that starts `on_engine(request.param, …)`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import psutil
import pytest

if TYPE_CHECKING:
    from .terminal import Terminal

REPOSITORY = Path(__file__).resolve().parents[2]
POOL = Path("/var/lib/vtorque/images")
PATIENCE_S = 480
"""How long what a user runs may take, a whole job for instance."""

CONFIG = """\
engine: local
submit: {{without_vm: guest}}
local: {{spool: {root}/local, socket: {root}/local.sock}}
paths: {{spool: {root}/spool, run: {run}}}
images: {{pool: {pool}, overlays: {root}/overlays, overlays_max: 30G}}
hypervisor: {{allow_emulation: true}}
policy:
  img: {{default: micro}}
  vcpus: {{min: 1, max: 2, default: 1}}
  ram: {{min: 192M, max: 2G, default: 256M}}
mounts:
  - {{name: home, source: "{{home}}", target: "{{home}}"}}
  - {{name: opt-hpc, source: {root}/opt, target: /opt-hpc, readonly: true}}
guest: {{vm_hooks: {root}/vm}}
timeouts: {{user_file: 2, boot: 400, attach: 20}}
logging: {{level: debug, file: {root}/log/node.log}}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs root and boots guests."""
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents:
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.guest)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs root: installs the toolkit and adds users"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of a module on each of its `ENGINES`; one marked `only(ENGINE, reason=…)` on that one."""
    engines: tuple[str, ...] = getattr(metafunc.module, "ENGINES", ())
    if not engines or "site" not in metafunc.fixturenames:
        return
    only = metafunc.definition.get_closest_marker("only")
    cases = []
    for engine in engines:
        marks = [] if engine == "local" else [pytest.mark.slow, pytest.mark.timeout(900)]
        if only is not None and engine not in only.args:
            marks.append(pytest.mark.skip(reason=only.kwargs["reason"]))
        name = pytest.HIDDEN_PARAM if engine == "local" else engine
        cases.append(pytest.param(engine, id=name, marks=marks))
    metafunc.parametrize("site", cases, indirect=True)


class Done(NamedTuple):
    """How a job ended: its id, the exit status of `vsub --wait`, what it said, and the delivered output."""

    job_id: str
    status: int
    progress: str
    out: str
    err: str


class User:
    """A real account, removed after the tests."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.name = f"vt{secrets.token_hex(4)}"
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", self.name], check=True)
        entry = pwd.getpwnam(self.name)
        self.uid, self.gid, self.home = entry.pw_uid, entry.pw_gid, Path(entry.pw_dir)

    def remove(self) -> None:
        subprocess.run(["userdel", "--remove", self.name], check=True, stderr=subprocess.DEVNULL)

    def start(
        self, *argv: str, cwd: Optional[Path] = None, env: Optional[dict[str, str]] = None, umask: int = 0o022
    ) -> subprocess.Popen[str]:
        """Start a program as this user, in the user's home."""
        return subprocess.Popen(
            argv,
            user=self.uid,
            group=self.gid,
            extra_groups=[],
            cwd=cwd or self.home,
            env={
                "PATH": "/usr/bin:/bin",
                "HOME": str(self.home),
                "LANG": "C.UTF-8",
                **self.site.environment,
                **(env or {}),
            },
            umask=umask,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *argv: str, **options: object) -> subprocess.CompletedProcess[str]:
        child = self.start(*argv, **options)  # type: ignore[arg-type]
        out, err = child.communicate(timeout=PATIENCE_S)
        return subprocess.CompletedProcess(argv, child.returncode, out, err)

    def write(self, name: str, text: str, mode: int = 0o755) -> Path:
        path = self.home / name
        path.write_text(text)
        os.chown(path, self.uid, self.gid)
        path.chmod(mode)
        return path

    def submit(self, script: str, *options: str, name: str = "job.sh", **more: object) -> str:
        """Submit a script with `vsub`; gives the job's id."""
        path = self.write(name, script)
        done = self.run(str(self.site.vsub), *options, str(path), **more)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, script: str, *options: str, name: str = "job.sh", **more: object) -> Done:
        """Run a script as a job to its end."""
        path = self.write(name, script)
        done = self.run(str(self.site.vsub), "--wait", *options, str(path), **more)
        return self.finished(done.stdout.strip(), done.returncode, done.stderr, name)

    def finished(self, job_id: str, status: int, progress: str, name: str = "job.sh") -> Done:
        number = job_id.partition(".")[0]
        return Done(job_id, status, progress, self.output(f"{name}.o{number}"), self.errors(name, number))

    def errors(self, name: str, number: str) -> str:
        return self.site.own_errors(self.output(f"{name}.e{number}"))

    def clear_home(self) -> None:
        """Leave the home as it is after `useradd`."""
        for path in self.home.iterdir():
            if path.name not in (".bashrc", ".profile", ".bash_logout"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def output(self, name: str) -> str:
        path = self.home / name
        return path.read_text() if path.exists() else ""


class Site:
    """The installation, its batch system and what must not be left behind."""

    engine = "local"
    environment: Mapping[str, str] = {}
    """What users need to find the batch system."""
    limits: tuple[str, ...] = ("-W", "umask=027", "-l", "file=100mb")
    """Options that bound what the processes of a job do, where the batch system has such."""
    umask, file_kib = 0o027, "102400"
    """What comes of the `limits`."""
    session_end = "completed"
    """Shown at the end of a session."""

    def __init__(self, prefix: Path, root: Path) -> None:
        self.prefix, self.root, self.run = prefix, root, Path(f"/run/{root.name}")
        self.vsub, self.vmgr = prefix / "bin" / "vsub", prefix / "bin" / "vmgr"

    def whole(self, job_id: str) -> str:
        """A job's id as nodes know it, from what `vsub` prints."""
        return job_id

    @property
    def node(self) -> str:
        """The name of the node that a job of one node runs on."""
        return os.uname().nodename

    @property
    def guest(self) -> str:
        """The name of such a job's guest."""
        return f"v{self.node.partition('.')[0]}-1"

    @property
    def node_root(self) -> Path:
        """Where the state of that node is."""
        return self.root

    def entering(self, *command: str, user: Optional[User] = None) -> list[str]:
        """The command line by which root runs a command on that node, as the user or as itself."""
        return as_user(user, *command) if user else [*command]

    def on_node(self, *command: str, user: Optional[User] = None) -> str:
        """What such a command says."""
        words = self.entering(*command, user=user)
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout

    def log(self) -> str:
        """The log of that node."""
        path = self.node_root / "log" / "node.log"
        return path.read_text() if path.exists() else ""

    def logs(self) -> dict[str, str]:
        """The log of each node, by its name."""
        return {self.node: self.log()}

    def own_errors(self, text: str) -> str:
        """What is on a job's error stream, without what the batch system itself says there of a job's end."""
        return text

    def plain_output(self, name: str, job_id: str) -> str:
        """The file that gets the output of a job without guests."""
        return f"{name}.o{job_id.partition('.')[0]}"

    def plain_status(self, status: int) -> int:
        """What a session without guests ends with when its shell does with `status`: qsub has a word of its own."""
        return 0

    def session(self, tty: Terminal, user: User) -> str:
        """A session of the user's begins on a terminal; gives the job's id."""
        job_id: str = tty.expect(r"qsub: waiting for job (\S+) to start").group(1)
        tty.expect(r"qsub: job \S+ ready")
        return job_id

    def command(self, name: str, *arguments: str) -> list[str]:
        """The command line of `qdel`, `qrls` or `qrerun`, or what the batch system has in its place."""
        return [str(self.prefix / "libexec" / "local" / name), *arguments]

    def by_hand(self, folder: Path, script: Path) -> list[str]:
        """The command line that submits a script as `vsub` would, with the guests of a job directory."""
        return self.command("qsub", "-l", f"prologue={folder}/prologue", str(script))

    def hook_times(self) -> list[float]:
        """The seconds of each of root's prologues and epilogues so far, where the batch system tells of them."""
        log = (self.root / "local" / "server_priv" / "log").read_text()
        return [float(s) for s in re.findall(r"mom_priv/(?:pro|epi)logue: status 0 after ([0-9.]+) s", log)]

    def client(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """What root is told by such a command."""
        words = self.command(name, *arguments)
        own = {**os.environ, **self.environment}
        return subprocess.run(words, env=own, capture_output=True, text=True, timeout=PATIENCE_S)

    def held(self, job_id: str) -> bool:
        """Whether a job waits because it is held."""
        return self.letter(job_id) == "H"

    def waits(self, job_id: str) -> bool:
        """Whether a job waits because it is held, or for another."""
        return self.held(job_id)

    def running(self, job_id: str) -> bool:
        return self.letter(job_id) == "R"

    def letter(self, job_id: str) -> str:
        """The letter that the batch system shows for a job."""
        lines = [line.split() for line in self.client("qstat", job_id).stdout.splitlines()]
        return next(fields[4] for fields in lines if fields[:1] == [job_id])

    def delete_all(self) -> None:
        """Delete every job, and wait until the nodes are clean."""
        listed = self.client("qstat").stdout.splitlines()
        jobs = [line.split()[0] for line in listed if line[:1].isdigit()]
        if jobs:
            self.client("qdel", *jobs)
        with contextlib.suppress(AssertionError):
            self.assert_clean()

    def wait(self, job_id: str) -> int:
        """Wait for the end of a job; gives its exit status."""
        code = (
            "import sys, json; from vsub.engines.local.client import completion\n"
            "print(json.loads(completion(sys.argv[1], sys.argv[2]).makefile().readline())['exit_status'])"
        )
        python = self.prefix / "venv" / "bin" / "python3"
        done = subprocess.run(
            [str(python), "-c", code, str(self.root / "local.sock"), job_id],
            capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def wait_for(self, job_id: str, stage: str) -> None:
        """Wait until the node's log says that a job has passed a stage."""
        eventually(lambda: f"job {job_id}: {stage} after" in self.log(), f"{job_id}: {stage}")

    def processes(self, what: str) -> list[psutil.Process]:
        """The processes of this installation whose command line holds `what`."""
        found = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if what in line and (str(self.prefix) in line or str(self.root) in line):
                found.append(process)
        return found

    def qemu(self) -> Optional[psutil.Process]:
        found = self.of_agents("qemu-system-x86")
        return found[0] if found else None

    def of_agents(self, name: str) -> list[psutil.Process]:
        """What the agents of this installation have started, by the name of the program."""
        agents = {process.pid for process in self.processes("libexec/vtorque-agent")}
        processes = psutil.process_iter(["name", "ppid"])
        return [
            each for each in processes if (each.info["name"] or "").startswith(name) and each.info["ppid"] in agents
        ]

    def left_behind(self) -> list[str]:
        """What jobs have left on the node; empty when all is gone."""
        left = [f"process {process.cmdline()}" for process in self.processes("") if not self._belongs(process)]
        for place in ("spool/jobs", "spool/ended", "overlays", "local/mom_priv/jobs"):
            left += [str(path) for path in (self.root / place).glob("*")]
        for place in ("jobs", "tombstones"):
            left += [str(path) for path in (self.run / place).glob("*")]
        left += [line for line in Path("/proc/mounts").read_text().splitlines() if str(self.root) in line]
        return left

    def _belongs(self, process: psutil.Process) -> bool:
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            return True
        return "vtorque-local" in line or "pytest" in line

    def assert_clean(self) -> None:
        eventually(lambda: not self.left_behind(), lambda: f"left behind: {self.left_behind()}", limit_s=15)


def as_user(user: User, *command: str) -> list[str]:
    """A command that root enters a node with, for the user to run: no SSH server leads to a simulated one."""
    become = ("setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups")
    own = {"HOME": str(user.home), **user.site.environment}
    return [*become, "env", *(f"{name}={value}" for name, value in own.items()), *command]


def eventually(condition: Callable[[], object], what: object, limit_s: float = PATIENCE_S) -> None:
    """Wait for something that no event tells a test of."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what() if callable(what) else f"not within {limit_s} s: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def local() -> Iterator[Site]:
    """vTorque installed by its own installer under a prefix of the tests, the embedded batch system running."""
    with on_engine("local") as here:
        yield here


@pytest.fixture(scope="session")
def slurm() -> Iterator[Site]:
    """The same with a real Slurm, where that is installed."""
    with on_engine("slurm") as here:
        yield here


@pytest.fixture(scope="module")
def torque() -> Iterator[Site]:
    """The same for a TORQUE that is there, which has room for the hooks of one installation at a time."""
    with on_engine("torque") as here:
        yield here


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Site:
    """The installation that a test is about: by the engine that it runs on."""
    here = request.getfixturevalue(getattr(request, "param", "local"))
    assert isinstance(here, Site)
    return here


@pytest.fixture(scope="module")
def cluster(site: Site) -> Site:
    """The same, in modules whose nodes are simulated ones."""
    return site


@contextmanager
def on_engine(engine: str, text: str = CONFIG) -> Iterator[Site]:
    """An installation with the configuration `text`, for this batch system; skips what needs one that is not there.

    `text` is that for the embedded one. Where that has simulated nodes, there is no such installation for TORQUE.
    """
    from .cluster import Cluster, nodes_of
    from .slurmcluster import found_programs, slurm_site  # these need this module
    from .torquesite import MISSING, torque_site

    if engine == "slurm":
        if found_programs() is not None:
            pytest.skip(f"needs Slurm: {found_programs()} is missing")
        with slurm_site(text) as here:
            yield here
    elif engine == "torque":
        if MISSING:
            pytest.skip(MISSING)
        with torque_site(text) as here:
            yield here
    else:
        with installed(text) as here:
            nodes = nodes_of(text)
            yield Cluster(here.prefix, here.root, nodes) if nodes else here


@contextmanager
def installed(text: str) -> Iterator[Site]:
    """A whole installation with the configuration `text`, its batch system running; nothing of it stays."""
    word = secrets.token_hex(3)
    prefix, root = Path(f"/opt/vtorque-test-{word}"), Path(f"/var/lib/vtorque-test-{word}")
    here = Site(prefix, root)
    try:
        for folder in (root, root / "opt", root / "vm", root / "log"):
            folder.mkdir(mode=0o755)
        (root / "opt" / "software").write_text("of the cluster\n")
        for name in ("prologue", "epilogue", "prologue.parallel", "epilogue.parallel"):
            (root / "vm" / name).write_text(VM_HOOK.format(name=name))
            (root / "vm" / name).chmod(0o755)
        config = root / "site.yaml"
        config.write_text(text.format(root=root, run=here.run, pool=POOL))
        command = [str(REPOSITORY / "install.sh"), "--prefix", str(prefix), "--config", str(config), "--no-links"]
        subprocess.run(command, check=True, timeout=PATIENCE_S)
        (root / "settings.json").write_text('{"kill_delay_s": 5}')
        start = [str(prefix / "libexec" / "vtorque-local"), "start", "--settings", str(root / "settings.json")]
        subprocess.run(start, check=True, timeout=PATIENCE_S)
        yield here
    finally:
        stop = prefix / "libexec" / "vtorque-local"
        if stop.exists():
            subprocess.run([str(stop), "stop"], timeout=PATIENCE_S)
        shutil.rmtree(prefix, ignore_errors=True)
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(here.run, ignore_errors=True)


LOGGED = 400
"""So many lines of a node's log are shown with a failure."""

VM_HOOK = """#!/bin/sh
# the site's {name} in each guest: leaves a trace in the user's home, and fails or stays where the user asks for it
. /run/vtorque/guest.env
echo "root-{name} $(id -u) $(hostname)" >>"$VT_HOME/hooks"
[ ! -e "$VT_HOME/slow-{name}" ] || sleep 300
[ ! -e "$VT_HOME/fail-{name}" ] || {{ echo "the {name} of the site says no"; exit 5; }}
"""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show with a failure what the nodes have logged, and what the jobs have said so far."""
    outcome: Any = yield
    report = outcome.get_result()
    found = getattr(item, "funcargs", {})
    site, user = found.get("cluster", found.get("site")), found.get("user")
    if report.when != "call" or not report.failed or site is None:
        return
    report.sections += [(f"log of {node}", "\n".join(log.splitlines()[-LOGGED:])) for node, log in site.logs().items()]
    said = [*site.root.rglob("*.OU"), *site.root.rglob("*.ER")]  # of jobs that run
    if user is not None:
        said += user.home.glob("*.[oe][0-9]*")
    for path in said:
        with contextlib.suppress(OSError):
            report.sections.append((str(path), path.read_text(errors="replace")[-10_000:]))


@pytest.fixture(scope="module")
def _user(site: Site) -> Iterator[User]:
    with account(site) as user:
        yield user


@pytest.fixture(scope="module")
def other(site: Site) -> Iterator[User]:
    """A second user."""
    with account(site) as user:
        yield user


@pytest.fixture
def user(_user: User, site: Site) -> Iterator[User]:
    """The job's user, with a home as after `useradd`; nothing of a job may be left on the node afterwards."""
    with clean_after(_user, site):
        yield _user


@contextmanager
def account(site: Site) -> Iterator[User]:
    """A user of an installation."""
    user = User(site)
    try:
        yield user
    finally:
        user.remove()


@contextmanager
def clean_after(user: User, site: Site) -> Iterator[None]:
    """One test's use of a user: nothing of a job is left on the nodes afterwards, and the home is as it was."""
    yield
    try:
        site.assert_clean()
    except AssertionError:
        site.delete_all()  # one job at a time runs: what a test has left would hold up all others
        raise
    eventually(lambda: not served(user), lambda: f"left behind: {served(user)}", limit_s=15)
    user.clear_home()


def served(user: User) -> list[psutil.Process]:
    """The user's guests and their file servers, of whatever installation."""
    found = []
    for process in psutil.process_iter(["name", "uids"]):
        name, uids = process.info["name"] or "", process.info["uids"]
        if uids and uids.real == user.uid and name.startswith(("qemu-system", "virtiofsd")):
            found.append(process)
    return found
