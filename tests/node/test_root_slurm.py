"""Submission to a real Slurm: sbatch and srun take what vsub makes, and what Slurm's commands say is understood.

In place of the job wrapper stands a program that notes what it is given; guests are the matter of tests/e2e.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from slurmdaemons import missing, slurm
from slurmprograms import BIN, PATH
from vsubsite import Site

from vmgr.config import load_config
from vmgr.errors import VTorqueError
from vmgr.node.slurmenv import pbs_variables
from vsub.engines import PlacedJob
from vsub.engines.slurm import Slurm
from vsub.engines.slurmdirectives import split_words
from vsub.engines.slurmlisting import parse_version
from vsub.engines.slurmoptions import TABLE

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"needs Slurm: {missing()} is missing")

PATIENCE_S = 60
NOT_IN_ITS_HELP = {"extra", "network", "open-mode", "parsable", "prefer", "resources", "segment"}
"""Options that srun(1) names, and `srun --help` does not."""
OF_SOME_VERSIONS = {"consolidate-segments", "oom-kill-step", "power", "spread-segments"}
COMES = ("JobId", "ArrayJobId", "SubmitTime", "AccrueTime", "LastSchedEval", "Comment", "Command")
"""What Slurm says of a job that is no other's."""
WRAPPER = """\
#!/bin/sh
# stands for the job wrapper
env -0 >{record}/new.$SLURM_JOB_ID.${{SLURM_PROCID:-0}}
mv {record}/new.$SLURM_JOB_ID.${{SLURM_PROCID:-0}} {record}/job.$SLURM_JOB_ID.${{SLURM_PROCID:-0}}
echo "out $#"; echo err >&2
[ ! -e {record}/stay ] || exec sleep 300
[ "${{SLURM_PROCID:-0}}" = 0 ] || exit 0
exit 5
"""


