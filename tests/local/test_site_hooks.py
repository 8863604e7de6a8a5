"""Our hooks among a site's own, in both modes, called by a batch system: a job sees no difference, whatever its type.

The program that our hooks start for guest jobs is a recorder here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Optional

import pytest

from vmgr.deploy.hookfiles import JOB_TYPE, SITE_FOLDER, SITE_FOLDER_MODE, WRAP, fill, hook_files, site_hooks

from .conftest import REPOSITORY, System, User

PLAIN = "plain"
"""The site without our hooks."""
MODES = (PLAIN, WRAP, JOB_TYPE)
ALL = site_hooks(WRAP)
TYPES = ("orig", "parallel", "precancel", "user", "vtorque", "user.parallel", "parallel.vtorque")


class Outcome(NamedTuple):
    """What became of a job: its exit status, the site's and our hooks in order, what was delivered."""

    status: object
    hooks: list[str]
    out: Optional[str]
    err: Optional[str]

    @property
    def of_the_site(self) -> list[str]:
        return [hook for hook in self.hooks if not hook.endswith(":ours")]


def install(system: System, mode: str, extra: Optional[dict[str, str]] = None, names: Iterable[str] = ALL) -> None:
    """The site's own hooks `names`, some of which do more (`extra`), and ours among them."""
    for path in system.mom_priv.iterdir():
        if path.name.startswith(("prologue", "epilogue", SITE_FOLDER)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    site = system.mom_priv / SITE_FOLDER if mode == WRAP else system.mom_priv
    if mode == WRAP:
        site.mkdir()
        site.chmod(SITE_FOLDER_MODE)
    for name in names:
        system.hook(name, (extra or {}).get(name, ""), directory=site)
    if mode == PLAIN:
        return
    program = system.root / "prefix" / "libexec" / "vtorque-hook"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f'#!/bin/sh\necho "ours $2 $(uname -n)" >>{system.record}/order\nexit 9\n')
    program.chmod(0o755)
    for hook in hook_files(mode):
        if hook.always or hook.target in names:
            text = (REPOSITORY / "mom_priv_hooks" / hook.source).read_text()
            path = system.mom_priv / hook.target
            path.write_text(fill(text, prefix=str(system.root / "prefix"), spool=str(system.root / "jobs")))
            path.chmod(hook.mode)


def run(system: System, user: User, *options: str, guest: bool = False, script: str = "echo job\n") -> Outcome:
    """A job to its end, with the resource by which our hooks know a guest job."""
    (system.record / "order").write_text("")
    known = ["-l", f"prologue={user.home}/.vtorque/abcd1234/{'0' * 64}/prologue"] if guest else []
    job, status = system.run(user, *known, "-N", "x", *options, script=script)
    number = job.partition(".")[0]
    files = [user.home / f"x.{letter}{number}" for letter in "oe"]
    out, err = (path.read_text() if path.exists() else None for path in files)
    return Outcome(status, system.order_on_nodes(), out, err)


BEHAVIOUR = {
    "prints": {"prologue": "echo before; echo warned >&2", "epilogue": "echo after"},
    "reads": {"prologue": "cat; wc -c", "epilogue.user": "cat; wc -c"},
    "aborts": {"prologue": "echo no >&2; exit 1"},
    "fails": {"prologue": "exit 99"},
    "fails as the user": {"prologue.user": "exit 5"},
    "kills itself": {"prologue": "kill -9 $$"},
    "kills its group": {"prologue": "kill -9 0"},
    "kills the last one": {"epilogue": "echo begun; kill -9 $$", "epilogue.user": "exit 3"},
}


@pytest.mark.parametrize("what", BEHAVIOUR)
def test_a_job_without_guests_sees_no_difference(system: System, user: User, what: str) -> None:
    system.configure(requeue_limit=0)
    system.stop()
    system.start()
    seen = {}
    for mode in MODES:
        install(system, mode, BEHAVIOUR[what])
        seen[mode] = run(system, user)
        own = run(system, user, "-T", "vtorque")
        assert own == seen[mode]
    seen = {
        mode: outcome._replace(err=(outcome.err or "").replace(f"{SITE_FOLDER}/", "")) for mode, outcome in seen.items()
    }
    assert seen[WRAP] == seen[JOB_TYPE] == seen[PLAIN]


@pytest.mark.parametrize("what", BEHAVIOUR)
def test_a_guest_job_has_the_sites_hooks_too(system: System, user: User, what: str) -> None:
    system.configure(requeue_limit=0)
    system.stop()
    system.start()
    install(system, PLAIN, BEHAVIOUR[what])
    plain = run(system, user, guest=True)
    for mode, options in ((WRAP, ()), (JOB_TYPE, ("-T", "vtorque"))):
        install(system, mode, BEHAVIOUR[what])
        seen = run(system, user, *options, guest=True)
        assert (seen.status, seen.out) == (plain.status, plain.out)
        expected = []
        for hook in plain.hooks:
            expected += [f"{system.host}:ours"] if hook.endswith(":epilogue") else []
            expected.append(hook)
            runs = f"{system.host}:prologue.user" in plain.hooks  # else the prologue has failed: there is no guest
            expected += [f"{system.host}:ours"] if hook.endswith(":prologue") and runs else []
        assert seen.hooks == expected


