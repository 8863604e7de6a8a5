"""Installations, on this machine and on nodes that are simulated on it: all of it as root."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: installs")
