"""A node for the tests of `vmgr/node`: an installation whose outside paths all lie below a temporary folder."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Optional

import pytest
import yaml
from hypothesis import HealthCheck, settings

import vmgr
from vmgr.config import Config, load_config
from vmgr.images.pool import Image
from vmgr.jobspec import GuestGroup, Pinning, Spec
from vmgr.node import process, record
from vmgr.node.user import User
from vmgr.paths import Installation

FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""For every fuzz test: a busy machine is no failure."""
REPOSITORY = Path(vmgr.__file__).parent.parent
TEMPLATES = REPOSITORY / "templates"


class Node(NamedTuple):
    """One installation on a node of its own."""

    base: Path
    install: Installation
    config: Config

    def place(self, job_id: str = "12.host", start: int = 100, *, boot: Optional[str] = None) -> record.Place:
        """The place of an attempt whose prologue started at the tick `start`."""
        name = f"{start:016d}-{os.getpid()}-{(boot or process.boot_id())[:8]}"
        spool, run = self.config.paths
        return record.Place(spool / "jobs" / job_id / name, run / "jobs" / job_id / f"{name}.sock")

    def left(self) -> list[str]:
        """Files, sockets and folders of jobs that are still there, without locks and marks."""
        spool, run = self.config.paths
        roots = (spool / "jobs", run / "jobs", self.config.images.overlays)
        return [str(path) for root in roots for path in sorted(root.rglob("*"))]


@contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder with a path short enough for the sockets below it, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp") as folder:
        yield Path(folder)


def make_node(base: Path, **settings: dict[str, object]) -> Node:
    """A node below `base`; `settings` are sections of its configuration."""
    install = Installation(base / "prefix")
    for folder in (install.config.parent, install.libexec):
        folder.mkdir(parents=True, exist_ok=True)
    tree: dict[str, dict[str, object]] = {
        "paths": {"spool": str(base / "spool"), "run": str(base / "run")},
        "images": {"pool": str(base / "pool"), "overlays": str(base / "overlays")},
        "logging": {"file": str(base / "log" / "node.log")},
    }
    for section, values in settings.items():
        tree.setdefault(section, {}).update(values)
    install.config.write_text(yaml.safe_dump(tree))
    install.config.chmod(0o644)
    return Node(base, install, load_config(install))


def an_image(directory: Path, *, virtual_size: int = 64 << 20) -> Image:
    """An image as the pool gives it."""
    return Image(
        folder=str(directory), name="micro", revision=1, family="micro", distro="SLG", arch="x86_64", description="",
        created="2024-01-01T00:00:00Z", disk="disk.qcow2", disk_format="qcow2", virtual_size=virtual_size,
        kernel="vmlinuz", initrd="initrd", cmdline="console=ttyS0", min_ram_mib=128, features=("9p",), files={},
        packages=None, recipe_hash="",
    )  # fmt: skip


def a_user(**fields: object) -> User:
    values: dict[str, object] = {
        "name": "carol", "uid": 4711, "gid": 4712, "group": "chem", "home": "/home/carol", "shell": "/bin/bash",
        "groups": (("lab", 4713),),
    }  # fmt: skip
    return User(**{**values, **fields})  # type: ignore[arg-type]


def a_spec(**fields: object) -> Spec:
    """A specification as `vsub` writes it when nobody asks for anything."""
    values: dict[str, object] = {
        "ruid": "0123456789abcdef", "groups": (GuestGroup("micro", 1, 2, 512),), "asked": (), "distro": None,
        "arch": None, "pinning": Pinning("auto", None), "fs_type": "overlay", "disk": None, "metadata": None,
        "mounts": ("home",), "network": "user", "suspend": False, "iocm": None, "vrdma": False, "unclot_mib": None,
        "workdir": "/home/carol", "shell": None, "interactive": False, "array": None, "script": "a" * 64,
        "arguments": "", "vm_prologue": None, "vm_epilogue": None,
        "ssh_public_key": "ssh-ed25519 " + "A" * 68, "keep": False,
    }  # fmt: skip
    return Spec(**{**values, **fields})  # type: ignore[arg-type]


def sleeper(seconds: int = 60) -> subprocess.Popen[bytes]:
    """A real process that does nothing, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-IS", "-c", f"import time; time.sleep({seconds})"], start_new_session=True
    )


def note_process(place: record.Place, pid: int, role: str) -> None:
    found = process.identify(pid)
    assert found is not None
    record.append(place, {"do": "process", "role": role, **found._asdict()})


def in_session(code: str, *arguments: str) -> str:
    """What Python `code` prints, run as the leader of a session of its own, as a hook is."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{code}", *arguments],
        capture_output=True,
        text=True,
        start_new_session=True,
        check=True,
    )
    return done.stdout


def plain_qcow2(path: Path, megabytes: int = 16) -> Path:
    """A disk that qemu-img made, with data in it. Skips the test where there is no qemu-img."""
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img")
    raw = path.with_suffix(".raw")
    raw.write_bytes(os.urandom(1 << 16) + bytes(1 << 20) + os.urandom(1 << 16))
    os.truncate(raw, megabytes << 20)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)], check=True)
    raw.unlink()
    return path


def wait_gone(pid: int, limit_s: float = 5.0) -> bool:
    """Whether a process (not of ours) ends within the limit; a zombie counts as ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    ended = bool(poll.poll(limit_s * 1000))
    os.close(fd)
    return ended
