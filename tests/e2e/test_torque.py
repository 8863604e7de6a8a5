"""Guest jobs on a node of a real TORQUE: vsub, the hooks in its `mom_priv`, real guests.

Skipped where there is none; `torquesite.py` says how one is named. What is true of all batch systems, the other modules
test on TORQUE too.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest

from .conftest import PATIENCE_S, Site, User, eventually
from .terminal import SHELL, check_size_and_keys, terminal
from .torquesite import MISSING, TorqueSite

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def site(torque: TorqueSite) -> TorqueSite:
    """The installation whose users the tests are."""
    return torque


@pytest.fixture
def user(site: Site) -> Iterator[User]:
    made = User(site)
    yield made
    site.assert_clean()
    made.remove()


def test_a_batch_job(site: Site, user: User) -> None:
    script = '#!/bin/sh\n#PBS -N talk\necho "$(id -un) in $(hostname): $1, $2"\necho errors >&2\nexit 3\n'
    done = user.job(script, "-F", "one 'two three'", "-vm", "ram=300M", name="talk")
    assert done.status == 3
    assert re.fullmatch(rf"{user.name} in v\S+: one, two three\n", done.out)
    assert done.err == "errors\n"


def test_the_order_of_the_users_own_hooks(site: Site, user: User) -> None:
    user.write("before", '#!/bin/sh\necho "before $1 $#"\n')
    user.write("after", '#!/bin/sh\necho "after $1"\n')
    done = user.job("#!/bin/sh\necho job\n", "-j", "oe", "-l", "prologue=before,epilogue=after")
    assert (done.status, done.out) == (0, f"before {done.job_id} 8\njob\nafter {done.job_id}\n")


def test_an_array(site: Site, user: User) -> None:
    job_id = user.submit('#!/bin/sh\necho "$PBS_ARRAYID in $(hostname)"\n', "-t", "1-3%2", name="array.sh")
    number = job_id.partition("[")[0]
    outputs = [user.home / f"array.sh.o{number}-{index}" for index in (1, 2, 3)]
    eventually(lambda: all(path.exists() for path in outputs), "the output of the members")
    assert [path.read_text().partition(" in v")[0] for path in outputs] == ["1", "2", "3"]
    eventually(lambda: not list((user.home / ".vtorque").glob("*/*")), "the last member takes the files away", 10)


def test_an_interactive_job(site: Site, user: User) -> None:
    with terminal(user, str(site.vsub), "-I", rows=33, columns=101) as tty:
        tty.expect(r"qsub: job \S+ ready")
        tty.expect("waiting for the guest: booted")
        tty.expect(SHELL)
        check_size_and_keys(tty)
        tty.type("exit 7\r")
        assert tty.end() == 7, tty.seen


def test_a_job_that_is_deleted(site: Site, user: User) -> None:
    job_id = user.submit("#!/bin/sh\necho begun\ntouch up\nsleep 300\n")
    eventually(lambda: (user.home / "up").exists(), "the job runs")
    assert site.client("qdel", job_id).returncode == 0
    assert site.wait(job_id) != 0
    eventually(
        lambda: user.output(f"job.sh.o{job_id.partition('.')[0]}") == "begun\n", "what it wrote is delivered", 30
    )


def test_a_job_that_is_held_and_queued_again(site: TorqueSite, user: User) -> None:
    """By its owner's hold and root's requeue: its output goes on, its walltime begins anew."""
    batch = str(site.prefix / "libexec" / "vtorque-batch")
    subprocess.run([batch, "check-requeue"], check=True, timeout=PATIENCE_S)
    job_id = user.submit("#!/bin/sh\necho start\n[ -e up ] || { touch up; sleep 300; }\necho end\n")
    eventually(lambda: (user.home / "up").exists(), "the job runs")
    assert user.run(batch, "hold", job_id).stdout == '{"new": true}\n'
    assert user.run(batch, "hold", job_id).stdout == '{"new": false}\n'
    held = site.state(job_id)
    assert (held["job_state"], held["Hold_Types"]) == ("R", "u")
    refused = user.run(batch, "requeue", job_id)
    assert refused.returncode == 2 and refused.stderr.startswith("VT-ACCESS: qrerun: Unauthorized Request")
    subprocess.run([batch, "requeue", job_id], check=True, timeout=PATIENCE_S)
    eventually(lambda: site.state(job_id)["job_state"] == "H", "the job is held")
    assert user.run(batch, "release", job_id).stdout == "{}\n"
    assert site.wait(job_id) == 0
    assert site.state(job_id)["resources_used.walltime"] < "00:05:00"
    eventually(
        lambda: user.output(f"job.sh.o{job_id.partition('.')[0]}") == "start\nstart\nend\n", "all of its output", 30
    )
    assert user.run(batch, "server").stdout.strip('"\n') == job_id.partition(".")[2]
