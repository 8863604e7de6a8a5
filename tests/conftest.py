"""Which tests may run beside each other: not those of a file, which share what they start, nor of some files."""

from __future__ import annotations

from pathlib import Path

import pytest

TOGETHER = {
    "e2e/test_several_nodes": "networks of jobs",
    "e2e/test_networks": "networks of jobs",
    "e2e/test_mpi": "networks of jobs",
    "e2e/test_disks": "networks of jobs",
    "e2e/test_placement": "networks of jobs",
}
"""Files whose tests do not run at the same time: installations that know nothing of each other give the same network to
jobs of the same number."""


def pytest_itemcollected(item: pytest.Item) -> None:
    file = item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()
    item.add_marker(pytest.mark.xdist_group(TOGETHER.get(file, file)))
