"""Machines to read: recorded trees where they are at hand, and small ones, the manifests beside this file.

A line of a manifest is a file's path and its text; `#` starts a comment. The recorded trees are archives in the
folder that VTORQUE_TEST_TOPOLOGIES names, or in `shared/topologies` beside the checkout.
"""

from __future__ import annotations

import functools
import os
import re
import tarfile
import tempfile
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_PLACES = (os.environ.get("VTORQUE_TEST_TOPOLOGIES", ""), os.fspath(_HERE.parents[3] / "shared" / "topologies"))

_NOT_READ = re.compile(
    r"/(cache|cpuidle|thermal_throttle|stats|bus|class|block|dmi|pci[0-9a-f:]+|node[0-9]+/memory[0-9]+)/"
    r"|/dev/cpuset/torque/.*/.*/"
)
"""What neither we nor hwloc need for CPUs and memory: most of an archive's files."""

SMALL = sorted(path.stem for path in _HERE.glob("*.txt"))
RECORDED = (
    "128arm-2pa2n8cluster4co", "16amd64-8n2c-cpusets", "16em64t-4s2c2t-offlines", "20em64t-hybrid-1p6c2t+2ca4co1t",
    "32amd64-4s2n4c-cgroup2", "40intel64-2g2n4c+pcilocality", "48amd64-4pa2n6c-sparse", "64amd64-4s2n4ca2co",
    "8em64t-2s2ca2c-buggynuma", "nvidiagpunumanodes", "offline-cpu0-node0",
)  # fmt: skip


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where trees are unpacked, once a test run; it goes with the process."""
    return tempfile.TemporaryDirectory(prefix="vt-topologies-")


@functools.cache
def small(name: str) -> Path:
    """The root of one of the small trees."""
    root = Path(_folder().name) / "small" / name
    for line in (_HERE / f"{name}.txt").read_text().splitlines():
        if not line.startswith("#"):
            path, _, text = line.partition(" ")
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(f"{text}\n")
    return root


def recorded(name: str) -> Path:
    """The root of a recorded tree; skips the test where there is none."""
    archives = [Path(place) / f"{name}.tar.bz2" for place in _PLACES if place]
    archive = next((path for path in archives if path.exists()), None)
    if archive is None:
        pytest.skip(f"no {name}.tar.bz2 in {' or '.join(place for place in _PLACES if place)}")
    return _unpacked(archive)


@functools.cache
def _unpacked(archive: Path) -> Path:
    into = Path(_folder().name) / archive.name
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar.getmembers() if not _NOT_READ.search(member.name)]
        for member in wanted:
            member.mode |= 0o600 | (0o700 if member.isdir() else 0)  # some are not to be removed as they were recorded
        if hasattr(tarfile, "tar_filter"):
            tar.extractall(into, wanted, filter="tar")
        else:
            tar.extractall(into, wanted)
    (root,) = into.iterdir()
    return root
