"""A real TORQUE to hold vsub against: its own qsub, and vsub as it is installed, both as an ordinary user.

VTORQUE_TEST_QSUB names the batch system's qsub (qstat and qdel lie beside it); without it the one on the PATH is taken
when it is a TORQUE 6. Everything is skipped elsewhere. Jobs are submitted held, looked at and deleted; none runs.
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "unit"))

from vsubsite import IMAGES, make_image  # noqa: E402 (from the folder of the unit tests)

from vmgr.config import compile_config  # noqa: E402
from vmgr.front import write_front  # noqa: E402
from vmgr.paths import Installation  # noqa: E402

PROGRAM = "VTORQUE_TEST_QSUB"
VERSION = re.compile(r"Version: 6\.")
LAUNCHER = """\
#!{prefix}/venv/bin/python3 -IS
import sys
sys.path.insert(0, "{prefix}/lib")
from vsub.cli import main
sys.exit(main())
"""
CONFIG = """\
submit: {{qsub: {qsub}, qstat: {qstat}}}
images: {{pool: {prefix}/images}}
policy: {{img: {{default: micro}}, vcpus: {{max: 8}}, ram: {{max: 4G}}}}
"""


def found_torque() -> tuple[Optional[Path], str]:
    """The qsub of a TORQUE 6, or why there is none."""
    named = os.environ.get(PROGRAM)
    program = named or shutil.which("qsub")
    if program is None:
        return None, f"no TORQUE: {PROGRAM} is not set, and there is no qsub on the PATH"
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as err:
        return None, f"no TORQUE: {program} --version: {err}"
    if not VERSION.search(done.stdout + done.stderr):
        return None, f"no TORQUE: {program} is not of version 6"
    return Path(program), ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if Path(__file__).parent in Path(item.fspath).parents]
    reason = found_torque()[1] if mine else ""
    reason = reason or ("" if os.geteuid() == 0 else "needs root: adds the user who submits")
    for item in mine:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


class Done(NamedTuple):
    """What a program did."""

    status: int
    out: str
    err: str


class Account(NamedTuple):
    """The user who submits."""

    name: str
    uid: int
    gid: int
    home: Path
    group: str

    def run(
        self, argv: list[str], *, stdin: bytes = b"", env: Optional[dict[str, str]] = None, cwd: Optional[Path] = None
    ) -> Done:
        """Run a program as this user, with an environment that is the same every time."""
        cwd = cwd or self.home / "work"
        done = subprocess.run(
            argv, input=stdin, capture_output=True, cwd=cwd, timeout=60,
            user=self.uid, group=self.gid, extra_groups=[],
            env={
                "HOME": str(self.home), "LOGNAME": self.name, "USER": self.name, "SHELL": "/bin/bash",
                "PATH": "/usr/bin:/bin", "PWD": str(cwd), **(env or {}),
            },
        )  # fmt: skip
        texts = (text.decode("utf-8", "surrogateescape") for text in (done.stdout, done.stderr))
        return Done(done.returncode, *texts)

    def write(self, name: str, data: bytes) -> Path:
        """A file in the folder that the user works in."""
        path = self.home / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        for part in (path, *path.relative_to(self.home).parents):
            os.chown(self.home / part, self.uid, self.gid)
        return path


def account_of(name: str) -> Account:
    import grp

    entry = pwd.getpwnam(name)
    return Account(name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir), grp.getgrgid(entry.pw_gid).gr_name)


@pytest.fixture(scope="session")
def account() -> Iterator[Account]:
    """A new user; qsub refuses root."""
    name = f"vtq{secrets.token_hex(4)}"
    subprocess.run(["useradd", "-m", "-k", "/nonexistent", "-s", "/bin/bash", "-d", f"/home/{name}", name], check=True)
    try:
        account = account_of(name)
        for folder in ("work", "work/sub", "other", "third"):
            (account.home / folder).mkdir()
            os.chown(account.home / folder, account.uid, account.gid)
        yield account
    finally:
        subprocess.run(["userdel", "-r", name], check=True, stderr=subprocess.DEVNULL)


class Torque:
    """The batch system, and vsub as it is installed beside it."""

    def __init__(self, qsub: Path, account: Account, prefix: Path) -> None:
        self.qsub = qsub
        self.account = account
        self.held_qsub = prefix / "bin" / "held-qsub"
        self.front = prefix / "bin" / "vsub"
        self.program = prefix / "libexec" / "vtorque-vsub"
        self.prefix = prefix
        self._ids: list[str] = []
        self._install(prefix)

    def _install(self, prefix: Path) -> None:
        """What the installation has of vsub: the program, its front, the compiled configuration."""
        for folder in ("lib", "venv/bin", "bin", "libexec", "etc/vtorque", "images"):
            (prefix / folder).mkdir(parents=True)
        for package in ("vsub", "vmgr"):
            shutil.copytree(
                REPOSITORY / package, prefix / "lib" / package, ignore=shutil.ignore_patterns("__pycache__")
            )
        python = Path("/usr/bin/python3")
        (prefix / "venv" / "bin" / "python3").symlink_to(python if python.exists() else sys.executable)
        self.program.write_text(LAUNCHER.format(prefix=prefix))
        text = (REPOSITORY / "contrib" / "bin" / "vsub").read_text()
        self.front.write_text(text.replace("@PREFIX@", str(prefix)))
        self.held_qsub.write_text(f'#!/bin/sh\nexec {self.qsub} -h "$@"\n')
        for program in (self.program, self.front, self.held_qsub):
            program.chmod(0o755)
        for name, fields in IMAGES.items():
            make_image(prefix / "images", name, fields)
        self.configure(self.qsub)

    def configure(self, qsub: Path) -> None:
        """What vsub submits with."""
        install = Installation(self.prefix)
        install.config.write_text(CONFIG.format(qsub=qsub, qstat=self.qsub.with_name("qstat"), prefix=self.prefix))
        write_front(compile_config(install), install)

    def submit(self, program: Path, words: list[str], **how: object) -> Done:
        """Run qsub or vsub; the job is noted, to be deleted, also one whose id is not printed (`-z`)."""
        before = self.jobs() if "-z" in words else set()
        done = self.account.run([str(program), *words], **how)  # type: ignore[arg-type]
        if done.status == 0:
            self._ids += re.findall(r"^[0-9]+(?:\[\])?\.\S+$", done.out, re.MULTILINE)
            self._ids += sorted(self.jobs() - before) if "-z" in words else []
        return done

    def jobs(self) -> set[str]:
        """The held jobs of this user."""
        return set(self.account.run([str(self.qsub.with_name("qselect")), "-s", "H"]).out.split())

    def attributes(self, job: str) -> dict[str, str]:
        """The attributes of a job; what qstat says where the server does not know it, as one with an empty script."""
        done = self.account.run([str(self.qsub.with_name("qstat")), "-f", job])
        if done.status != 0:
            return {"qstat": f"{done.status} {done.err}".replace(job, "JOB")}
        for part in done.out.replace("\n\t", "").split("\n\n"):  # of an array qstat shows others too
            head, _, lines = part.strip().partition("\n")
            if head == f"Job Id: {job}":
                # a value may hold line ends; an attribute stands behind four blanks
                pairs = [line.partition(" = ") for line in re.split(r"^ {4}", lines, flags=re.MULTILINE)[1:]]
                return {name: value.strip() for name, _, value in pairs}
        raise AssertionError(done.out)

    def clear(self) -> None:
        """Delete what was submitted."""
        for job in self._ids:
            self.account.run([str(self.qsub.with_name("qdel")), job])
        self._ids.clear()


@pytest.fixture(scope="session")
def installed(account: Account) -> Iterator[Torque]:
    """TORQUE and vsub; skips where the server does not take jobs of this user."""
    qsub = found_torque()[0]
    assert qsub is not None
    with tempfile.TemporaryDirectory(prefix="vt-torque-", dir="/opt") as folder:
        prefix = Path(folder) / "prefix"
        Path(folder).chmod(0o755)
        torque = Torque(qsub, account, prefix)
        account.write("probe.sh", b"true\n")
        done = torque.submit(qsub, ["-h", "probe.sh"])
        torque.clear()
        if done.status != 0:
            pytest.skip(f"the TORQUE server takes no jobs of {account.name}: {done.err.strip()}")
        before = torque.jobs()
        yield torque
        assert torque.jobs() == before, "jobs are left"


@pytest.fixture
def held(torque: Torque) -> Iterator[Torque]:
    """vsub whose jobs are all held."""
    torque.configure(torque.held_qsub)
    yield torque
    torque.configure(torque.qsub)


@pytest.fixture
def torque(installed: Torque) -> Iterator[Torque]:
    yield installed
    installed.clear()
