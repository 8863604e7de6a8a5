"""The fixture of the guest tests: guests with directories of their own."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))  # debs

from guestsetup import MakeSetup, image_or_skip, make_setup
from nodejob import Jobs, account


@pytest.fixture
def setup_for(tmp_path: Path) -> Iterator[MakeSetup]:
    # pytest's own directories are 0700: QEMU runs as another user
    base = Path("/tmp") / f"vtorque-guest-{os.getpid()}-{tmp_path.name}"
    base.mkdir()
    try:
        yield lambda name, **options: make_setup(base, name, **options)
    finally:
        shutil.rmtree(base)


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """A node of a module's own, and a user who runs jobs on it."""
    if os.geteuid() != 0:
        pytest.skip("needs root: adds a user, starts hypervisors")
    image_or_skip("micro")
    with tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp") as base, account() as owner:
        Path(base).chmod(0o755)
        yield Jobs(Path(base), owner)
