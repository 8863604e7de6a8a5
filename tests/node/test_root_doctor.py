"""The doctor as root: what it tries is real, changes nothing, and is gone when it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Optional

import psutil
import pytest
from nodesite import REPOSITORY, make_node, wait_gone
from test_doctor import an_image

from vmgr.doctor import hypervisor, kvm, network
from vmgr.doctor.examine import CHECKS, examine
from vmgr.doctor.finding import Level, Node
from vmgr.errors import VTorqueError
from vmgr.images.pool import Pool
from vmgr.node import accel
from vmgr.node.network import nft

POOL = Path("/var/lib/vtorque/images")

RUN = f"""\
import sys; sys.path.insert(0, {str(REPOSITORY)!r})
sys.executable = sys.argv[1]
from vmgr.cli import main
sys.exit(main(sys.argv[2:]))
"""


def a_node(base: Path, *, pool: Optional[Path] = None, **hypervisor: object) -> Node:
    """A node with an image that none can boot, or with the images of the pool that is named."""
    images = {} if pool is None else {"pool": str(pool)}
    made = make_node(base, hypervisor=hypervisor, images=images, policy={"img": {"default": "micro"}})
    node = Node(made.install, made.config)
    if pool is None:
        an_image(node)
    return node


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/usr/bin/python3 -IS\nimport os, re, sys, time\n{text}")
    path.chmod(0o755)
    return str(path)


CONSOLE = "console = int(re.search(r'fd=([0-9]+)', ' '.join(sys.argv))[1])\n"


@pytest.fixture
def with_images() -> None:
    try:
        Pool(POOL).get("micro")
    except VTorqueError as err:
        pytest.skip(f"needs the image micro: {err}")


@pytest.mark.parametrize(
    ("does", "level", "said"),
    [
        (f"{CONSOLE}os.write(console, b'[0.0] Linux version 6\\n')\ntime.sleep(60)\n", Level.OK, "kernel started"),
        ("time.sleep(60)\n", Level.FAILURE, "showed nothing within 1 s"),
        ("sys.exit('no such accelerator')\n", Level.FAILURE, "no such accelerator"),
    ],
)
def test_kvm_is_tried(base: Path, monkeypatch: pytest.MonkeyPatch, does: str, level: Level, said: str) -> None:
    monkeypatch.setattr(accel, "DEVICE", Path("/dev/null"))
    node = a_node(base, qemu=program(base / "qemu", does), probe_seconds=1)
    (found,) = kvm.check(node)
    assert found.level is level and said in found.what
    assert not (base / "run").exists(), "nothing is remembered"


def test_kvm_here(base: Path, with_images: None) -> None:
    """With the real QEMU, whatever this machine can: the same answer as a guest's start would get."""
    node = a_node(base, pool=POOL, probe_seconds=5)
    kernel = kvm._kernel(node)
    assert kernel is not None and kernel.is_file() and "micro" in str(kernel)
    (found,) = kvm.check(node)
    assert (found.level is Level.OK) == accel.probe(node.config, kernel).works


def test_qemu_here(base: Path) -> None:
    found = list(hypervisor.check(a_node(base)))
    assert {each.level for each in found} == {Level.OK}, found


def state() -> tuple[set[str], list[nft.Table], list[str]]:
    """The links, our tables, and the namespaces of this process."""
    namespaces = [os.readlink(f"/proc/thread-self/ns/{name}") for name in ("net", "mnt")]  # noqa: PTH115
    return {name for _, name in socket.if_nameindex()}, nft.marked(), namespaces


def test_networks_are_tried_and_nothing_is_left() -> None:
    before, names = state(), nft.names("inet")
    tried = network.attempt(4789)
    assert [each.what for each in tried] == [
        "packet filter", "bridge", "pair of links", "VXLAN link", "tap", "table of the packet filter",
    ]  # fmt: skip
    assert [each for each in tried if each.problem is not None] == []
    assert state() == before and nft.names("inet") == names


def content(base: Path) -> list[tuple[str, float]]:
    return sorted((str(path), path.lstat().st_mtime) for path in base.rglob("*"))