class Here(NamedTuple):
    """A site on a real Slurm, and its engine."""

    site: Site
    conf: Path
    engine: Slurm

    def vsub(self, *words: str, env: dict[str, str] = {}) -> subprocess.CompletedProcess[bytes]:  # noqa: B006
        return self.site.launch(*words, env={"SLURM_CONF": str(self.conf), **env})

    def submit(self, *words: str, env: dict[str, str] = {}) -> str:  # noqa: B006
        done = self.vsub(*words, env=env)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": PATH, "SLURM_CONF": str(self.conf)}
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)

    def noted(self, job: str, task: int = 0) -> dict[str, str]:
        """The environment of a job's wrapper, once it runs."""
        path = self.site.record / f"job.{job}.{task}"
        eventually(path.exists)
        return dict(item.split("=", 1) for item in os.fsdecode(path.read_bytes()).split("\0")[:-1])

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm says of a job, but for what it is called and when it came."""
        told = self.run("scontrol", "-o", "show", "job", job).stdout
        told = re.sub(r" SubmitLine=.*(?= WorkDir=)", "", told)
        found = dict(re.findall(r"(\S+?)=(.*?)(?= \S+=|\s*$)", told))
        if found.get("Exclusive") == "USER":  # as 26.05 tells it
            found["OverSubscribe"] = found.pop("Exclusive")
        found["StdErr"] = found["StdErr"] or found["StdOut"]  # empty for one file for both since 24.05
        return {name: value for name, value in found.items() if name not in COMES}

    def ended(self, job: str) -> int:
        eventually(lambda: self.engine.state(job).ended)
        status = self.engine.state(job).exit_status
        assert status is not None
        return status


def eventually(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.05)  # Slurm tells of nothing by itself


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vt-slurm-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        with slurm(Path(folder)) as conf:
            yield conf


@pytest.fixture
def here(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    site = Site(tmp_path)
    site.configure("policy: {img: {default: micro}, vcpus: {max: 8}, ram: {max: 4G}, nodes: {max: 8}}\n")
    site.install.config.write_text(f"engine: slurm\nslurm: {{bin: {BIN}}}\n{site.install.config.read_text()}")
    wrapper = Path(site.install.program("vtorque-job"))
    wrapper.write_text(WRAPPER.format(record=site.record))
    wrapper.chmod(0o755)
    monkeypatch.setenv("SLURM_CONF", str(cluster))
    return Here(site, cluster, Slurm(load_config(site.install)))


def test_a_job(here: Here) -> None:
    """Its files, its output, its environment, its status, and the comment that leads to it."""
    here.site.script("#!/bin/sh\n#PBS -N named -l nodes=2:ppn=2,walltime=60\n#SBATCH --comment='my own' -p long\n")
    job = here.submit("-v", "A=x y,B", "job.sh", env={"B": "b", "C": "c"})
    found = here.noted(job)
    assert here.ended(job) == 5
    assert (here.site.work / f"named.o{job}").read_text() == "out 1\n"
    assert (here.site.work / f"named.e{job}").read_text() == "err\n"
    assert (found["A"], found["B"], found["PBS_O_WORKDIR"]) == ("x y", "b", str(here.site.work)) and "C" not in found
    made = pbs_variables(found)
    expected = {
        "PBS_JOBID": f"{job}.ref", "PBS_JOBNAME": "named", "PBS_QUEUE": "long", "PBS_ENVIRONMENT": "PBS_BATCH",
        "PBS_NUM_NODES": "2", "PBS_NUM_PPN": "2", "PBS_NP": "4",
    }  # fmt: skip
    assert {name: made[name] for name in expected} == expected
    told = here.run("scontrol", "show", "job", job).stdout
    assert f"Comment=vtorque:{here.site.directory} my own" in told
    assert (
        "MinMemoryNode=768M" in told
        and re.search("(OverSubscribe|Exclusive)=USER", told)
        and "TimeLimit=00:01:00" in told
    )
    assert (here.site.directory.parent / "job_id").read_text() == f"{job}.ref\n"


def test_waiting(here: Here) -> None:
    here.site.script()
    done = here.vsub("--wait", "job.sh")
    assert done.returncode == 5 and b"exit status 5" in done.stderr
    after = here.vsub("--wait", "-W", f"depend=afterok:{done.stdout.decode().strip()}", "job.sh")
    assert after.returncode == 1 and b"left no exit status" in after.stderr, "it could never start, and has ended"


def test_an_array_and_what_depends_on_it(here: Here) -> None:
    here.site.script()
    array = here.submit("-h", "-t", "3,5%1", "-j", "oe", "-o", "$PBS_ARRAYID.$PBS_JOBNAME", "job.sh")
    after = here.submit("-W", f"depend=afterany:{array}[].ref", "-N", "after", "job.sh")
    assert (here.engine.state(array).phase, here.engine.state(after).phase) == ("held", "waiting")
    here.run("scontrol", "release", array)
    assert here.ended(after) == 5
    assert here.ended(f"{array}[3]") == here.ended(f"{array}_5") == 5
    assert [(here.site.work / f"{index}.job.sh").read_text() for index in (3, 5)] == ["out 1\nerr\n"] * 2
    members = [pbs_variables(here.noted(path.name.split(".")[1])) for path in here.site.record.glob("job.*")]
    assert sorted(each.get("PBS_ARRAYID", "") for each in members) == ["", "3", "5"]


def test_a_session_on_two_nodes(here: Here) -> None:
    """One task on each node; the status is that of the first."""
    here.site.script()
    command = shlex.join(here.site.command("-I", "-x", "-l", "nodes=2:ppn=2", "-N", "talk", "job.sh"))
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"], capture_output=True, cwd=here.site.work, timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL, env={**os.environ, "SLURM_CONF": str(here.conf), "PWD": str(here.site.work)},
    )  # fmt: skip
    assert done.returncode == 5, done.stdout
    assert b"out 1" in done.stdout
    (job,) = {path.name.split(".")[1] for path in here.site.record.glob("job.*")}
    first, second = here.noted(job), here.noted(job, 1)
    assert (first["SLURM_JOB_NUM_NODES"], first["SLURM_CPUS_ON_NODE"], second["SLURMD_NODENAME"]) == ("2", "2", "n2")
    assert pbs_variables(first)["PBS_ENVIRONMENT"] == "PBS_INTERACTIVE"


def test_a_job_in_hand(here: Here) -> None:
    """Held while it runs it goes on, and waits once it is queued again; released it starts anew."""
    here.site.script()
    (here.site.record / "stay").touch()
    job = here.submit("-l", "nodes=2", "job.sh")
    here.noted(job)
    named = f"{job}.ref"
    assert here.engine.placed(None, 20) == here.engine.placed(named, 20) == (PlacedJob(named, "root", ("n1", "n2")),)
    assert (here.engine.nodes(20), here.engine.server(20)) == (("n1", "n2"), "ref")
    assert here.engine.hold(named, 20) is True
    assert here.engine.hold(named, 20) is False
    assert here.engine.state(named).phase == "running"
    here.engine.requeue(named, 20)
    eventually(lambda: here.engine.state(named).phase == "held")
    with pytest.raises(VTorqueError, match="is not running"):
        here.engine.requeue(named, 20)
    here.engine.release(named, 20)
    with pytest.raises(VTorqueError, match="is not held"):
        here.engine.release(named, 20)
    here.run("scancel", job)
    eventually(lambda: here.engine.state(named).ended)
    assert here.engine.placed(None, 20) == ()
    here.engine.check_requeue(20)
    assert here.engine.state("999999").phase == "gone"


def comment(here: Here, job: str) -> str:
    """The comment as it is: as text a carriage return would become a newline."""
    argv = ["squeue", "-h", "-t", "all", "-o", "%k", "-j", job]
    told = subprocess.run(argv, env={"PATH": PATH, "SLURM_CONF": str(here.conf)}, capture_output=True, timeout=60)
    return told.stdout.decode().removesuffix("\n")


def test_a_comment_is_given_back(here: Here) -> None:
    """To a job that runs, exactly as it was given; Slurm changes nothing of one that has ended."""
    here.site.script()
    (here.site.record / "stay").touch()
    own = 'it\'s "mine" a=b \\ $(id) \u00fc\n\n  x=y= '
    job = here.submit("job.sh", "--slurm", f"--comment={own}")
    here.noted(job)
    assert comment(here, job) == f"vtorque:{here.site.directory} {own}"
    here.engine.give_back(job, 20)
    assert comment(here, job) == own
    here.engine.give_back(job, 20)
    assert comment(here, job) == own

    longest = 1024 - len(f"vtorque:{here.site.directory} ")

    @settings(max_examples=25, deadline=None)
    @example(text="\u00fc" * (longest // 2))
    @example(text="x" * longest)
    @given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60))
    def is_given_back(text: str) -> None:
        done = here.run("scontrol", "update", f"JobId={job}", f"Comment=vtorque:{here.site.directory} {text}")
        assert done.returncode == 0
        here.engine.give_back(job, 20)
        assert comment(here, job) == text

    is_given_back()
    marked = f"vtorque:{here.site.directory} mine"
    assert here.run("scontrol", "update", f"JobId={job}", f"Comment={marked}").returncode == 0
    here.run("scancel", job)
    eventually(lambda: here.engine.state(job).ended)
    with pytest.raises(VTorqueError, match="Job has already finished"):
        here.engine.give_back(job, 20)
    assert comment(here, job) == marked


def test_the_comment_of_one_member_is_given_back(here: Here) -> None:
    """Also that of the one whose number is the array's."""
    here.site.script()
    (here.site.record / "stay").touch()
    array = here.submit("-t", "1-3%2", "job.sh", "--slurm", "--comment=mine")
    eventually(lambda: len(list(here.site.record.glob("job.*"))) == 2)
    marked = f"vtorque:{here.site.directory} mine"
    here.engine.give_back(f"{array}_1", 20)
    assert [comment(here, f"{array}_{index}") for index in (1, 2, 3)] == ["mine", marked, marked]
    here.run("scancel", f"{array}_1")
    here.noted(array)
    assert here.engine.whole(f"{array}[3]", 20) == f"{array}.ref" != here.engine.whole(f"{array}_2", 20)
    with pytest.raises(VTorqueError, match=f"job {array} is a job array"):
        here.engine.hold(array, 20)
    here.engine.requeue(f"{array}.ref", 20)
    eventually(lambda: here.engine.state(f"{array}_3").phase in ("waiting", "queued", "held"))
    assert here.engine.state(f"{array}_2").phase == "running", "it is requeued alone"
    assert here.engine.whole(f"{array}_3", 20) == f"{array}.ref"
    here.engine.give_back(f"{array}_3", 20)
    assert [comment(here, f"{array}_{index}") for index in (2, 3)] == [marked, "mine"]
    here.run("scancel", array)
    eventually(lambda: here.engine.state(array).ended)


