"""Which tests may run beside each other: not those of a file, which share what they start, nor of some files."""

from __future__ import annotations

import os
from typing import Any, Optional

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

hypothesis.settings.register_profile("machine", suppress_health_check=[hypothesis.HealthCheck.too_slow], deadline=None)
hypothesis.settings.load_profile("machine")  # how long an example takes says how much else runs on the machine

TOGETHER = {
    "tests/e2e/test_several_nodes.py": "networks of jobs",
    "tests/e2e/test_networks.py": "networks of jobs",
    "tests/e2e/test_mpi.py": "networks of jobs",
    "tests/e2e/test_disks.py": "networks of jobs",
    "tests/e2e/test_placement.py": "networks of jobs",
    "tests/e2e/test_debian_package.py": "the system's own folders",
    "tests/e2e/test_quickstart.py": "the system's own folders",
}
"""Files whose tests do not run at the same time: installations that know nothing of each other give the same network to
jobs of the same number; what installs into the system itself changes it below the other."""
if os.environ.get("VTORQUE_TEST_QSUB"):  # whose node has the hooks of one installation at a time
    on_it = (
        "torque", "guest_job", "interactive", "nothing_is_left", "submission", "data", "disks", "hostile_user", "kvm",
        "leftovers", "placement", "shares",
    )  # fmt: skip
    TOGETHER.update(dict.fromkeys((f"tests/e2e/test_{name}.py" for name in on_it), "networks of jobs"))


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """Gives a worker whole files, or files that belong together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return TOGETHER.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Optional[Any]:
    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None
