"""The hooks as shell scripts: what a job without guests pays, what the program is told, and that they end with 0."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nodesite import REPOSITORY, short_folder

from vmgr.deploy.hookfiles import JOB_TYPE, MODES, SITE_FOLDER, SITE_FOLDER_MODE, WRAP, fill, hook_files, site_hooks
from vmgr.errors import VTorqueError
from vmgr.node.hookargs import guest_job

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a mom's hooks belong to root and run as root")

if TYPE_CHECKING:
    Done = subprocess.CompletedProcess[str]

SHA = "0123456789abcdef" * 4
GUEST = f"nodes=1,prologue=/home/carol/.vtorque/abcd1234/{SHA}/prologue,neednodes=1"
BARE = "nodes=1,walltime=00:05:00,prologue=/home/carol/my/prologue,neednodes=1"
HOOKS = {hook.target: mode for mode in MODES for hook in hook_files(mode)}
PROLOGUES = [name for name in HOOKS if name.startswith("prologue")]
EPILOGUES = [name for name in HOOKS if name.startswith("epilogue")]

RECORDER = """\
#!/bin/sh
for word; do printf '%s\\0' "$word"; done >>{record}
echo program >>{started}
exit {status}
"""


class Hooks:
    """The hooks of the repository, for each mode in a folder as a mom's, with a program that records how it was called.

    The site has no hooks of its own.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.spool = base / "spo ol"
        self.record = base / "record"
        self.program = base / "pre fix" / "libexec" / "vtorque-hook"
        self.program.parent.mkdir(parents=True)
        self.answers(0)
        for mode in MODES:
            (base / mode).mkdir()
            for hook in hook_files(mode):
                text = (REPOSITORY / "mom_priv_hooks" / hook.source).read_text()
                self.path(hook.target).write_text(fill(text, prefix=str(base / "pre fix"), spool=str(self.spool)))
                self.path(hook.target).chmod(hook.mode)

    def path(self, name: str) -> Path:
        """One of our hooks."""
        return self.base / HOOKS[name] / name

    def answers(self, status: int) -> None:
        self.program.write_text(RECORDER.format(record=self.record, started=self.base / "started", status=status))
        self.program.chmod(0o755)

    def run(self, name: str, *arguments: str, uid: int = 0) -> list[str]:
        """What the program was called with; the hook must end with 0."""
        self.record.unlink(missing_ok=True)
        assert self.call(name, *arguments, uid=uid).returncode == 0
        return self.record.read_bytes().decode().split("\0")[:-1] if self.record.exists() else []

    def call(self, name: str, *arguments: str, uid: int = 0, node: str = "0", **more: Any) -> Done:
        """Run a hook on the node of the job with the number `node`."""
        return subprocess.run(
            [str(self.path(name)), *arguments],
            env={"PATH": "/bin:/usr/bin", "PBS_NODENUM": node},
            cwd="/",
            user=uid,
            group=uid,
            extra_groups=[],
            capture_output=True,
            text=True,
            **more,
        )


@pytest.fixture
def hooks() -> Iterator[Hooks]:
    with short_folder() as base:
        base.chmod(0o1777)
        yield Hooks(base)


def prologue(resources: str) -> list[str]:
    return ["12.host", "carol", "chem", 'a job\'s "name" $(id)\n*', resources, "batch", "", "/x/12.host.SC"]


def epilogue(resources: str) -> list[str]:
    return ["12.host", "carol", "chem", "a job's name", "4242", resources, "cput=0", "batch", "", "0", "/x/12.host.SC"]


def test_these_are_all(hooks: Hooks) -> None:
    installed = {hook.source for mode in MODES for hook in hook_files(mode)}
    assert {hook.name for hook in (REPOSITORY / "mom_priv_hooks").iterdir() if hook.is_file()} == installed


@pytest.mark.parametrize("name", PROLOGUES)
def test_a_guest_job_starts_the_program_with_every_argument(hooks: Hooks, name: str) -> None:
    assert hooks.run(name, *prologue(GUEST)) == ["prologue", *prologue(GUEST)]


@pytest.mark.parametrize("name", EPILOGUES)
def test_an_epilogue_too(hooks: Hooks, name: str) -> None:
    assert hooks.run(name, *epilogue(GUEST)) == ["epilogue", *epilogue(GUEST)]


@pytest.mark.parametrize(
    "resources", [BARE, "", "nodes=1", f"other={GUEST[8:]}".replace(",prologue", ",x"), "*", "$(touch x)"]
)
def test_a_job_without_guests_never_starts_it(hooks: Hooks, resources: str) -> None:
    for name in PROLOGUES:
        assert hooks.run(name, *prologue(resources)) == []
    for name in EPILOGUES:
        assert hooks.run(name, *epilogue(resources)) == []
    assert not (hooks.base / "started").exists()