@pytest.mark.parametrize(
    "words",
    [
        "-q long -p -5 -m abe -M me@x,you@y -r n -a 203001021530 -h",
        "-l nodes=n1:ppn=2+n2:ppn=2 -l walltime=1:00:00 -l mem=4gb -n",
        "-l nodes=2:ib -l feature=ib -l naccesspolicy=shared -t 1,5-7%2 -j oe -o /tmp/x%-$PBS_JOBID",
        "-W depend=after:1 -A '' -k oe",
        "--slurm -b now+1hour -C ib -x n2 -w n1 --nice=3 --signal=B:USR1@60 --mail-type=ALL --open-mode=append",
        "--slurm -N2 --ntasks-per-node=2 -c2 --mem=1G --tmp=0 --contiguous --use-min-nodes --kill-on-invalid-dep=yes",
        "--slurm -t 1-2:3 --time-min=5 --deadline=2030-01-01 --comment='a \"b'\\''  c' --propagate=NONE --switches=1@5",
        "--slurm --acctg-freq=task=0 --cpu-freq=low --delay-boot=1 --profile=none --spread-job --verbose --reboot",
    ],
)
def test_sbatch_takes_what_vsub_makes(words: str, here: Here) -> None:
    here.site.script()
    shown = here.vsub("--dry-run", "--json", "job.sh", *shlex.split(words))
    argv = json.loads(shown.stdout)["argv"]
    body = here.site.script("#!/bin/sh\n", "body")
    done = here.run(argv[0], "--test-only", *argv[1:-1], str(body))
    said = [line for line in done.stderr.splitlines() if re.search("error: |fatal: |nvalid", line)]
    # what is left are this cluster's own reasons
    assert not [line for line in said if not re.search("allocation failure|nice value|Job dependency", line)], said


