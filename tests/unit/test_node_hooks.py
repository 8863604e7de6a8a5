"""The hooks as shell scripts: what a job without guests pays, what the program is told, and that they end with 0."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodesite import REPOSITORY, short_folder

SHA = "0123456789abcdef" * 4
GUEST = f"nodes=1,prologue=/home/carol/.vtorque/abcd1234/{SHA}/prologue,neednodes=1"
BARE = "nodes=1,walltime=00:05:00,prologue=/home/carol/my/prologue,neednodes=1"
PROLOGUES = ("prologue", "prologue.parallel")
EPILOGUES = ("epilogue", "epilogue.parallel", "epilogue.precancel")

RECORDER = """\
#!/bin/sh
for word; do printf '%s\\0' "$word"; done >>{record}
echo program >>{started}
exit {status}
"""


class Hooks:
    """The hooks of the repository, installed below a folder, with a program that records how it was called."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.spool = base / "spo ol"
        self.record = base / "record"
        self.program = base / "pre fix" / "libexec" / "vtorque-hook"
        self.program.parent.mkdir(parents=True)
        self.answers(0)
        for hook in (REPOSITORY / "mom_priv_hooks").iterdir():
            text = hook.read_text().replace("@PREFIX@", str(base / "pre fix")).replace("@SPOOL@", str(self.spool))
            (base / hook.name).write_text(text)
            (base / hook.name).chmod(0o755)

    def answers(self, status: int) -> None:
        self.program.write_text(RECORDER.format(record=self.record, started=self.base / "started", status=status))
        self.program.chmod(0o755)

    def run(self, name: str, *arguments: str, uid: int = 0) -> list[str]:
        """What the program was called with; the hook must end with 0."""
        self.record.unlink(missing_ok=True)
        # who runs it is decided by `id`, first on the hook's PATH as mom gives it; a fake stands for both users
        (self.base / "id").write_text(f"#!/bin/sh\necho {uid}\n")
        (self.base / "id").chmod(0o755)
        done = subprocess.run(
            [str(self.base / name), *arguments],
            env={"PATH": f"{self.base}:/bin:/usr/bin"},
            cwd="/",
            capture_output=True,
        )
        assert done.returncode == 0
        return self.record.read_bytes().decode().split("\0")[:-1] if self.record.exists() else []


@pytest.fixture
def hooks() -> Iterator[Hooks]:
    with short_folder() as base:
        yield Hooks(base)


def prologue(resources: str) -> list[str]:
    return ["12.host", "carol", "chem", 'a job\'s "name" $(id)\n*', resources, "batch", "", "/x/12.host.SC"]


def epilogue(resources: str) -> list[str]:
    return ["12.host", "carol", "chem", "a job's name", "4242", resources, "cput=0", "batch", "", "0", "/x/12.host.SC"]


def test_these_are_all(hooks: Hooks) -> None:
    assert {hook.name for hook in (REPOSITORY / "mom_priv_hooks").iterdir()} == {*PROLOGUES, *EPILOGUES}


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
    for hook in (REPOSITORY / "mom_priv_hooks").iterdir():
        assert os.access(hook, os.X_OK) and hook.read_text().startswith("#!/bin/sh\n")
        for shell in ("sh", "bash"):
            subprocess.run([shell, "-n", str(hook)], check=True)
