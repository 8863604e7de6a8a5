"""The AppArmor profiles and the SELinux module compile, and let QEMU at all that it is seen to use, and little else.

No kernel here has either in force: what the profiles allow is read from them, by apparmor.d(5).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from nodesite import REPOSITORY, plain_qcow2

from vmgr.config import Mount
from vmgr.images.pool import Pool
from vmgr.node.qemu import Descriptors, GuestPlan, command_line
from vmgr.node.virtiofsd import from_help
from vmgr.schema import check_config
from vmgr.topology.model import Layout

APPARMOR = REPOSITORY / "contrib" / "apparmor"
SELINUX = REPOSITORY / "contrib" / "selinux"
DEVEL = Path("/usr/share/selinux/devel/Makefile")
QEMU = "/usr/bin/qemu-system-x86_64"
POOL = Path("/var/lib/vtorque/images")

_CALL = re.compile(
    r'\b(?:openat|open|execve|mkdir|unlink|rename|link|symlink)\((?:AT_FDCWD, )?"([^"]*)"(.*)\) += (\S+)'
)


class Rule(NamedTuple):
    path: re.Pattern[str]
    access: str
    denied: bool


class Profile:
    """The file rules of one profile."""

    def __init__(self, text: str, name: str, variables: dict[str, list[str]]) -> None:
        body = re.search(rf"^profile {name} .*?^\}}$", text, re.MULTILINE | re.DOTALL)
        assert body is not None, name
        self.rules = []
        for line in body[0].splitlines():
            match = re.fullmatch(r"\s*(deny )?(?:owner )?(/\S*|@\{\S+|\{\S+)\s+([rwamklx]+),(?:\s*#.*)?", line)
            if match:
                for path in _expanded(match[2], variables):
                    self.rules.append(Rule(re.compile(_regex(path)), match[3], bool(match[1])))
        assert len(self.rules) > 30

    def allows(self, path: str, access: str) -> bool:
        found = [rule for rule in self.rules if rule.path.fullmatch(path) and access in rule.access]
        return bool(found) and not any(rule.denied for rule in found)


def _expanded(path: str, variables: dict[str, list[str]]) -> Iterator[str]:
    match = re.search(r"@\{(\w+)\}", path)
    if match is None:
        yield re.sub(r"//+", "/", path)
        return
    for value in variables[match[1]]:
        yield from _expanded(path[: match.start()] + value + path[match.end() :], variables)


def _regex(glob: str) -> str:
    """An AppArmor glob as a regular expression."""
    out, at, depth = "", 0, 0
    while at < len(glob):
        char = glob[at]
        if glob.startswith("**", at):
            out, at = out + (".+" if out.endswith("/") else ".*"), at + 2
            continue
        if char == "[":
            end = glob.index("]", at)
            out, at = out + glob[at : end + 1], end + 1
            continue
        depth += {"{": 1, "}": -1}.get(char, 0)
        plain = {"*": "[^/]+" if out.endswith("/") else "[^/]*", "?": "[^/]", "{": "(?:", "}": ")"}.get(char)
        out += "|" if char == "," and depth else plain or re.escape(char)
        at += 1
    return out


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of /etc/apparmor.d with the profiles in it."""
    if not shutil.which("apparmor_parser"):
        pytest.skip("needs apparmor")
    folder = tmp_path_factory.mktemp("apparmor") / "apparmor.d"
    shutil.copytree("/etc/apparmor.d", folder, symlinks=True)
    shutil.copytree(APPARMOR, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def whole(tree: Path) -> str:
    """The profiles with all that they include."""
    asked = ["apparmor_parser", "-p", f"--base={tree}", tree / "vtorque"]
    text = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    return re.sub(r"^##included.*$", "", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def variables(whole: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, more, values in re.findall(r"^\s*@\{(\w+)\}\s*(\+?)=\s*(.*)$", whole, re.MULTILINE):
        words = [word.strip('"') for word in values.split("#")[0].split()]
        found[name] = [*found.get(name, []), *words] if more else words
    return {**found, "pid": ["[0-9]*"], "pids": ["[0-9]*"], "tid": ["[0-9]*"], "uid": ["[0-9]*"]}


def test_profiles_compile(tree: Path) -> None:
    asked = ["apparmor_parser", "-Q", "-K", "-T", f"--base={tree}", tree / "vtorque"]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0 and "arning" not in done.stderr, done.stderr


def test_places_are_those_of_the_sample(variables: dict[str, list[str]]) -> None:
    assert variables["VTORQUE_IMAGES"] == ["/var/lib/vtorque/images"]
    assert variables["VTORQUE_DISKS"] == ["/var/spool/vtorque"]
    assert {"/home", "/opt"} <= set(variables["VTORQUE_SHARES"])


@pytest.mark.timeout(180)
def test_what_qemu_uses_is_allowed(whole: str, variables: dict[str, list[str]], base: Path) -> None:
    """A guest boots on a disk with a share, and QEMU's files are watched: each is in the profile."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    share = base / "share"
    share.mkdir()
    (share / "file").write_text("x")
    opened = traced(base, share)
    places = {**variables, "VTORQUE_SHARES": ["/opt", str(share)], "VTORQUE_IMAGES": [str(POOL)]}
    profile = Profile(whole, "vtorque-qemu", places)
    refused = {(path, access) for path, access in opened if not profile.allows(path, access)}
    assert (f"{share}/", "r") in opened and len(opened) > 50
    assert not refused


def traced(base: Path, share: Path) -> set[tuple[str, str]]:
    """What a guest's QEMU opens from its start to its end, and how: `r` or `w`."""
    image = Pool(POOL).get("micro")
    (base / "seed").write_bytes(b"\0" * (1 << 20))
    backing = plain_qcow2(base / "base.qcow2", 16)
    overlay = base / "overlay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, overlay], check=True)
    mounts = (Mount("home", "9p", str(share), "/home", False), Mount("opt", "9p", "/opt", "/opt-hpc", True))
    plan = GuestPlan(
        "sample", Layout.flat(2, 256), "tcg", image.path("kernel"), image.path("initrd"), "console=ttyS0", "qcow2",
        "02:00:00:00:00:01", mounts,
    )  # fmt: skip
    pairs = [socket.socketpair() for _ in range(3)]
    files = [os.open(base / "seed", os.O_RDONLY), os.open(overlay, os.O_RDWR), os.open(backing, os.O_RDONLY)]
    theirs = [end.fileno() for _, end in pairs]
    try:
        child = subprocess.Popen(
            [
                "strace", "-f", "-qq", "-s", "4096", "-e", "trace=%file", "-o", base / "trace",
                *command_line(QEMU, plan, Descriptors(*theirs, *files)),
            ],
            pass_fds=[*theirs, *files],
        )  # fmt: skip
        try:
            for _, end in pairs:
                end.close()
            run_guest(pairs[0][0], pairs[2][0])
            assert child.wait(60) == 0
        finally:
            child.kill()
            child.wait()
    finally:
        for ours, _ in pairs:
            ours.close()
        for fd in files:
            os.close(fd)
    return {each for line in (base / "trace").read_text().splitlines() for each in accesses(line)}


@pytest.mark.timeout(180)
def test_what_virtiofsd_uses_is_allowed(whole: str, variables: dict[str, list[str]], base: Path) -> None:
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    program = str(check_config({})["hypervisor"]["virtiofsd"])
    share = base / "share"
    share.mkdir()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(base / "socket"))
        listener.listen()
        told = subprocess.run([program, "--help"], capture_output=True, text=True)
        command = from_help(program, told.stdout + told.stderr).command(str(share), listener.fileno(), readonly=False)
        child = subprocess.Popen(
            ["strace", "-f", "-qq", "-s", "4096", "-e", "trace=%file", "-o", base / "trace", *command],
            pass_fds=[listener.fileno()],
        )
        try:
            client.connect(str(base / "socket"))
            client.close()  # it ends when its client goes
            child.wait(60)
        finally:
            child.kill()
            child.wait()
    opened = {each for line in (base / "trace").read_text().splitlines() for each in accesses(line)}
    profile = Profile(whole, "vtorque-virtiofsd", {**variables, "VTORQUE_SHARES": [str(share)]})
    assert ("/etc/ld.so.cache", "r") in opened and len(opened) > 10
    assert not {(path, access) for path, access in opened if not profile.allows(path, access)}


def run_guest(qmp: socket.socket, console: socket.socket) -> None:
    """Let the guest run until its kernel has said something, then end QEMU."""
    qmp.settimeout(90)
    console.settimeout(90)
    with qmp.makefile("rwb") as talk:
        talk.readline()
        for word in ("qmp_capabilities", "cont"):
            talk.write(json.dumps({"execute": word}).encode() + b"\n")
            talk.flush()
            while b'"return"' not in talk.readline():
                pass
        said = b""
        while b"Linux version" not in said:
            said += console.recv(4096)
        talk.write(b'{"execute": "quit"}\n')
        talk.flush()
        with suppress(ConnectionResetError):  # QEMU may end before it has read the end of the line
            while talk.readline():
                pass


def accesses(line: str) -> Iterator[tuple[str, str]]:
    """What one line of strace says was opened; what was not there counts for nothing."""
    match = _CALL.search(line)
    if match is None or match[3].startswith("-") or not match[1].startswith("/"):
        return
    path = os.path.normpath(match[1]).replace("/proc/self/", f"/proc/{os.getpid()}/")
    writes = "O_RDWR" in match[2] or "O_WRONLY" in match[2] or "O_CREAT" in match[2]
    yield f"{path.rstrip('/')}/" if Path(path).is_dir() else path, "w" if writes else "r"


@pytest.mark.parametrize(
    ("path", "access"),
    [
        ("/etc/shadow", "r"), ("/root/.ssh/id_ed25519", "r"), ("/bin/sh", "x"), ("/usr/bin/python3", "x"),
        ("/home/carol/program", "x"), ("/etc/passwd", "w"), ("/dev/sda", "r"), ("/dev/mem", "r"),
        ("/boot/vmlinuz", "r"), ("/var/lib/vtorque/images/micro/1/disk", "w"), ("/tmp/x", "w"),
        ("/var/spool/torque/mom_priv/prologue", "w"),
        ("/proc/1/mem", "r"), ("/proc/sysrq-trigger", "w"), ("/sys/kernel/uevent_helper", "w"), ("/run/vtorque/x", "r"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["vtorque-qemu", "vtorque-virtiofsd"])
def test_little_else_is_allowed(whole: str, variables: dict[str, list[str]], name: str, path: str, access: str) -> None:
    assert not Profile(whole, name, variables).allows(path, access)


@pytest.mark.parametrize("path", ["/home/carol/data", "/opt/app/bin/tool", "/workspace/1.host/x"])
@pytest.mark.parametrize("name", ["vtorque-qemu", "vtorque-virtiofsd"])
def test_shares_are_allowed(whole: str, variables: dict[str, list[str]], name: str, path: str) -> None:
    profile = Profile(whole, name, variables)
    assert profile.allows(path, "r") and profile.allows(path, "w")


def test_the_module_compiles(tmp_path: Path) -> None:
    if not DEVEL.exists():
        pytest.skip("needs selinux-policy-dev")
    source = tmp_path / "selinux"
    shutil.copytree(SELINUX, source)
    done = subprocess.run(["make", "-f", DEVEL, "vtorque.pp"], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (source / "vtorque.pp").stat().st_size > 0
    assert "warning" not in (done.stdout + done.stderr).lower()