@pytest.mark.parametrize(
    ("qsub", "sbatch", "noted"),
    [
        (
            "-h -l nodes=2:ppn=2,mem=4gb,walltime=1:30:00 -q long -N named -o out -e err -p -5 -r n",
            "-H -N2 --ntasks-per-node=2 --mem=2G --time=1:30:00 -p long -J named -o out -e err --nice=5 --no-requeue",
            {
                "NumNodes": "2-2", "NumTasks": "4", "CPUs/Task": "1", "MinMemoryNode": "2G", "TimeLimit": "01:30:00",
                "Partition": "long", "JobName": "named", "StdOut": "{work}/out", "StdErr": "{work}/err", "Nice": "5",
                "Requeue": "0", "Priority": "0", "Reason": "JobHeldUser", "OverSubscribe": "USER",
            },
        ),
        (
            "-h -l nodes=n2:ppn=3 -l pmem=512mb -t 1,3-5%2 -j oe -o both -n",
            "-H -w n2 -n3 --mem-per-cpu=512M -a 1,3-5%2 -o both --exclusive",
            {
                "NumNodes": "1-1", "NumTasks": "3", "ReqNodeList": "n2", "MinMemoryNode": "1.50G",
                "ArrayTaskId": "1,3-5%2", "ArrayTaskThrottle": "2", "StdOut": "{work}/both", "StdErr": "{work}/both",
                "Requeue": "1", "OverSubscribe": "NO", "TimeLimit": "UNLIMITED", "Partition": "batch",
                "JobName": "job.sh",
            },
        ),
        (
            "-h -l nodes=1:ppn=2:ib -W depend=afterok:{first}.ref -a 203001021530",
            "-H -N1 -n2 -C ib -d afterok:{first} --kill-on-invalid-dep=yes -b 2030-01-02T15:30:00",
            {
                "Features": "ib", "Dependency": "afterok:{first}(unfulfilled)", "EligibleTime": "2030-01-02T15:30:00",
                "StdOut": "{work}/job.sh.o{job}", "StdErr": "{work}/job.sh.e{job}",
            },
        ),
    ],
    ids=("size", "array", "waiting"),
)  # fmt: skip
def test_both_languages_ask_slurm_for_the_same(here: Here, qsub: str, sbatch: str, noted: dict[str, str]) -> None:
    """Of jobs that are held: what Slurm itself has understood."""
    here.site.script()
    names = {"first": here.submit("-h", "job.sh"), "work": str(here.site.work)}
    jobs = [
        here.submit(*before, *shlex.split(words.format(**names)), *after)
        for before, words, after in (((), qsub, ("job.sh",)), (("--slurm",), sbatch, ("job.sh",)))
    ]
    ours, theirs = map(here.facts, jobs)
    here.run("scancel", *jobs, names["first"])
    for job, facts in zip(jobs, (ours, theirs)):
        expected = {name: value.format(**names, job=job) for name, value in noted.items()}
        assert {name: facts.pop(name, None) for name in noted} == expected
    assert ours == theirs, "nor does anything else differ"


