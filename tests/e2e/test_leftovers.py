"""What a job's user leaves running on the node, with `guest.kill_user_processes` and without.

The script of a guest job runs in the guest: what leaves something on the node is a prologue of the user's own, where
the batch system runs such, or a job that was not written by `vsub`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from vmgr.jobspec import dump_spec

from .conftest import CONFIG, Done, Site, User, clean_after, eventually, on_engine
from .test_hostile_user import SPEC, by_hand

ENGINES = ("local", "slurm", "torque")
OWN_HOOKS = pytest.mark.only("local", "torque", reason="Slurm runs no prologue of the user's own")
ENDING = CONFIG.replace("guest: {{", "guest: {{kill_user_processes: true, ")

LEAVES = """\
#!/bin/sh
sleep 1000.1 &
setsid sleep 1000.2 &
(setsid sh -c 'sleep 1000.3; :' &)
setsid sh -c "trap '' TERM; sleep 1000.4 & while :; do wait; sleep 1000.5; done" &
until [ "$(pgrep -cu "$(id -u)" sleep)" -ge 4 ]; do :; done
exit $1
"""
LEFT = [f"1000.{number}" for number in range(1, 5)]
RUNS = "touch running; until [ -e go ]; do sleep 0.2; done; echo done; exit 3\n"


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """An installation that ends what users leave."""
    with on_engine(request.param, ENDING) as here:
        yield here


@pytest.fixture
def owner(_user: User, site: Site) -> Iterator[User]:
    with clean_after(_user, site), nothing_of(_user):
        yield _user


@contextmanager
def nothing_ended(site: Site) -> Iterator[None]:
    """The same installation while its site does not ask for that."""
    config = site.prefix / "etc" / "vtorque" / "vtorque.yaml"
    kept = config.read_text()
    try:
        config.write_text(kept.replace("kill_user_processes: true", "kill_user_processes: false"))
        subprocess.run([str(site.vmgr), "config", "compile"], check=True, stdout=subprocess.DEVNULL)
        yield
    finally:
        config.write_text(kept)
        subprocess.run([str(site.vmgr), "config", "compile"], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def nothing_of(user: User) -> Iterator[None]:
    """Nothing of a user's runs before a test, and what it has left is ended."""
    assert not processes(user)
    yield
    for process in processes(user):
        process.kill()
    eventually(lambda: not processes(user), "the test's own processes are gone", limit_s=10)


def processes(user: User) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["uids"]) if user.uid in (process.info["uids"] or ())]


def sleepers(user: User) -> list[str]:
    """For how long the processes sleep that a user has on the node, in order."""
    found = []
    for process in psutil.process_iter(["uids", "cmdline"]):
        line = process.info["cmdline"] or []
        if process.info["uids"] and process.info["uids"].real == user.uid and line[:1] == ["sleep"]:
            found.append(line[1])
    return sorted(found)


def running(user: User, site: Site) -> str:
    """A job that runs in its guest, whose prologue has left something."""
    user.write("before", LEAVES.replace("$1", "0"))
    job = user.submit(RUNS, "-l", "prologue=before")
    eventually((user.home / "running").exists, "the job runs")
    assert sleepers(user)[:4] == LEFT, "what a prologue starts for the time of the job is left alone as long as it runs"
    return job


def end(job: str, user: User, site: Site) -> Done:
    user.write("go", "")
    return user.finished(job, site.wait(job), "")


@OWN_HOOKS
def test_what_a_prologue_left_ends_with_the_job(site: Site, owner: User) -> None:
    bystander = owner.start("setsid", "sleep", "1000.9")
    try:
        done = end(running(owner, site), owner, site)
        assert sleepers(owner) == ["1000.9"], "nothing but what another session of the user's has"
    finally:
        bystander.kill()
        bystander.communicate()
    assert (done.status, done.out, done.err) == (3, "done\n", ""), "the job is not touched by it"
    log = site.log()
    assert "left running by the user, ended: 6 (" in log and " sleep" in log
    assert "cannot be ended" not in log


@OWN_HOOKS
def test_it_stays_where_the_site_does_not_ask_for_that(site: Site, owner: User) -> None:
    before = site.log()
    with nothing_ended(site):
        done = end(running(owner, site), owner, site)
    assert sleepers(owner) == LEFT
    assert done.status == 3
    assert "left running" not in site.log()[len(before) :]


@OWN_HOOKS
def test_what_another_job_of_the_user_left_is_untouched(site: Site, owner: User) -> None:
    leaves = "setsid sleep 1000.8 &\nuntil pgrep -s $!; do :; done\n"
    assert owner.job(leaves, "-vm", "off", "-d", str(owner.home)).status == 0
    assert sleepers(owner) == ["1000.8"], "a job without a guest leaves a process"
    owner.write("before", "#!/bin/sh\nsetsid sleep 1000.7 &\n")
    done = owner.job("true\n", "-l", "prologue=before")
    assert done.status == 0
    assert sleepers(owner) == ["1000.8"]


@OWN_HOOKS
def test_it_ends_with_a_job_that_is_killed(site: Site, owner: User) -> None:
    """The epilogue comes before the agent is done, and kills it: it finds in the record what was left."""
    owner.write("before", LEAVES.replace("$1", "0"))
    job = owner.submit("trap '' TERM\n" + RUNS, "-l", "prologue=before")
    eventually((owner.home / "running").exists, "the job runs")
    assert site.client("qdel", job).returncode == 0
    site.wait(job)
    eventually(lambda: not sleepers(owner), lambda: f"left: {sleepers(owner)}", limit_s=5)


@OWN_HOOKS
@pytest.mark.parametrize("ends", ["2", "KILL"])
def test_the_status_of_the_prologue_is_its_own(site: Site, owner: User, ends: str) -> None:
    """One that fails lets the batch system start the job again; what it left the first time is gone by then."""
    fails = f"exit {ends}" if ends.isdigit() else f"kill -{ends} $$"
    script = (
        "#!/bin/sh\nps -o args= -u $(id -u) | grep -c 'sleep 1000' >>starts\nsetsid sleep 1000.$(wc -l <starts) &\n"
    )
    owner.write("before", f"{script}[ $(wc -l <starts) -gt 1 ] || {fails}\n")
    assert owner.job("true\n", "-l", "prologue=before").status == 0
    assert len((owner.home / "starts").read_text().splitlines()) == 2
    assert not sleepers(owner)


def test_what_a_wrapper_of_the_users_own_left(site: Site, owner: User) -> None:
    folder = by_hand(owner, dump_spec(SPEC))
    job_program = site.prefix / "libexec" / "vtorque-job"
    leaves = "setsid sleep 1000.6 &\n(sleep 1000.7 &)\n"
    wrapper = owner.write("wrapper", f"#!/bin/sh\n{leaves}exec {job_program} {folder}\n")
    job = owner.run(*site.by_hand(folder, wrapper)).stdout.strip()
    eventually(lambda: sleepers(owner) == ["1000.6", "1000.7"], "the wrapper has started something")
    assert site.wait(job) == 71
    assert owner.finished(job, 71, "", "wrapper").err.startswith("VT-SPEC: "), "it tells of the script that is missing"
    assert not sleepers(owner)
