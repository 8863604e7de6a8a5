"""Slurm's hooks as shell scripts: what a job without guests pays, how the program is called, their status."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodesite import REPOSITORY, short_folder

from vmgr.deploy.hookfiles import fill
from vmgr.deploy.slurmfiles import HOOKS
from vmgr.node.slurmenv import pbs_variables

COMMENT = f'vtorque:/home/carol/.vtorque/abcd1234/{"0123456789abcdef" * 4} mine: it\'s "so" $(id)\n*'
JOB = {"SLURM_JOB_ID": "12", "SLURM_CLUSTER_NAME": "ref"}


class Hooks:
    """The hooks of the repository, with a program that records how it was called, and ends with 3."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.record = base / "record"
        program = base / "pre fix" / "libexec" / "vtorque-hook"
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\necho "$@" "$SLURM_JOB_ID" >>{self.record}\nexit 3\n')
        program.chmod(0o755)
        for name in HOOKS:
            text = (REPOSITORY / "mom_priv_hooks" / "slurm" / name).read_text()
            (base / name).write_text(fill(text, prefix=str(base / "pre fix"), spool=str(base / "spo ol")))
            (base / name).chmod(0o755)

    def run(self, name: str, **environment: str) -> str:
        """What the program was called with, once for each line; slurmd gives a hook no PATH and no arguments."""
        self.record.unlink(missing_ok=True)
        done = subprocess.run(
            [self.base / name], env=environment, cwd="/", stdin=subprocess.DEVNULL, capture_output=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        return self.record.read_text() if self.record.exists() else ""


@pytest.fixture
def hooks() -> Iterator[Hooks]:
    with short_folder() as base:
        yield Hooks(base)


def test_these_are_all() -> None:
    assert {path.name for path in (REPOSITORY / "mom_priv_hooks" / "slurm").iterdir()} == set(HOOKS)


def test_a_guest_job_starts_the_program(hooks: Hooks) -> None:
    assert hooks.run("prolog", **JOB, SLURM_JOB_COMMENT=COMMENT) == "prologue 12\n"


@pytest.mark.parametrize(
    "comment", ["", "mine", f" {COMMENT}", "vtorque:", "vtorque:relative/.vtorque/x", "$(touch x)"]
)
def test_a_job_without_guests_never_does(hooks: Hooks, comment: str) -> None:
    for name in ("prolog", "epilog"):
        assert hooks.run(name, **JOB, SLURM_JOB_COMMENT=comment) == hooks.run(name, **JOB) == hooks.run(name) == ""
    assert hooks.run("epilog", **JOB, SLURM_JOB_COMMENT=COMMENT) == "", "a comment alone makes no guest job"


@pytest.mark.parametrize("known", ["jobs/12.ref", "ended/12.ref", "jobs/12.0123456789abcdef"])
def test_an_epilog_knows_a_job_by_its_record(hooks: Hooks, known: str) -> None:
    """Or by the word that its agent has left, and also by the shorter name of one with a long id."""
    (hooks.base / "spo ol" / known).mkdir(parents=True)
    (hooks.base / "spo ol" / "jobs" / "112.ref").mkdir(parents=True)
    (hooks.base / "spo ol" / "ended" / ".12.ref.77").mkdir(parents=True)
    assert hooks.run("epilog", **JOB, SLURM_JOB_COMMENT="mine") == "epilogue 12\n"
    assert hooks.run("epilog", **{**JOB, "SLURM_JOB_ID": "13"}, SLURM_JOB_COMMENT="mine") == ""


def test_a_program_that_is_not_there_drains_no_node(hooks: Hooks) -> None:
    (hooks.base / "pre fix" / "libexec" / "vtorque-hook").unlink()
    for name in ("prolog", "epilog"):
        done = subprocess.run([hooks.base / name], env={**JOB, "SLURM_JOB_COMMENT": COMMENT}, capture_output=True)
        assert done.returncode == 0


def test_the_task_prolog_gives_what_guests_are_given(hooks: Hooks) -> None:
    environment = {
        **JOB, "SLURM_JOB_NAME": "it's mine", "SLURM_JOB_PARTITION": "batch", "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "4", "PBS_O_WORKDIR": "/home/carol",
    }  # fmt: skip
    done = subprocess.run([hooks.base / "task_prolog"], env=environment, capture_output=True, text=True, check=True)
    given = dict(line[len("export ") :].split("=", 1) for line in done.stdout.splitlines())
    assert len(given) == 6 and given.items() <= pbs_variables(environment).items()
    del environment["SLURM_ARRAY_TASK_ID"]
    done = subprocess.run([hooks.base / "task_prolog"], env=environment, capture_output=True, text=True, check=True)
    assert "PBS_ARRAYID" not in done.stdout and done.stdout.count("\n") == 5


def test_the_task_prolog_leaves_jobs_of_sbatch_alone(hooks: Hooks) -> None:
    assert hooks.run("task_prolog", **JOB, SLURM_JOB_NAME="x") == ""