def test_every_option_of_sbatch_is_known(here: Here) -> None:
    told = here.run("sbatch", "--help").stdout
    named = set(re.findall(r"^ +(?:-[A-Za-z], )?--([a-z-]+)", told, re.MULTILINE))
    assert len(named) > 60 and named <= set(TABLE)
    sessions = set(re.findall(r"^ +(?:-[A-Za-z], )?--([a-z-]+)", here.run("srun", "--help").stdout, re.MULTILINE))
    passed = {name for name, option in TABLE.items() if not option.only_sbatch and option.refused is None}
    assert passed - sessions <= NOT_IN_ITS_HELP | OF_SOME_VERSIONS


@pytest.fixture(scope="module")
def takes_blanks(cluster: Path) -> bool:
    """Whether a backslash takes a blank, in this version."""
    words = [str(BIN / "sbatch"), "--version"]
    told = subprocess.run(words, env={"SLURM_CONF": str(cluster)}, capture_output=True, text=True, timeout=PATIENCE_S)
    return parse_version(told.stdout) >= (24, 5)


def test_a_blank_behind_a_backslash(here: Here, takes_blanks: bool) -> None:
    here.site.script("#!/bin/sh\n#SBATCH --comment=a\\ b\n")
    done = here.vsub("--dry-run", "--json", "job.sh")
    if takes_blanks:
        assert any(re.fullmatch("--comment=vtorque:.* a b", word) for word in json.loads(done.stdout)["argv"])
    else:
        assert done.returncode != 0 and b"'b' is no option of sbatch" in done.stderr


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="ab=-\"'\\ \t#x:", max_size=16))
@example(text="a\\ b")
def test_lines_are_read_as_sbatch_reads_them(cluster: Path, takes_blanks: bool, text: str) -> None:
    line = f" --comment={text}"
    with tempfile.NamedTemporaryFile("w", suffix=".sh", dir=cluster.parent) as script:
        script.write(f"#!/bin/sh\n#SBATCH{line}\ntrue\n")
        script.flush()
        said = subprocess.run(
            ["sbatch", "-vvv", "--test-only", script.name], env={"PATH": PATH, "SLURM_CONF": str(cluster)},
            capture_output=True, text=True, timeout=PATIENCE_S,
        ).stderr  # fmt: skip
    theirs = re.findall(r'Found in script, argument "(.*)"\n', said)
    try:
        ours = split_words(line, "x", lambda: takes_blanks)
    except VTorqueError:
        assert re.search("fatal: .* line 2", said), said
    else:
        assert theirs == ours, said