def test_job_types_where_ours_lie_in_place_of_the_sites(cluster: System, user: User) -> None:
    """In the mode wrap every type has the site's and our hooks, each in its role, on every node."""
    install(cluster, WRAP)
    whole = {
        "n1": "prologue ours prologue.user epilogue.user ours epilogue",
        "n2": "prologue.parallel ours prologue.user.parallel epilogue.user.parallel ours epilogue.parallel",
    }
    for job_type in ("", *TYPES):
        options = ["-T", job_type] if job_type else []
        seen = run(cluster, user, "-l", "nodes=2", *options, guest=True)
        assert (seen.status, seen.out) == (0, "job\n")
        by_node = {node: " ".join(h[3:] for h in seen.hooks if h.startswith(f"{node}:")) for node in whole}
        assert by_node == whole, job_type
    assert (
        run(cluster, user, "-l", "nodes=2", "-T", "parallel").of_the_site == run(cluster, user, "-l", "nodes=2").hooks
    )


def test_job_types_where_the_sites_hooks_stay(cluster: System, user: User) -> None:
    """In the mode jobtype jobs of other types have what they had before; a user's may name ours, each in its role."""
    for job_type in TYPES:
        install(cluster, PLAIN)
        plain = run(cluster, user, "-l", "nodes=2", "-T", job_type)
        install(cluster, JOB_TYPE)
        seen = run(cluster, user, "-l", "nodes=2", "-T", job_type, guest=True)
        assert (seen.status, seen.out) == (0, "job\n")
        assert sorted(seen.of_the_site) == sorted(plain.hooks), job_type
        ours = [hook for hook in seen.hooks if hook.endswith(":ours")]
        expected = {"vtorque": ["n2", "n1", "n2", "n1"], "parallel.vtorque": ["n1", "n1"]}.get(job_type, [])
        assert ours == [f"{node}:ours" for node in expected], job_type


@pytest.mark.parametrize("mode", [WRAP, JOB_TYPE])
def test_precancel(system: System, user: User, mode: str) -> None:
    """The site's precancel hook runs with the user's rights before the job is told; root's part is the epilogue."""
    for options in ((), ("-T", "precancel"), ("-T", "vtorque"), ("-T", "user")):
        install(system, mode)
        (system.record / "order").write_text("")
        gate = system.gate(f"gate{mode}{len(system.calls('epilogue.precancel'))}")
        job = system.submit(user, *options, "-N", "x", script=f"echo up >{gate.path}; sleep 60\n")
        assert gate.wait() == "up\n"
        assert system.qdel(job) == 0
        system.result(job)
        ran = system.order()
        if mode == JOB_TYPE and options == ("-T", "precancel"):  # as it was without us: the site's, as root
            assert [name for name in ran if name.startswith("epilogue")] == [
                "epilogue.precancel", "epilogue.user", "epilogue.precancel",
            ]  # fmt: skip
            continue
        if mode == JOB_TYPE and options == ("-T", "user"):
            continue
        assert ran == ["prologue", "prologue.user", "epilogue.precancel", "epilogue.user", "epilogue"]
        assert system.calls("epilogue.precancel")[-1]["uid"] == str(user.uid)
        assert system.calls("epilogue")[-1]["uid"] == "0"


def test_a_site_without_hooks(system: System, user: User) -> None:
    for mode, options in ((WRAP, ()), (WRAP, ("-T", "user")), (JOB_TYPE, ("-T", "vtorque"))):
        install(system, mode, names=())
        assert run(system, user, *options).hooks == []
        seen = run(system, user, *options, guest=True)
        assert (seen.status, seen.hooks) == (0, [f"{system.host}:ours"] * 2)


def test_what_the_sites_hook_is_called_with(system: System, user: User) -> None:
    """Arguments, environment, folder, umask, streams: as the mom gives them; a job without guests even the session."""
    calls = {}
    for mode in MODES:
        for guest in (False, True):
            install(system, mode)
            run(system, user, "-T", "vtorque", "-l", "nodes=1:ppn=2", guest=guest)
            for name in ("prologue", "prologue.user", "epilogue.user", "epilogue"):
                call = system.calls(name)[-1]
                leads = call["pid"] == call["session"]
                assert leads or (guest and name == "prologue"), (mode, name)
                for own in ("pid", "session", "env:_", "arg1", "arg8", "arg11", "arg7", "env:PBS_NODEFILE", "stdout"):
                    call.pop(own, None)
                call.pop("stderr")
                if name.startswith("epilogue"):
                    call.pop("arg5")
                calls[mode, guest, name] = call
    for (mode, guest, name), call in calls.items():
        assert call == calls[PLAIN, guest, name], (mode, name)


def test_a_site_hook_that_others_may_write(system: System, user: User) -> None:
    """As a mom would not run it, ours does not, with the same end."""
    system.configure(requeue_limit=0)
    system.stop()
    system.start()
    ended = {}
    for mode in MODES:
        install(system, mode)
        site: Path = system.mom_priv / SITE_FOLDER if mode == WRAP else system.mom_priv
        (site / "prologue").chmod(0o775)
        ended[mode] = run(system, user, "-T", "vtorque")
        assert "prologue" in (ended[mode].err or "")
    assert {outcome.status for outcome in ended.values()} == {-3}
    assert all(outcome.hooks == [] or "prologue" not in outcome.hooks[0] for outcome in ended.values())
