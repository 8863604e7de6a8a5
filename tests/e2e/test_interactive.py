"""Interactive guest jobs, through `vsub -I` on a real terminal."""

from __future__ import annotations

import re

import pytest

from .conftest import Site, User, eventually
from .terminal import SHELL, check_size_and_keys, terminal

ENGINES = ("local", "slurm", "torque")


@pytest.mark.parametrize("image", ["micro", "debian-12"])
def test_the_terminal_ends_up_in_the_guest(site: Site, user: User, image: str) -> None:
    with terminal(user, str(site.vsub), "-I", "-vm", f"img={image}", rows=33, columns=101) as tty:
        job_id = site.session(tty, user)
        for stage in ("launched|pinned and running", "booted"):  # shown while the guest boots, from when one is there
            tty.expect(f"waiting for the guest: ({stage})")
        tty.expect(SHELL)
        tty.run(
            "echo user=$(id -un) host=$(hostname) where=$(pwd)", rf"user={user.name} host=(v\S+) where={user.home}\s"
        )
        tty.expect(SHELL)
        tty.run(
            "echo job=$PBS_JOBID env=$PBS_ENVIRONMENT term=$TERM",
            rf"job={re.escape(site.whole(job_id))} env=PBS_INTERACTIVE term=xterm-256color",
        )
        tty.expect(SHELL)
        check_size_and_keys(tty)
        tty.run("echo still=here", "still=here\r?\n")
        tty.expect(SHELL)
        tty.type("exit 7\r")
        assert tty.end() == 7, tty.seen
        assert site.session_end in tty.seen
    assert not list((user.home / ".vtorque").glob("*/*/spec.json"))


def test_a_command_on_the_terminal(site: Site, user: User) -> None:
    user.write("hello", '#!/bin/sh\n#PBS -N talk\nread -r line\necho "got $line on $(tty) in $(hostname)"\nexit 5\n')
    with terminal(user, str(site.vsub), "-I", "-x", "./hello") as tty:
        site.session(tty, user)
        tty.expect("the guest: ready")
        tty.type("something\r")
        tty.expect(r"got something on /dev/pts/\d+ in v\S+")
        assert tty.end() == 5, tty.seen


def test_deleting_the_job_ends_the_session(site: Site, user: User) -> None:
    with terminal(user, str(site.vsub), "-I") as tty:
        job_id = site.session(tty, user)
        tty.expect(SHELL)
        assert site.client("qdel", job_id).returncode == 0
        assert tty.end() != 0, tty.seen


def test_a_terminal_that_goes_away_ends_the_job(site: Site, user: User) -> None:
    with terminal(user, str(site.vsub), "-I") as tty:
        tty.expect(SHELL)
    eventually(lambda: site.qemu() is None, "the guest is gone")


def test_the_reason_of_a_failure_is_on_the_terminal(site: Site, user: User) -> None:
    user.write("fail-prologue", "")
    with terminal(user, str(site.vsub), "-I") as tty:
        tty.expect("VT-HOOK")
        assert tty.end() == 77, tty.seen


def test_without_a_terminal(site: Site, user: User) -> None:
    done = user.run(str(site.vsub), "-I")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vsub: VT-USAGE: standard input and output must be a terminal")
    assert not (user.home / ".vtorque").exists()


def test_without_a_guest(site: Site, user: User) -> None:
    with terminal(user, str(site.vsub), "-I", "-vm", "off") as tty:
        site.session(tty, user)
        tty.expect(SHELL)
        tty.run("echo guest=${VTORQUE_JOBID:-none}", "guest=none\r?\n")
        tty.type("exit 3\r")
        assert tty.end() == site.plain_status(3), tty.seen
