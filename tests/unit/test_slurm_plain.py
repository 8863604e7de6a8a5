"""Jobs without guests on Slurm: to sbatch as they are, or translated where they are in the language of qsub."""

from __future__ import annotations

import json
import shlex

import pytest
from slurmsite import SlurmSite
from vsubsite import Runner

SBATCH = "#!/bin/sh\n#SBATCH --gpus=1 --time=5\necho\n"
PBS = "#!/bin/sh\n#PBS -N named -l nodes=2:ppn=2,walltime=60\n#SBATCH --gres=gpu:1\necho\n"

SAID = "#!/bin/sh\n#SBATCH -N2 -n4 -c2 -e y\necho\n"
VM = "#!/bin/sh\n#SBATCH --time=5\n#PBS -vm vcpus=2\necho\n"


def line(slurm: SlurmSite, vsub_run: Runner, *words: str) -> str:
    """The command line that `--dry-run` shows, the folders taken out."""
    done = vsub_run("--dry-run", "--json", *words)
    assert done.status == 0, done.stderr
    tree = json.loads(done.stdout)
    assert tree["guest"] is False
    text = shlex.join(tree["argv"])
    return text.replace(str(slurm.bin), "BIN").replace(str(slurm.site.work), "WORK")


@pytest.mark.parametrize(
    ("words", "argv"),
    [
        ("plain.sh", "BIN/sbatch --parsable plain.sh"),
        ("--slurm -p x --gpus 1 plain.sh a 'b c'", "BIN/sbatch --parsable -p x --gpus 1 plain.sh a 'b c'"),
        ("plain.sh --slurm -px --odd", "BIN/sbatch --parsable -px --odd plain.sh"),
        ("--slurm --odd x plain.sh", "BIN/sbatch --parsable --odd x plain.sh"),
        ("--slurm -- -dash.sh", "BIN/sbatch --parsable -- -dash.sh"),
        ("vm.sh", "BIN/sbatch --parsable --ignore-pbs vm.sh"),
        ("-F 'a b' plain.sh", "BIN/sbatch --parsable plain.sh a b"),
        ("-z plain.sh", "BIN/sbatch --parsable plain.sh"),
        (
            "pbs.sh",
            "BIN/sbatch --parsable --ignore-pbs --job-name=named --time=00:01:00 --gres=gpu:1 --nodes=2 "
            "--ntasks-per-node=2 pbs.sh",
        ),
        (
            "-q long -j oe -d sub plain.sh",
            "BIN/sbatch --parsable --ignore-pbs --gpus=1 --time=5 --partition=long --chdir=WORK/sub "
            "--output=WORK/plain.sh.o%j plain.sh",
        ),
        (
            "-l nodes=1:ppn=2,mem=2gb plain.sh --slurm -N1-3 --mem=0",
            "BIN/sbatch --parsable --ignore-pbs --gpus=1 --time=5 --nodes=1-3 --mem=0 plain.sh",
        ),
        (
            "-h --slurm --hint=nomultithread -n 3 plain.sh",
            "BIN/sbatch --parsable --ignore-pbs --gpus=1 --time=5 --hold --hint=nomultithread --ntasks=3 plain.sh",
        ),
        (
            "-l nodes=1:ppn=3 -j oe said.sh",
            "BIN/sbatch --parsable --ignore-pbs --nodes=1 --ntasks-per-node=3 --ntasks=3 --cpus-per-task=1 "
            "--output=WORK/said.sh.o%j --error=WORK/said.sh.o%j said.sh",
        ),
        ("-I -l nodes=1:ppn=2", "BIN/srun --pty --nodes=1 --ntasks-per-node=1 --cpus-per-task=2 SHELL -l"),
        ("-I -x plain.sh", "BIN/srun --pty --gpus=1 --time=5 plain.sh"),
    ],
)
def test_the_command_line(
    words: str, argv: str, slurm: SlurmSite, vsub_run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("plain.sh", SBATCH), ("pbs.sh", PBS), ("-dash.sh", SBATCH), ("vm.sh", VM), ("said.sh", SAID)):
        slurm.site.script(text, name)
    found = line(slurm, vsub_run, "-vm", "off", *shlex.split(words))
    assert found.replace("/bin/bash -l", "SHELL -l").replace("/bin/sh -l", "SHELL -l") == argv


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("-S /bin/bash plain.sh", "-S /bin/bash (the command line) has no counterpart on Slurm"),
        ("-T x plain.sh", "hooks of Slurm's are the site's"),
        ("-c enabled plain.sh", "not checkpointed"),
        ("-l cput=1 plain.sh", "say walltime="),
        ("-y plain.sh", "the option -y is not known"),
        ("-I -l nodes=2", "a session on 2 nodes (-l) has no counterpart on Slurm without guests"),
        ("plain.sh plain.sh", "one script can be submitted"),
        ("-F x -", "a script on standard input has no arguments"),
        ("-J x plain.sh", "it is not known"),
        ("misread.sh", "the line `#SBATCH -vm vcpus=2` (misread.sh line 2) cannot be read by sbatch"),
    ],
)
def test_what_is_refused(words: str, text: str, slurm: SlurmSite, vsub_run: Runner) -> None:
    slurm.site.script(SBATCH, "plain.sh")
    slurm.site.script("#!/bin/sh\n#SBATCH -vm vcpus=2\n", "misread.sh")
    done = vsub_run("-vm", "off", "--dry-run", *shlex.split(words))
    assert done.stderr.startswith("vsub: VT-") and text in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        (
            "#SBATCH --mem-per-cpu=10",
            "-l mem=2gb job.sh",
            "--mem-per-cpu=10 (job.sh line 2) and --mem=2048M (-l) exclude each other, and sbatch reads the script's "
            "lines by itself; take that line out, or ask in its words: --mem-per-cpu",
        ),
        (
            "#SBATCH --mem=10",
            "-N x job.sh --slurm --mem-per-cpu=5",
            "--mem=10 (job.sh line 2) and --mem-per-cpu=5 (the command line) exclude each other",
        ),
        (
            "#SBATCH --mem-per-gpu=10",
            "-l nodes=1,mem=1gb job.sh",
            "--mem-per-gpu=10 (job.sh line 2) and --mem=1024M (-l) exclude each other",
        ),
        ("#SBATCH --mem-per-cpu=10", "-N x job.sh --slurm --mem-per-cpu=5", ""),
        ("#SBATCH --mem-per-cpu=10", "-l nodes=1 job.sh", ""),
        ("#PBS -l mem=1gb\n#SBATCH --mem-per-cpu=10", "job.sh", ""),
        ("#SBATCH --mem-per-cpu=10", "-I -l mem=2gb", ""),
        ("#SBATCH --mem=10", "-l mem=2gb job.sh", ""),
    ],
)
def test_memory_of_two_kinds_is_refused_where_sbatch_would(
    script: str, words: str, said: str, slurm: SlurmSite, vsub_run: Runner
) -> None:
    slurm.site.script(f"#!/bin/sh\n{script}\n")
    done = vsub_run("-vm", "off", "--dry-run", *shlex.split(words))
    if said:
        assert done.stderr.startswith(f"vsub: VT-OPTION: {said}"), done.stderr
    else:
        assert (done.status, done.stderr) == (0, "")


