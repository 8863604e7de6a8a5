"""What tests of installations share: whole pictures of folders, and moms' folders with hooks of the site's own."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest

from vmgr.deploy import timer

REPOSITORY = Path(__file__).resolve().parents[2]

SITE_HOOKS = {
    "prologue": 0o500,
    "prologue.parallel": 0o755,
    "epilogue": 0o744,
    "epilogue.precancel": 0o755,
    "prologue.user": 0o755,
}
"""The site's own hooks, with their modes."""
MOM_CONFIG = "# the site's\n$logevent 255\n$prologalarm 120   # enough for us\n$usecp *:/home /home\n"
LONG_AGO_NS = 1_500_000_000_123_456_789


class Seen(NamedTuple):
    """A file, link or folder as a picture has it."""

    kind: str
    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    content: str


def picture(folder: Path) -> dict[str, Seen]:
    """All below a folder and itself: kind, mode, owner, time, and content of files or target of links."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        info = path.lstat()
        content = ""
        if stat.S_ISREG(info.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(info.st_mode):
            content = str(path.readlink())
        kind = oct(stat.S_IFMT(info.st_mode))
        owner = (info.st_uid, info.st_gid)
        found[str(path.relative_to(folder))] = Seen(kind, stat.S_IMODE(info.st_mode), owner, info.st_mtime_ns, content)
    return found


def timeless(seen: dict[str, Seen]) -> dict[str, Seen]:
    """The same without times."""
    return {path: each._replace(mtime_ns=0) for path, each in seen.items()}


def make_home(home: Path, *, hooks: bool = True) -> None:
    """TORQUE's folder of a node as a site has it, `hooks` with hooks of the site's own; all of it long ago."""
    mom_priv = home / "mom_priv"
    (mom_priv / "jobs").mkdir(parents=True)
    (mom_priv / "config").write_text(MOM_CONFIG)
    (mom_priv / "config").chmod(0o640)
    os.chown(mom_priv / "config", 0, 4)
    if hooks:
        for name, mode in SITE_HOOKS.items():
            path = mom_priv / name
            path.write_text(f'#!/bin/sh\necho "the site\'s {name} $*"\nexit 3\n')
            path.chmod(mode)
        (mom_priv / "common").write_text("#!/bin/sh\nexit 0\n")
        (mom_priv / "common").chmod(0o755)
        (mom_priv / "epilogue.parallel").symlink_to("common")
    mom_priv.chmod(0o751)
    for number, path in enumerate(sorted([home, *home.rglob("*")], reverse=True)):
        os.utime(path, ns=(LONG_AGO_NS + number, LONG_AGO_NS + number), follow_symlinks=False)


class FakeSystemd:
    """A machine on which systemd seems to run: what it is asked for, and whether the janitor's timer runs."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log, self.runs = base / "systemctl.log", base / "timer runs"
        program = base / "systemctl" / "systemctl"
        program.parent.mkdir()
        program.write_text(
            f"#!/bin/sh\necho \"$*\" >>'{self.log}'\ncase $1 in\nis-active) [ -e '{self.runs}' ] ;;\n"
            f"restart) >'{self.runs}' ;;\nstop) rm -f '{self.runs}' ;;\nesac\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(timer, "SYSTEMD", str(base))

    def said(self) -> list[str]:
        return self.log.read_text().splitlines()


SSHD = Path("/usr/sbin/sshd")
NODE = """\
set -eu
mount --make-rprivate /
mount --bind {base}/spool /var/spool
mount --bind {base}/units /etc/systemd/system
[ ! -d {base}/opt ] || mount --bind {base}/opt /opt
hostname {name}
echo apart
read -r _
ip link set lo up
ip address add {address}/30 dev eth0
ip link set eth0 up
exec {sshd} -D -e -f {base}/sshd
"""
SSHD_CONFIG = """\
ListenAddress {address}:22
HostKey {base}/host
AuthorizedKeysFile {keys}
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile none
"""


class FakeNode:
    """A node with an address, an SSH daemon and file systems of its own, in namespaces of this machine.

    `own_prefix`: it does not see the front end's /opt. It is down until it is started.
    """

    def __init__(self, base: Path, name: str, number: int, keys: Path, *, own_prefix: bool, hooks: bool) -> None:
        self.name, self.base = name, base / name
        self.gateway, self.address = f"198.18.{number}.1", f"198.18.{number}.2"
        self._link = f"vti{os.getpid() % 100000}-{number}"
        self._process: Optional[subprocess.Popen[str]] = None
        self._keys = keys
        (self.base / "spool").mkdir(parents=True)
        (self.base / "units" / "timers.target.wants").mkdir(parents=True)
        if own_prefix:
            (self.base / "opt").mkdir()
        make_home(self.home, hooks=hooks)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.base / "host")], check=True)
        text = SSHD_CONFIG.format(address=self.address, base=self.base, keys=keys)
        (self.base / "sshd").write_text(text)
        self._route("add")

    @property
    def home(self) -> Path:
        return self.base / "spool" / "torque"

    @property
    def mom_priv(self) -> Path:
        return self.home / "mom_priv"

    def picture(self) -> dict[str, dict[str, Seen]]:
        """All that an installation could touch."""
        return {str(folder): picture(folder) for folder in sorted(self.base.iterdir()) if folder.is_dir()}

    def _route(self, what: str) -> None:
        """While it is down there is no way to it."""
        subprocess.run(["ip", "route", what, "unreachable", f"{self.address}/32"], check=True)

    def start(self) -> None:
        """Give it its network, and start its daemon."""
        self._route("del")
        script = NODE.format(base=self.base, name=self.name, address=self.address, sshd=SSHD)
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--uts", "--pid", "--fork"]
        self._process = subprocess.Popen(
            [*command, "--kill-child=KILL", "sh", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdin and self._process.stdout and self._process.stderr
        assert self._process.stdout.readline() == "apart\n", self._process.stderr.read()
        pid = str(self._process.pid)
        for line in (
            f"link add {self._link} type veth peer name eth0 netns {pid}",
            f"address add {self.gateway}/30 dev {self._link}",
            f"link set {self._link} up",
        ):
            subprocess.run(["ip", *line.split()], check=True)
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        first = self._process.stderr.readline()
        assert "listening" in first, first

    def stop(self) -> None:
        """Take it down; its files stay."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
            self._route("add")

    def remove(self) -> None:
        """Leave nothing of it on this machine but its files."""
        self.stop()
        self._route("del")


class Cluster:
    """A front end, which is this machine but for /usr/local and /etc/profile.d, and nodes behind real SSH."""

    def __init__(self, base: Path, prefix: Path) -> None:
        self.base, self.prefix = base, prefix
        for folder in ("local/bin", "profile", "work"):
            (base / folder).mkdir(parents=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(base / "user")], check=True)
        self.nodes: dict[str, FakeNode] = {}

    def add(self, name: str, *, own_prefix: bool, hooks: bool = True) -> FakeNode:
        number = len(self.nodes) + 1 + os.getpid() % 50 * 4
        node = FakeNode(self.base, name, number, self.base / "user.pub", own_prefix=own_prefix, hooks=hooks)
        self.nodes[name] = node
        known, config = self.base / "known", self.base / "ssh"
        with known.open("a") as stream:
            key = " ".join((node.base / "host.pub").read_text().split()[:2])
            stream.write(f"{name} {key}\n")
        with config.open("a") as stream:
            stream.write(
                f"Host {name}\n HostName {node.address}\n HostKeyAlias {name}\n UserKnownHostsFile {known}\n"
                f" IdentityFile {self.base}/user\n IdentitiesOnly yes\n LogLevel ERROR\n"
            )
        return node

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PDSH_SSH_ARGS": f"-F {self.base}/ssh -l%u %h"}

    def command(self, *words: str, source: Path = REPOSITORY) -> list[str]:
        """The command line of `install.sh` on the front end."""
        script = (
            f"mount --make-rprivate / && mount --bind {self.base}/local /usr/local && "
            f'mount --bind {self.base}/profile /etc/profile.d && exec "$@"'
        )
        program = str(source / "install.sh")
        return ["unshare", "--mount", "sh", "-c", script, "sh", program, "--prefix", str(self.prefix), *words]

    def install(
        self, *words: str, source: Path = REPOSITORY, status: int = 0, cwd: Path = REPOSITORY, **environment: str
    ) -> str:
        """Run `install.sh`, which ends with `status`; gives what it prints, errors last."""
        done = subprocess.run(
            self.command(*words, source=source), capture_output=True, text=True, timeout=240, cwd=cwd,
            stdin=subprocess.DEVNULL, env={**self.environment(), **environment},
        )  # fmt: skip
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def picture(self) -> dict[str, Any]:
        """All that an installation could touch, on every machine."""
        found: dict[str, Any] = {name: node.picture() for name, node in self.nodes.items()}
        return {**found, "local": picture(self.base / "local"), "profile": picture(self.base / "profile")}
