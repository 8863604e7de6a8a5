"""KVM found out for real: where a device is there, a kernel either starts under it or the node says why not."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import Site, User

ENGINES = ("local", "slurm", "torque")
DEVICE = Path("/dev/kvm")

PROBE = """
import json, sys
from pathlib import Path
from vmgr.config import load_config
from vmgr.images.pool import Pool
from vmgr.node.accel import probe
from vmgr.paths import Installation
config = load_config(Installation(Path(sys.argv[1])))
print(json.dumps(probe(config, Pool(config.images.pool).get("micro").path("kernel"))))
"""


def probe(site: Site) -> tuple[bool, str, float]:
    start = time.monotonic()
    python = site.prefix / "venv" / "bin" / "python3"
    done = subprocess.run(
        [str(python), "-I", "-c", PROBE, str(site.prefix)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    works, reason = json.loads(done.stdout)
    return works, reason, time.monotonic() - start


@pytest.mark.only("local", reason="no job has a part in it")
@pytest.mark.slow
@pytest.mark.skipif(not DEVICE.exists(), reason="there is no /dev/kvm")
def test_a_device_that_everybody_may_use_is_tried_with_a_kernel(site: Site) -> None:
    """Where KVM starts no stock kernel, the node says so within the limit of the probe, whether QEMU gives up or spins.

    (On one nested host QEMU 7.2 ends in an assertion on an MSR with `-cpu host`, and spins with other models.)
    """
    known = site.run / "kvm.json"
    known.unlink(missing_ok=True)
    mode = DEVICE.stat().st_mode & 0o777
    DEVICE.chmod(0o666)
    try:
        works, reason, took = probe(site)
    finally:
        DEVICE.chmod(mode)
    assert took < 20
    assert works == (reason == "a kernel started under it")
    assert works or "showed nothing within 10 s" in reason or "qemu" in reason
    again = probe(site)
    assert again[:2] == (works, reason) and again[2] < 5
    known.unlink()
    assert not site.processes("qemu-system")


def test_jobs_use_what_was_found_and_need_the_sites_word_for_emulation(user: User, site: Site) -> None:
    assert user.job("true\n").status == 0
    found = json.loads(site.on_node("cat", str(site.run / "kvm.json")))
    if found["works"]:
        pytest.skip("KVM works here: emulation is not needed")
    config = site.prefix / "etc" / "vtorque" / "vtorque.yaml"
    kept = config.read_text()
    try:
        config.write_text(kept.replace("allow_emulation: true", "allow_emulation: false"))
        os.spawnv(os.P_WAIT, str(site.vmgr), ["vmgr", "config", "compile"])
        done = user.job("echo never\n")
    finally:
        config.write_text(kept)
        os.spawnv(os.P_WAIT, str(site.vmgr), ["vmgr", "config", "compile"])
    assert (done.status, done.out) == (72, "")
    assert done.err.startswith("VT-NODE: KVM does not work on this node: ") and "allow_emulation" in done.err