def test_a_job_without_guests_may_go_to_another_cluster(
    slurm: SlurmSite, vsub_run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session too, whose srun is not given the variables of the job that it may be asked for in."""
    slurm.site.script(SBATCH, "plain.sh")
    monkeypatch.setenv("SLURM_CLUSTERS", "other")
    assert line(slurm, vsub_run, "-vm", "off", "plain.sh") == "BIN/sbatch --parsable plain.sh"
    assert "--pty --clusters=other " in line(slurm, vsub_run, "-vm", "off", "-I")
    monkeypatch.setenv("SBATCH_CLUSTERS", "first")
    assert " --clusters=other " in line(slurm, vsub_run, "-vm", "off", "-N", "x", "plain.sh")


def test_standard_input_and_variables(slurm: SlurmSite) -> None:
    data = b"#!/bin/sh\necho\n"
    done = slurm.site.launch("-vm", "off", stdin=data, env={"A": "1"})
    assert (done.returncode, slurm.site.argv_raw, slurm.site.stdin) == (0, ["--parsable"], data)
    done = slurm.site.launch("-vm", "off", "-v", "B=x,A", stdin=data, env={"A": "1"})
    assert (done.returncode, slurm.site.argv_raw) == (0, ["--parsable", "--ignore-pbs"])
    assert slurm.environment["PBS_O_WORKDIR"] == str(slurm.site.work)
    assert (slurm.environment["A"], slurm.environment["B"], slurm.site.stdin) == ("1", "x", data)


def test_waiting_for_a_job_without_guests(slurm: SlurmSite) -> None:
    slurm.site.script(SBATCH, "plain.sh")
    slurm.program("squeue", "echo '12 FAILED 768 NonZeroExitCode'")
    done = slurm.site.launch("-vm", "off", "--wait", "plain.sh")
    assert (done.returncode, done.stdout) == (3, b"12\n"), done.stderr
