"""The fixture of the guest tests: guests with directories of their own."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))  # debs

from guestsetup import MakeSetup, make_setup


@pytest.fixture
def setup_for(tmp_path: Path) -> Iterator[MakeSetup]:
    # pytest's own directories are 0700: QEMU runs as another user
    base = Path("/tmp") / f"vtorque-guest-{os.getpid()}-{tmp_path.name}"
    base.mkdir()
    try:
        yield lambda name, **options: make_setup(base, name, **options)
    finally:
        shutil.rmtree(base)