ITEMS = st.sampled_from(
    [GUEST, "nodes=1", "walltime=1:00", "prologue=/home/carol/my", "prologue=", f"other={GUEST[8:]}", "x=*", "y=$(z)"]
    + [
        f"prologue=/h{where}/.vtorque/abcd1234/{SHA}/{name}"
        for where in ("", "/a b", "/ü")
        for name in ("prologue", "x")
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(ITEMS, max_size=4))
def test_no_job_that_the_program_takes_for_a_guest_job_is_missed(hooks: Hooks, items: list[str]) -> None:
    resources = ",".join(items)
    try:
        guest = guest_job(resources) is not None
    except VTorqueError:
        guest = False  # which the program says
    if guest:
        assert hooks.run("prologue", *prologue(resources)) == ["prologue", *prologue(resources)]
        assert hooks.run("epilogue", *epilogue(resources)) == ["epilogue", *epilogue(resources)]


@pytest.mark.parametrize("name", EPILOGUES)
def test_a_job_whose_resource_list_lost_its_items_is_known_by_its_record(hooks: Hooks, name: str) -> None:
    (hooks.spool / "jobs" / "12.host").mkdir(parents=True)
    assert hooks.run(name, *epilogue("nodes=1"))[:2] == ["epilogue", "12.host"]
    assert hooks.run(name, "13.host", *epilogue("nodes=1")[1:]) == []


@pytest.mark.parametrize("name", EPILOGUES)
def test_as_the_user_an_epilogue_does_nothing(hooks: Hooks, name: str) -> None:
    (hooks.spool / "jobs" / "12.host").mkdir(parents=True)
    assert hooks.run(name, *epilogue(GUEST), uid=4711) == []


@pytest.mark.parametrize("name", [*PROLOGUES, *EPILOGUES])
def test_the_status_is_0_whatever_happens(hooks: Hooks, name: str) -> None:
    arguments = prologue(GUEST) if name in PROLOGUES else epilogue(GUEST)
    for status in (1, 99, 127):
        hooks.answers(status)
        assert hooks.run(name, *arguments) != []
    hooks.program.chmod(0o644)
    assert hooks.run(name, *arguments) == []
    hooks.program.unlink()
    assert hooks.run(name, *arguments) == []
    for few in ([], ["12.host"], [""] * 4, ["../../etc", "x"]):
        hooks.run(name, *few)
    hooks.program.symlink_to("/bin/false")
    hooks.run(name, *arguments)


def test_they_are_executable_and_plain_sh() -> None:
    for hook in (path for path in (REPOSITORY / "mom_priv_hooks").rglob("*") if path.is_file()):
        assert os.access(hook, os.X_OK) and hook.read_text().startswith("#!/bin/sh\n")
        for shell in ("sh", "bash"):
            subprocess.run([shell, "-n", str(hook)], check=True)


# the site's own hooks

SITE_HOOK = """\
#!/bin/sh
# says how it was called, and ends as it is told
{
    printf '%s:' "${0##*/}"
    printf ' [%s]' "$@"
    printf ' %s %s\\n' "$(tr '\\0' ' ' </proc/$$/environ)" "$(pwd)"
    cat
} >>@CALLS@
echo "out of ${0##*/}"
echo "err of ${0##*/}" >&2
@END@
"""


class Site:
    """A site's own hooks, in both modes where they are then."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks
        self.calls = hooks.base / "calls"
        (hooks.base / WRAP / SITE_FOLDER).mkdir()
        (hooks.base / WRAP / SITE_FOLDER).chmod(SITE_FOLDER_MODE)
        for name in site_hooks(WRAP):
            self.write(name)

    def write(self, name: str, end: str = "exit 0", *, mode: int = 0o755) -> None:
        """A hook, such that `end` is its last line."""
        for place in (self.hooks.base / WRAP / SITE_FOLDER, self.hooks.base / JOB_TYPE):
            (place / name).write_text(SITE_HOOK.replace("@CALLS@", str(self.calls)).replace("@END@", end))
            (place / name).chmod(mode)

    def run(self, name: str, *arguments: str, stdin: str = "", **more: Any) -> tuple[Done, list[str]]:
        """One of our hooks: how it ended; which of the site's and of ours ran, in order."""
        self.calls.write_text("")
        self.calls.chmod(0o666)
        self.hooks.program.write_text(f'#!/bin/sh\necho "program: $1" >>{self.calls}\nexit 3\n')
        done = self.hooks.call(name, *arguments, input=stdin, **more)
        lines = self.calls.read_text().splitlines()
        return done, [line.partition(":")[0].replace("program", "ours") for line in lines if ": " in line]


@pytest.fixture
def site(hooks: Hooks) -> Site:
    return Site(hooks)


ROLES = [
    # a hook's first word, what it is run as, what stands for the site's hook then
    ("prologue", 0, "0", "prologue"),
    ("prologue", 0, "1", "prologue.parallel"),
    ("prologue", 0, "17", "prologue.parallel"),
    ("prologue", 4711, "0", "prologue.user"),
    ("prologue", 4711, "2", "prologue.user.parallel"),
    ("epilogue", 0, "0", "epilogue"),
    ("epilogue", 0, "1", "epilogue.parallel"),
    ("epilogue", 4711, "0", "epilogue.user"),
    ("epilogue", 4711, "2", "epilogue.user.parallel"),
]


@pytest.mark.parametrize(("phase", "uid", "node", "hook"), ROLES)
def test_the_role_follows_from_user_and_node_whatever_the_name(
    site: Site, phase: str, uid: int, node: str, hook: str
) -> None:
    arguments = prologue if phase == "prologue" else epilogue
    for name in (name for name in HOOKS if name.startswith(phase)):
        if name == "epilogue.precancel" and uid:
            continue
        _, ran = site.run(name, *arguments(BARE), uid=uid, node=node)
        assert ran == [hook], name
        _, ran = site.run(name, *arguments(GUEST), uid=uid, node=node)
        with_ours = [hook, "ours"] if phase == "prologue" else ["ours", hook]
        assert ran == (with_ours if uid == 0 else [hook]), name


def test_with_the_users_rights_precancel_is_what_it_is_called(site: Site) -> None:
    for resources in (BARE, GUEST):
        assert site.run("epilogue.precancel", *epilogue(resources), uid=4711)[1] == ["epilogue.precancel"]


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("resources", [BARE, GUEST])
def test_the_sites_hook_sees_what_it_saw_before(site: Site, name: str, resources: str) -> None:
    phase = name.partition(".")[0]
    arguments = (prologue if phase == "prologue" else epilogue)(resources)
    done, _ = site.run(name, *arguments, stdin="taken: yes\n")
    words = "".join(f" [{word}]" for word in arguments)
    seen = site.calls.read_text()
    assert f"{phase}:{words} " in seen and "\ntaken: yes\n" in f"\n{seen}"
    environment = seen.partition(words)[2].splitlines()[0].split()
    own = ("_=", "SHLVL=")  # which a bash in the place of sh(1) adds whatever is done
    assert sorted(word for word in environment if not word.startswith(own)) == [
        "/",
        "PATH=/bin:/usr/bin",
        "PBS_NODENUM=0",
    ]
    assert (done.stdout, done.stderr) == (f"out of {phase}\n", f"err of {phase}\n")


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("resources", [BARE, GUEST])
@pytest.mark.parametrize("status", [0, 1, 2, 99, 126, 127, 255])
def test_the_status_is_the_sites(site: Site, name: str, resources: str, status: int) -> None:
    phase = name.partition(".")[0]
    site.write(phase, f"exit {status}")
    done, ran = site.run(name, *(prologue if phase == "prologue" else epilogue)(resources))
    assert done.returncode == status
    # a job whose prologue fails does not run: it gets no guest
    assert ("ours" in ran) == (resources == GUEST and (phase == "epilogue" or status == 0))


@pytest.mark.parametrize("signal", [9, 15])
def test_a_site_hook_that_is_killed(site: Site, signal: int) -> None:
    for phase, arguments in (("prologue", prologue), ("epilogue", epilogue)):
        site.write(phase, f"kill -{signal} $$; sleep 60")
        assert site.run(phase, *arguments(BARE))[0].returncode == -signal
        done, ran = site.run(phase, *arguments(GUEST))
        assert (done.returncode, "ours" in ran) == ((128 + signal, False) if phase == "prologue" else (-signal, True))


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o644])
@pytest.mark.parametrize("resources", [BARE, GUEST])
def test_a_site_hook_that_a_mom_would_not_run(site: Site, mode: int, resources: str) -> None:
    for phase, arguments in (("prologue", prologue), ("epilogue", epilogue)):
        site.write(phase, mode=mode)
        done, ran = site.run(phase, *arguments(resources))
        assert (done.returncode, phase in ran) == (255, False)
        assert done.stderr.endswith(f"{phase}: must be a file that root owns and can run, and nobody else can write\n")
        site.write(phase)
        os.chown(site.hooks.base / WRAP / SITE_FOLDER / phase, 4711, 0)
        assert site.run(phase, *arguments(resources))[0].returncode == 255


def test_a_site_without_some_hooks(site: Site) -> None:
    for name in site_hooks(WRAP):
        (site.hooks.base / WRAP / SITE_FOLDER / name).unlink()
    (site.hooks.base / WRAP / SITE_FOLDER / "prologue").symlink_to("nowhere")
    for name in site_hooks(WRAP):
        for resources in (BARE, GUEST):
            done, ran = site.run(name, *(prologue if name.startswith("prologue") else epilogue)(resources))
            assert done.returncode == 0 and ran == (["ours"] if resources == GUEST else [])
