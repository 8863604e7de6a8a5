"""What the tests of the node side share that need root, but neither a guest nor a batch system."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))  # nodesite

from vmgr.node.user import User


@pytest.fixture(autouse=True)
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: other users' files, mounts, processes of theirs")


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder that everybody may enter; its path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def user(base: Path) -> User:
    """A user of no name service, with a home."""
    home = base / "home"
    home.mkdir(mode=0o700)
    found = User("carol", 48211, 48212, "chem", str(home), "/bin/sh", (("lab", 48213), ("disk", 48214)))
    os.chown(home, found.uid, found.gid)
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a child behind, nor a descriptor."""
    me = psutil.Process()
    before = {fd.name for fd in Path("/proc/self/fd").iterdir()}
    daemons = set(me.children(recursive=True))  # those of a module's fixture
    yield
    _, alive = psutil.wait_procs(set(me.children(recursive=True)) - daemons, timeout=5)
    assert not alive, f"left behind: {alive}"
    deadline = time.monotonic() + 5
    while left := {fd.name for fd in Path("/proc/self/fd").iterdir()} - before:  # a thread may be about to close it
        assert time.monotonic() < deadline, f"left open: {sorted(left)}"
        time.sleep(0.02)
