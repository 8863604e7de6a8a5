"""The doctor as root: what it tries is real, changes nothing, and is gone when it is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from nodesite import REPOSITORY, make_node, wait_gone

from vmgr.doctor import hypervisor, kvm, network
from vmgr.doctor.examine import examine
from vmgr.doctor.finding import Level, Node
from vmgr.node import accel
from vmgr.node.network import nft

POOL = Path("/var/lib/vtorque/images")

RUN = f"""\
import sys; sys.path.insert(0, {str(REPOSITORY)!r})
sys.executable = sys.argv[1]
from vmgr.cli import main
sys.exit(main(sys.argv[2:]))
"""


def a_node(base: Path, **hypervisor: object) -> Node:
    made = make_node(base, hypervisor=hypervisor, images={"pool": str(POOL)}, policy={"img": {"default": "micro"}})
    return Node(made.install, made.config)


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/usr/bin/python3 -IS\nimport os, re, sys, time\n{text}")
    path.chmod(0o755)
    return str(path)


CONSOLE = "console = int(re.search(r'fd=([0-9]+)', ' '.join(sys.argv))[1])\n"


@pytest.fixture
def with_images() -> None:
    if not (POOL / "micro").is_dir():
        pytest.skip("needs the image micro")


@pytest.mark.usefixtures("with_images")
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
    node = a_node(base, probe_seconds=5)
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


def test_a_killed_doctor_leaves_nothing(base: Path, with_images: None) -> None:
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


def test_as_a_program(base: Path, with_images: None) -> None:
    node = a_node(base, probe_seconds=2, allow_emulation=True)
    python = node.install.root / "venv" / "bin" / "python3"
    done = subprocess.run([sys.executable, "-c", RUN, str(python), "doctor", "--json"], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert done.returncode == (found["worst"] == "failure"), done.stderr
    levels = {(each["subject"], each["level"]) for each in found["findings"]}
    assert ("images", "ok") in levels and ("KVM", "failure") not in levels, "emulation is allowed"
