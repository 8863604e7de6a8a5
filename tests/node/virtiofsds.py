"""The virtiofsd programs of the tests: QEMU's own, and that of Rust where VTORQUE_TEST_VIRTIOFSD names it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PROGRAMS = {"c": "/usr/lib/qemu/virtiofsd", "rust": os.environ.get("VTORQUE_TEST_VIRTIOFSD", "")}


def program_or_skip(language: str) -> str:
    """The path of the program in that language."""
    path = PROGRAMS[language]
    if not path:
        pytest.skip("VTORQUE_TEST_VIRTIOFSD names no virtiofsd of Rust")
    if not Path(path).exists():
        pytest.skip(f"{path} is not installed")
    return path
