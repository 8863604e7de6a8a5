"""Guest jobs on a node of a real TORQUE: vsub, the hooks in its `mom_priv`, real guests.

VTORQUE_TEST_QSUB names its qsub, VTORQUE_TEST_TORQUE_HOME its server's home (PBS_HOME) on this machine, where a mom
with an empty `mom_priv` (no hooks) serves one node. Skipped elsewhere.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmgr.deploy.hookfiles import WRAP, hook_files

from .conftest import CONFIG, PATIENCE_S, POOL, REPOSITORY, Site, User, eventually
from .terminal import SHELL, check_size_and_keys, terminal

QSUB, HOME = os.environ.get("VTORQUE_TEST_QSUB"), os.environ.get("VTORQUE_TEST_TORQUE_HOME")
pytestmark = pytest.mark.skipif(
    not (QSUB and HOME), reason="no TORQUE: VTORQUE_TEST_QSUB and VTORQUE_TEST_TORQUE_HOME are not set"
)
HOOKS = {hook.target: hook.source for hook in hook_files(WRAP) if hook.always}


class TorqueSite(Site):
    """An installation for the TORQUE that is there."""

    def client(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = Path(str(QSUB)).with_name(name)
        return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=PATIENCE_S)

    def state(self, job_id: str) -> dict[str, str]:
        shown = self.client("qstat", "-f", "-1", job_id).stdout
        return dict(
            re.findall(r"^ {4}(job_state|Hold_Types|exit_status|resources_used\.walltime) = (.*)$", shown, re.MULTILINE)
        )

    def wait(self, job_id: str) -> int:
        eventually(lambda: self.state(job_id).get("job_state") == "C", f"the end of {job_id}")
        return int(self.state(job_id)["exit_status"])

    def left_behind(self) -> list[str]:
        return [line for line in super().left_behind() if "mom_priv" not in line]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """vTorque installed with the engine torque, its hooks in the mom's folder."""
    word = secrets.token_hex(3)
    prefix, root = Path(f"/opt/vtorque-test-{word}"), Path(f"/var/lib/vtorque-test-{word}")
    here = TorqueSite(prefix, root)
    mom_priv = Path(str(HOME)) / "mom_priv"
    there = [name for name in HOOKS if (mom_priv / name).exists()]
    assert not there, f"{mom_priv} has hooks of its own: {there}"
    try:
        for folder in (root, root / "opt", root / "vm", root / "log"):
            folder.mkdir(mode=0o755)
        text = CONFIG.format(root=root, run=here.run, pool=POOL).replace("engine: local", "engine: torque")
        names = ("qsub", "qstat", "qhold", "qrls", "qrerun", "pbsnodes")
        programs = ", ".join(f"{name}: {Path(str(QSUB)).with_name(name)}" for name in names)
        text = text.replace("submit: {without_vm: guest}", f"submit: {{{programs}}}")
        (root / "site.yaml").write_text(text)
        install = [str(REPOSITORY / "install.sh"), "--prefix", str(prefix), "--config", str(root / "site.yaml")]
        install.append("--no-links")
        subprocess.run(install, check=True, timeout=PATIENCE_S)
        for name, source in HOOKS.items():
            shutil.copy(prefix / "share" / "vtorque" / "mom_priv_hooks" / source, mom_priv / name)
        yield here
    finally:
        for name in set(HOOKS) - set(there):
            (mom_priv / name).unlink(missing_ok=True)
        for folder in (prefix, root, here.run):
            shutil.rmtree(folder, ignore_errors=True)


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
