"""What a job's user leaves running on the node, with `guest.kill_user_processes` and without.

The script of a guest job runs in the guest: what leaves something on the node is a prologue of the user's own, or a
job that was not written by `vsub`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from vmgr.jobspec import dump_spec

from .conftest import CONFIG, Done, Site, User, account, clean_after, eventually, installed
from .test_hostile_user import SPEC, by_hand

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
def ending() -> Iterator[Site]:
    """An installation that ends what users leave."""
    with installed(ENDING) as here:
        yield here


@pytest.fixture(scope="module")
def _owner(ending: Site) -> Iterator[User]:
    with account(ending) as owner:
        yield owner


@pytest.fixture
def owner(_owner: User, ending: Site) -> Iterator[User]:
    with clean_after(_owner, ending), nothing_of(_owner):
        yield _owner


@pytest.fixture
def kept(user: User) -> Iterator[User]:
    """A user of the installation that ends nothing."""
    with nothing_of(user):
        yield user


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


def test_what_a_prologue_left_ends_with_the_job(ending: Site, owner: User) -> None:
    bystander = owner.start("setsid", "sleep", "1000.9")
    try:
        done = end(running(owner, ending), owner, ending)
        assert sleepers(owner) == ["1000.9"], "nothing but what another session of the user's has"
    finally:
        bystander.kill()
        bystander.communicate()
    assert (done.status, done.out, done.err) == (3, "done\n", ""), "the job is not touched by it"
    log = (ending.root / "log" / "node.log").read_text()
    assert "left running by the user, ended: 6 (" in log and " sleep" in log
    assert "cannot be ended" not in log


def test_it_stays_where_the_site_does_not_ask_for_that(site: Site, kept: User) -> None:
    done = end(running(kept, site), kept, site)
    assert sleepers(kept) == LEFT
    assert done.status == 3
    assert "left running" not in (site.root / "log" / "node.log").read_text()


def test_what_another_job_of_the_user_left_is_untouched(ending: Site, owner: User) -> None:
    leaves = "setsid sleep 1000.8 &\nuntil pgrep -s $!; do :; done\n"
    assert owner.job(leaves, "-vm", "off", "-d", str(owner.home)).status == 0
    assert sleepers(owner) == ["1000.8"], "a job without a guest leaves a process"
    owner.write("before", "#!/bin/sh\nsetsid sleep 1000.7 &\n")
    done = owner.job("true\n", "-l", "prologue=before")
    assert done.status == 0
    assert sleepers(owner) == ["1000.8"]


def test_it_ends_with_a_job_that_is_killed(ending: Site, owner: User) -> None:
    """The epilogue comes before the agent is done, and kills it: it finds in the record what was left."""
    owner.write("before", LEAVES.replace("$1", "0"))
    job = owner.submit("trap '' TERM\n" + RUNS, "-l", "prologue=before")
    eventually((owner.home / "running").exists, "the job runs")
    assert ending.client("qdel", job).returncode == 0
    ending.wait(job)
    eventually(lambda: not sleepers(owner), lambda: f"left: {sleepers(owner)}", limit_s=5)


@pytest.mark.parametrize("ends", ["2", "KILL"])
def test_the_status_of_the_prologue_is_its_own(ending: Site, owner: User, ends: str) -> None:
    """One that fails lets the batch system start the job again; what it left the first time is gone by then."""
    fails = f"exit {ends}" if ends.isdigit() else f"kill -{ends} $$"
    script = (
        "#!/bin/sh\nps -o args= -u $(id -u) | grep -c 'sleep 1000' >>starts\nsetsid sleep 1000.$(wc -l <starts) &\n"
    )
    owner.write("before", f"{script}[ $(wc -l <starts) -gt 1 ] || {fails}\n")
    assert owner.job("true\n", "-l", "prologue=before").status == 0
    assert len((owner.home / "starts").read_text().splitlines()) == 2
    assert not sleepers(owner)


def test_what_a_wrapper_of_the_users_own_left(ending: Site, owner: User) -> None:
    folder = by_hand(owner, dump_spec(SPEC))
    job_program = ending.prefix / "libexec" / "vtorque-job"
    owner.write("wrapper", f"#!/bin/sh\nsetsid sleep 1000.6 &\n(sleep 1000.7 &)\nexec {job_program} {folder}\n")
    qsub = ending.prefix / "libexec" / "local" / "qsub"
    job = owner.run(str(qsub), "-l", f"prologue={folder}/prologue", "wrapper").stdout.strip()
    eventually(lambda: sleepers(owner) == ["1000.6", "1000.7"], "the wrapper has started something")
    assert ending.wait(job) == 71
    assert owner.finished(job, 71, "", "wrapper").err.startswith("VT-SPEC: "), "it tells of the script that is missing"
    assert not sleepers(owner)