def test_nothing_is_changed(base: Path) -> None:
    node = a_node(base, probe_seconds=2)
    before, net = content(base), state()
    found = examine(node)
    assert content(base) == before and state() == net
    assert not [each for each in found if "fault" in each.what or "did not end" in each.what]


def test_a_killed_doctor_leaves_nothing(base: Path) -> None:
    node = a_node(base, qemu=program(base / "qemu", "time.sleep(60)\n"), probe_seconds=60)
    python = node.install.root / "venv" / "bin" / "python3"
    doctor = psutil.Popen([sys.executable, "-c", RUN, str(python), "doctor"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20

    def qemus() -> list[int]:
        found = []
        for each in doctor.children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has ended
                if str(base / "qemu") in each.cmdline():
                    found.append(each.pid)
        return found

    while not qemus() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [each.pid for each in doctor.children(recursive=True)]
    assert qemus() and len(children) > 1
    doctor.send_signal(signal.SIGKILL)
    doctor.wait()
    assert all(wait_gone(pid) for pid in children)


def test_as_a_program(base: Path) -> None:
    node = a_node(base, probe_seconds=2, allow_emulation=True)
    python = node.install.root / "venv" / "bin" / "python3"
    done = subprocess.run([sys.executable, "-c", RUN, str(python), "doctor", "--json"], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert done.returncode == (found["worst"] == "failure"), done.stderr
    levels = {(each["subject"], each["level"]) for each in found["findings"]}
    assert ("images", "ok") in levels and ("KVM", "failure") not in levels, "emulation is allowed"


SSHD = Path("/usr/sbin/sshd")


@contextmanager
def ssh_nodes(base: Path) -> Iterator[dict[str, str]]:
    """Names n1, n2 … behind one sshd of this machine, and the environment by which pdsh's ssh finds them."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(base / name)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (base / "sshd").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {base}/host\nAuthorizedKeysFile {base}/user.pub\nStrictModes no\n"
        "UsePAM no\nPermitRootLogin prohibit-password\nPidFile none\nPasswordAuthentication no\n"
    )
    host_key = " ".join((base / "host.pub").read_text().split()[:2])
    (base / "known").write_text("".join(f"n{number} {host_key}\n" for number in range(1, 10)))
    (base / "ssh").write_text(
        "".join(f"Host n{number}\n HostKeyAlias n{number}\n" for number in (1, 2, 10))
        + f"Host n*\n HostName 127.0.0.1\n Port {port}\n UserKnownHostsFile {base}/known\n"
        f" IdentityFile {base}/user\n IdentitiesOnly yes\n BatchMode yes\n LogLevel ERROR\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(base / "sshd")], stderr=subprocess.PIPE)
    assert server.stderr is not None
    try:
        with server.stderr:
            assert b"listening" in server.stderr.readline()
            yield {**os.environ, "PDSH_SSH_ARGS": f"-F {base}/ssh -lroot %h"}
    finally:
        server.terminate()
        server.wait()


@pytest.mark.skipif(not SSHD.exists() or shutil.which("pdsh") is None, reason="needs sshd and pdsh")
def test_nodes_over_ssh(base: Path) -> None:
    """All the way: pdsh, ssh, sshd, and the doctor itself on each node; one of them has an unknown host key."""
    node = a_node(base, probe_seconds=1, allow_emulation=True)
    python = node.install.root / "venv" / "bin" / "python3"
    launcher = node.install.root / "bin" / "vmgr"
    launcher.parent.mkdir()
    launcher.write_text(f"#!{sys.executable} -I\nimport sys\nsys.argv.insert(1, {str(python)!r})\n{RUN}")
    launcher.chmod(0o755)
    command = [sys.executable, "-c", RUN, str(python), "doctor", "--nodes", "n[1-2],n10", "--json"]
    with ssh_nodes(base) as environment:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    found = json.loads(done.stdout)["nodes"]
    assert done.returncode == 1 and list(found) == ["n1", "n2", "n10"], done.stderr
    assert "verification failed" in found["n10"]["problem"].lower()
    for name in ("n1", "n2"):
        assert "problem" not in found[name], found[name]
        assert {each["subject"] for each in found[name]["findings"]} == set(CHECKS)
