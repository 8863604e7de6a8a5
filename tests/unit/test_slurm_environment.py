"""The environment of jobs on Slurm: what TORQUE would give them, and nothing that Slurm takes for an option."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgr.errors import Code, VTorqueError
from vmgr.node.slurmenv import pbs_variables
from vsub.engines.slurmenvironment import PATH, SLURMS, Login, job_environment, plain_environment
from vsub.engines.slurmoptions import parse_sbatch
from vsub.options import Option, parse_line

LOGIN = Login("carol", "/home/carol", "/bin/bash", "/home/carol/work", "front")
HERE = {
    "HOME": "/elsewhere", "PATH": "/x", "LANG": "C", "A": "of here", "SLURM_JOB_ID": "5", "SBATCH_PARTITION": "x",
    "SLURM_CONF": "/etc/slurm.conf", "TMPDIR": "/of/here",
}  # fmt: skip
ALWAYS = {
    "HOME": "/home/carol", "LOGNAME": "carol", "USER": "carol", "SHELL": "/bin/bash", "PATH": PATH,
    "PBS_O_HOME": "/elsewhere", "PBS_O_PATH": "/x", "PBS_O_LANG": "C", "PBS_O_WORKDIR": "/home/carol/work",
    "PBS_O_HOST": "front", "PBS_O_SERVER": "front", "SLURM_CONF": "/etc/slurm.conf",
}  # fmt: skip
TAKEN = {"HOME": "/elsewhere", "PATH": "/x", "LANG": "C", "A": "of here"}


@pytest.mark.parametrize(
    ("words", "native", "more"),
    [
        ([], [], {}),
        (["-V"], [], TAKEN),
        (["-v", "A,B=1,C"], [], {"A": "of here", "B": "1", "C": ""}),
        (["-v", "A=1,'B=x,y',C=\"z w\""], [], {"A": "1", "B": "x,y", "C": "z w"}),
        (["-v", "A=1", "-v", "B=2"], [], {"B": "2"}),
        (["-V", "-v", "A=1"], [], {**TAKEN, "A": "1"}),
        (["-v", "PATH=/mine"], [], {"PATH": "/mine"}),
        (["-v", "TMPDIR=/mine"], [], {}),
        (["-q", "long"], [], {"PBS_O_QUEUE": "long"}),
        ([], ["--export=ALL"], TAKEN),
        ([], ["--export=NONE"], {}),
        ([], ["--export=nil"], {}),
        ([], ["--export=A,B=2"], {"A": "of here", "B": "2"}),
        ([], ["--export=ALL,A=2"], {**TAKEN, "A": "2"}),
        (["-V"], ["--export=NONE"], {}),
    ],
)
def test_what_a_guest_job_has(words: list[str], native: list[str], more: dict[str, str]) -> None:
    options = parse_line(words).options + parse_sbatch(native).options
    assert job_environment(options, HERE, LOGIN) == {**ALWAYS, **more}


def test_how_the_cluster_is_reached() -> None:
    """Where there is no file of the configuration, or no munge."""
    reached = {"SLURM_CONF_SERVER": "ctl:6817", "SLURM_SACK_SOCKET": "/run/sack.socket", "SLURM_JWT": "abc"}
    assert job_environment((), {**HERE, **reached}, LOGIN) == {**ALWAYS, **reached}
    assert plain_environment((), {"SLURM_JOB_ID": "5", **reached}, interactive=True) == reached


def test_a_session_has_the_terminal_of_here() -> None:
    here = {**HERE, "TERM": "xterm"}
    assert job_environment((), here, LOGIN) == ALWAYS
    assert job_environment((), here, LOGIN, interactive=True) == {**ALWAYS, "TERM": "xterm"}


def test_of_both_languages_the_last_one_counts() -> None:
    exported, listed = parse_sbatch(["--export=ALL,A=2"]).options, parse_line(["-v", "B=1"]).options
    assert job_environment(exported + listed, HERE, LOGIN) == {**ALWAYS, "B": "1"}
    assert job_environment(listed + exported, HERE, LOGIN) == {**ALWAYS, **TAKEN, "A": "2"}


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SBATCH_PARTITION", "SRUN_X", "SLURMD_NODENAME"])
@pytest.mark.parametrize("how", ["-v", "--export"])
def test_slurms_own_variables_cannot_be_given(name: str, how: str) -> None:
    option = Option("v", f"{name}=1", "here") if how == "-v" else parse_sbatch([f"--export={name}=1"]).options[0]
    with pytest.raises(VTorqueError) as problem:
        job_environment((option,), HERE, LOGIN)
    assert problem.value.code is Code.OPTION


@given(st.text(alphabet="AB=,'\"\\ SLURM_", max_size=20))
def test_whatever_a_list_of_variables_holds(text: str) -> None:
    try:
        found = job_environment((Option("v", text, "here"),), {}, LOGIN)
    except VTorqueError:
        return
    assert not any(name.startswith(SLURMS) for name in found) and all(found)


def test_a_job_without_guests_has_ours() -> None:
    assert plain_environment((), HERE, interactive=False) == HERE
    options = parse_line(["-v", "A=1,B=2"]).options
    assert plain_environment(options, HERE, interactive=True) == {
        **{name: value for name, value in HERE.items() if name != "SLURM_JOB_ID"}, "A": "1", "B": "2",
    }  # fmt: skip


BATCH = {
    "ENVIRONMENT": "BATCH", "SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_CLUSTER_NAME": "ref", "SLURM_JOB_NAME": "job.sh", "SLURM_JOB_PARTITION": "batch", "SLURM_CPUS_ON_NODE": "2",
    "SLURM_JOB_NUM_NODES": "3", "SLURM_PROCID": "0",
}  # fmt: skip


def test_the_variables_of_torques() -> None:
    assert pbs_variables(BATCH) == {
        "PBS_JOBID": "17.ref", "PBS_JOBNAME": "job.sh", "PBS_QUEUE": "batch", "PBS_ARRAYID": "3",
        "PBS_ENVIRONMENT": "PBS_BATCH", "PBS_NUM_NODES": "3", "PBS_NUM_PPN": "2", "PBS_NP": "6", "PBS_NODENUM": "0",
        "PBS_VNODENUM": "0", "PBS_TASKNUM": "1",
    }  # fmt: skip
    session = {name: value for name, value in BATCH.items() if name not in ("ENVIRONMENT", "SLURM_ARRAY_TASK_ID")}
    found = pbs_variables(session)
    assert found["PBS_ENVIRONMENT"] == "PBS_INTERACTIVE" and "PBS_ARRAYID" not in found


@given(st.dictionaries(st.sampled_from(sorted(BATCH)), st.text(max_size=30)))
def test_whatever_slurm_gives(environ: dict[str, str]) -> None:
    assert all(name.startswith("PBS_") for name in pbs_variables(environ))
