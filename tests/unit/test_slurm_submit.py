"""Jobs on Slurm: what sbatch and srun are given for what users write, in either language, and what is refused."""

from __future__ import annotations

import json
import os
import pwd
import shlex

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from slurmsite import SlurmSite, explained
from vsubsite import Runner, Site

from vmgr.jobspec import GuestGroup
from vsub.engines.slurmoptions import _VARIABLES, TABLE, from_environment, split_option
from vsub.options import SBATCH

W = "WORK"
BASE: dict[str, str] = {
    "job-name": "job.sh",
    "output": f"{W}/job.sh.o%j", "error": f"{W}/job.sh.e%j", "requeue": "yes", "nodes": "1", "ntasks-per-node": "1",
    "mem": "768M", "exclusive": "user",
}  # fmt: skip
"""What every job is submitted with: a guest of 1 vCPU and 512 MiB, and 256 MiB for the node."""

KILL = {"kill-on-invalid-dep": "yes"}


def changes(slurm: SlurmSite, vsub_run: Runner, *words: str) -> dict[str, str]:
    """The options that differ from BASE, as `--explain` tells them; those that are missing are `missing`."""
    done = vsub_run("--explain", "--json", *words)
    assert done.status == 0, done.stderr
    found = {key[2:]: value for key, (value, _) in explained(done.stdout).items() if key.startswith("--")}
    home = pwd.getpwuid(os.geteuid()).pw_dir
    asked = {key: value.replace(str(slurm.site.work), W).replace(f"{home}/", "HOME/") for key, value in found.items()}
    different = {name: value for name, value in asked.items() if BASE.get(name) != value}
    return {**different, **{name: "missing" for name in BASE if name not in asked}}


def test_a_plain_job(slurm: SlurmSite, vsub_run: Runner) -> None:
    slurm.site.script("#!/bin/bash\necho hello\n")
    assert vsub_run("job.sh") == (0, "12\n", "")
    words = [f"--{name}" if value == "yes" else f"--{name}={value}" for name, value in BASE.items()]
    head = ["--parsable", "--ignore-pbs", "--export=ALL", "--comment=vtorque:DIR"]
    assert slurm.site.argv == [*head, *(word.replace(W, str(slurm.site.work)) for word in words), "DIR/job"]
    assert changes(slurm, vsub_run, "job.sh") == {}
    assert slurm.site.spec.groups == (GuestGroup(image="micro", per_node=1, vcpus=1, ram_mib=512),)
    assert (slurm.site.directory.parent / "job_id").read_text() == "12.ref\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-N name", {"job-name": "name", "output": f"{W}/name.o%j", "error": f"{W}/name.e%j"}),
        ("-N 50%", {"job-name": "50%", "output": f"{W}/50%%.o%j", "error": f"{W}/50%%.e%j"}),
        ("-q long", {"partition": "long"}),
        ("-A physics", {"account": "physics"}),
        ("-h", {"hold": "yes"}),
        ("-r n", {"requeue": "missing", "no-requeue": "yes"}),
        ("-r y", {}),
        ("-n", {"exclusive": "yes"}),
        ("-p -10", {"nice": "10"}),
        ("-p -1024", {"nice": "1024"}),
        ("-p 0", {"nice": "0"}),
        ("-m abe -M me@x,you@y", {"mail-type": "FAIL,BEGIN,END", "mail-user": "me@x,you@y"}),
        ("-m n", {"mail-type": "NONE"}),
        ("-M me", {"mail-type": "FAIL", "mail-user": "me"}),
        ("-c n", {}),
        ("-u carol", {}),
        ("-z", {}),
        ("-a 203001021530.05", {"begin": "2030-01-02T15:30:05"}),
        ("-t 0-3", {"array": "0-3", "output": f"{W}/job.sh.o%A-%a", "error": f"{W}/job.sh.e%A-%a"}),
        ("-t 1,5-7%2", {"array": "1,5-7%2", "output": f"{W}/job.sh.o%A-%a", "error": f"{W}/job.sh.e%A-%a"}),
        ("-W job_array_request=2", {"array": "2", "output": f"{W}/job.sh.o%A-%a", "error": f"{W}/job.sh.e%A-%a"}),
        ("-j oe", {"error": "missing"}),
        ("-j eo", {"output": f"{W}/job.sh.e%j", "error": "missing"}),
        ("-j n", {}),
        ("-k oe", {"output": "HOME/job.sh.o%j", "error": "HOME/job.sh.e%j"}),
        ("-k o -o x", {"output": "HOME/job.sh.o%j"}),
        ("-k n", {}),
        ("-e '~/x'", {"error": "HOME/x"}),
        ("-o out", {"output": f"{W}/out"}),
        ("-o /dev/null -j oe", {"output": "/dev/null", "error": "missing"}),
        ("-e /tmp/e-%j", {"error": "/tmp/e-%%j"}),
        ("-o :out", {"output": f"{W}/out"}),
        ("-o localhost:out", {"output": f"{W}/out"}),
        ("-o logs/", {"output": f"{W}/logs/job.sh.o%j"}),
        ("-o .", {"output": f"{W}/./job.sh.o%j"}),
        ("-o '$PBS_JOBID.$PBS_JOBNAME'", {"output": f"{W}/%j.job.sh"}),
        ("-e '${PBS_O_WORKDIR}/x$PBS_ARRAYID'", {"error": f"{W}/x"}),
        ("-t 1-2 -e 'x$PBS_ARRAYID' -o '$PBS_JOBID'", {"array": "1-2", "error": f"{W}/x%a", "output": f"{W}/%j"}),
        ("-l walltime=3600", {"time": "01:00:00"}),
        ("-l walltime=2:3:4", {"time": "02:03:04"}),
        ("-l walltime=1:0:0:0", {"time": "24:00:00"}),
        ("-l nodes=2", {"nodes": "2"}),
        ("-l nodes=2:ppn=3", {"nodes": "2", "ntasks-per-node": "3"}),
        ("-l nodes=1:ppn=2+3:ppn=2", {"nodes": "4", "ntasks-per-node": "2"}),
        ("-l nodes=n1:ppn=2+n2:ppn=2", {"nodes": "2", "ntasks-per-node": "2", "nodelist": "n1,n2"}),
        ("-l nodes=2:ppn=2:ib:big", {"nodes": "2", "ntasks-per-node": "2", "constraint": "ib&big"}),
        ("-l procs=4", {"ntasks-per-node": "4"}),
        ("-l ncpus=4", {"ntasks-per-node": "4"}),
        ("-l nodes=2 -l mem=4gb", {"nodes": "2", "mem": "2048M"}),
        ("-l nodes=1:ppn=2 -l pmem=1gb", {"ntasks-per-node": "2", "mem": "2048M"}),
        ("-l nodes=1:ppn=2 -l pmem=2gb,mem=3gb", {"ntasks-per-node": "2", "mem": "3072M"}),
        ("-l naccesspolicy=singlejob", {"exclusive": "yes"}),
        ("-l naccesspolicy=shared", {"exclusive": "missing", "oversubscribe": "yes"}),
        ("-W x=naccesspolicy:singleuser", {}),
        ("-l qos=high -l advres=r1", {"qos": "high", "reservation": "r1"}),
        ("-l feature=a:b", {"constraint": "a&b"}),
        ("-l nodes=1:ib -l feature=a", {"constraint": "ib&a"}),
        ("-W depend=afterok:12:13.ref", {"dependency": "afterok:12:13", **KILL}),
        ("-W depend=afterany:12[3].ref,after:4", {"dependency": "afterany:12_3,after:4", **KILL}),
        ("-W depend=afterokarray:12[].ref", {"dependency": "afterok:12", **KILL}),
        ("-W depend=afternotok:12_3", {"dependency": "afternotok:12_3", **KILL}),
        ("-vm vcpus=3", {"ntasks-per-node": "3"}),
        ("-vm vcpus=2,vms_per_node=2,ram=1G", {"ntasks-per-node": "4", "mem": "2304M"}),
    ],
)
def test_options_of_qsub(words: str, expected: dict[str, str], slurm: SlurmSite, vsub_run: Runner) -> None:
    slurm.site.script()
    assert changes(slurm, vsub_run, *shlex.split(words), "job.sh") == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-p long", {"partition": "long"}),
        ("--partition long", {"partition": "long"}),
        ("--partition=long", {"partition": "long"}),
        ("-plong -Aphysics", {"partition": "long", "account": "physics"}),
        ("-J x", {"job-name": "x", "output": f"{W}/x.o%j", "error": f"{W}/x.e%j"}),
        ("-o x-%j.out", {"output": "x-%j.out", "error": "missing"}),
        ("-o x -e y", {"output": "x", "error": "y"}),
        ("-e y", {"error": "y"}),
        ("-a 0-3%2", {"array": "0-3%2", "output": f"{W}/job.sh.o%A-%a", "error": f"{W}/job.sh.e%A-%a"}),
        ("-a 1,10-20:5%2 -e y", {"array": "1,10,15,20%2", "error": "y", "output": f"{W}/job.sh.o%A-%a"}),
        ("-N2 --ntasks-per-node=2 -c2", {"nodes": "2", "ntasks-per-node": "2", "cpus-per-task": "2"}),
        ("-N2 -n 6", {"nodes": "2", "ntasks-per-node": "3"}),
        ("-n 6 --ntasks-per-node=3", {"nodes": "2", "ntasks-per-node": "3"}),
        ("--nodes=2-2 --tasks-per-node 2", {"nodes": "2", "ntasks-per-node": "2"}),
        ("-n 4", {"ntasks-per-node": "4"}),
        ("-c 4", {"cpus-per-task": "4"}),
        ("--mem=2G", {"mem": "2048M"}),
        ("--mem=2000", {"mem": "2000M"}),
        ("-N2 --mem=2G", {"nodes": "2", "mem": "2048M"}),
        ("-c2 --mem-per-cpu=1G", {"cpus-per-task": "2", "mem": "2048M"}),
        ("--mem-per-cpu=1G --mem=3G", {"mem": "3072M"}),
        ("-t 5", {"time": "5"}),
        ("-t 0", {"time": "0"}),
        ("-t 1-2:3", {"time": "1-2:3"}),
        ("-H --requeue", {"hold": "yes"}),
        ("--no-requeue", {"requeue": "missing", "no-requeue": "yes"}),
        ("--requeue --no-requeue", {"requeue": "missing", "no-requeue": "yes"}),
        ("--no-requeue --requeue=expedite", {"requeue": "expedite"}),
        ("--requeue=expedite --no-requeue", {"requeue": "missing", "no-requeue": "yes"}),
        ("--segment=2 --spread-segments --consolidate-segments",
         {"segment": "2", "spread-segments": "yes", "consolidate-segments": "yes"}),
        ("--resources=flat:2 --extra='a b' --oom-kill-step --oom-kill-step=0",
         {"resources": "flat:2", "extra": "a b", "oom-kill-step": "0"}),
        ("--exclusive", {"exclusive": "yes"}),
        ("--exclusive=mcs", {"exclusive": "mcs"}),
        ("-s", {"exclusive": "missing", "oversubscribe": "yes"}),
        ("-s --exclusive", {"exclusive": "yes"}),
        ("-C 'a|b' -x n3 -w n1 -L x:2", {"constraint": "a|b", "exclude": "n3", "nodelist": "n1", "licenses": "x:2"}),
        ("-d afterok:12 --nice --priority=3", {"dependency": "afterok:12", "nice": "yes", "priority": "3"}),
        ("--comment='my own'", {"comment": "my own"}),
        ("--comment=a --comment=b", {"comment": "b"}),
        ("--gres=lic:1", {"gres": "lic:1"}),
        ("-v -Q --parsable", {"verbose": "yes"}),
        ("--mail-type=ALL --mail-user me", {"mail-type": "ALL", "mail-user": "me"}),
        ("--mail-type=BEGIN --mail-type=END,FAIL --mail-type=none", {"mail-type": "BEGIN,END,FAIL"}),
        ("--mail-type=NONE --mail-type=END", {"mail-type": "END"}),
        ("--signal=B:USR1@60", {"signal": "B:USR1@60"}),
        ("--signal=Rb:USR1", {"signal": "Rb:USR1"}),
    ],
)  # fmt: skip
def test_options_of_sbatch(words: str, expected: dict[str, str], slurm: SlurmSite, vsub_run: Runner) -> None:
    """Behind `--slurm`, with the script there or before it, and in the script."""
    slurm.site.script()
    assert changes(slurm, vsub_run, "--slurm", *shlex.split(words), "job.sh") == expected
    assert changes(slurm, vsub_run, "job.sh", "--slurm", *shlex.split(words)) == expected
    slurm.site.script(f"#!/bin/sh\n#SBATCH {words}\necho hello\n")
    assert changes(slurm, vsub_run, "job.sh") == expected


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("PARTITION", "long", {"partition": "long"}),
        ("TIMELIMIT", "7", {"time": "7"}),
        ("TIMELIMIT", "0", {"time": "0"}),
        ("MEM_PER_NODE", "2G", {"mem": "2048M"}),
        ("EXCLUSIVE", "", {"exclusive": "yes"}),
        ("NO_REQUEUE", "", {"requeue": "missing", "no-requeue": "yes"}),
        ("NO_REQUEUE", "0", {}),
        ("REQUEUE", "yes", {}),
        ("REQUEUE", "expedite", {"requeue": "expedite"}),
        ("SEGMENT_SIZE", "2", {"segment": "2"}),
        ("CPU_FREQ_REQ", "low", {"cpu-freq": "low"}),
        ("SPREAD_JOB", "yes", {"spread-job": "yes"}),
        ("SPREAD_JOB", "no", {}),
        ("REQ_SWITCH", "2", {"switches": "2"}),
        ("WAIT4SWITCH", "5", {}),
    ],
)
def test_variables_of_sbatch(
    variable: str,
    value: str,
    expected: dict[str, str],
    slurm: SlurmSite,
    vsub_run: Runner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They count, and stand on the command line: sbatch sees none of them."""
    slurm.site.script()
    monkeypatch.setenv(f"SBATCH_{variable}", value)
    assert changes(slurm, vsub_run, "job.sh") == expected
    assert vsub_run("-V", "job.sh").status == 0
    assert not any(name.startswith("SBATCH") for name in slurm.environment)


@pytest.mark.parametrize(
    ("variable", "value", "option", "reason"),
    [
        ("SBATCH_CLUSTERS", "other", "clusters", "the job is submitted to one cluster"),
        ("SLURM_CLUSTERS", "other", "clusters", "the job is submitted to one cluster"),
        ("SLURM_CLUSTERS", "", "clusters", "the job is submitted to one cluster"),
        ("SBATCH_HINT", "nomultithread", "hint", "vCPUs are placed by -vm vcpu_pinning"),
        ("SLURM_HINT", "nomultithread", "hint", "vCPUs are placed by -vm vcpu_pinning"),
    ],
)
def test_what_variables_ask_for_is_refused_whatever_their_names_begin_with(
    variable: str,
    value: str,
    option: str,
    reason: str,
    slurm: SlurmSite,
    vsub_run: Runner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slurm.site.script()
    monkeypatch.setenv(variable, value)
    done = vsub_run("job.sh")
    refused = f"vsub: VT-OPTION: --{option}={value} (the variable {variable}) cannot be honoured in a guest: {reason}"
    assert done.stderr.startswith(refused), done.stderr
    assert not slurm.site.called


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("#PBS -N p\n#SBATCH -J s", "", {"job-name": "s", "output": f"{W}/s.o%j", "error": f"{W}/s.e%j"}),
        ("#SBATCH -J s\n#PBS -N p", "", {"job-name": "s", "output": f"{W}/s.o%j", "error": f"{W}/s.e%j"}),
        ("#SBATCH -p a", "-q b", {"partition": "b"}),
        ("#SBATCH -p a", "-q b --slurm -p c", {"partition": "c"}),
        ("#PBS -l walltime=60\n#SBATCH -t 5", "", {"time": "5"}),
        ("#SBATCH -t 5", "-l walltime=60", {"time": "00:01:00"}),
        ("#SBATCH -N2 --ntasks-per-node=4 -c2", "-l nodes=1:ppn=3", {"ntasks-per-node": "3"}),
        ("#PBS -l nodes=3:ppn=2", "--slurm -n 4", {"ntasks-per-node": "4"}),
        ("#PBS -l nodes=3:ppn=2,mem=6gb", "--slurm -N2", {"nodes": "2", "mem": "3072M"}),
        ("#SBATCH --mem=2G", "-l mem=3gb", {"mem": "3072M"}),
        ("#PBS -l mem=3gb", "--slurm --mem=2G", {"mem": "2048M"}),
        ("#SBATCH -o x-%j", "-o y", {"output": f"{W}/y"}),
        ("#PBS -o y -e z", "--slurm -o x-%j", {"output": "x-%j", "error": f"{W}/z"}),
        ("#PBS -j oe", "--slurm -o x-%j", {"output": "x-%j", "error": "missing"}),
        ("#PBS -j oe", "--slurm -e y", {"error": "y"}),
        ("#PBS -j eo\n#SBATCH -o x -e y", "", {"output": "x", "error": "y"}),
        ("#PBS -j eo", "--slurm -o x", {"output": "x", "error": "missing"}),
        ("#PBS -j eo", "--slurm -e y", {"output": "y", "error": "missing"}),
        ("#SBATCH -o x -e y", "-j oe", {"output": "x", "error": "missing"}),
        ("#PBS -k oe", "--slurm -o x", {"output": "x", "error": "HOME/job.sh.e%j"}),
        ("#PBS -k oe\n#SBATCH -o x -e y", "", {"output": "x", "error": "y"}),
        ("#SBATCH -o x -e y", "-k o", {"output": "HOME/job.sh.o%j", "error": "y"}),
        ("#SBATCH --nice=3", "-p 0", {"nice": "0"}),
        ("#PBS -p -5", "--slurm --priority=3", {"nice": "5", "priority": "3"}),
        ("#SBATCH --nice=-5", "-p -3", {"nice": "3"}),
        ("#SBATCH --exclusive", "-l naccesspolicy=shared", {"exclusive": "missing", "oversubscribe": "yes"}),
        ("#PBS -r n", "--slurm --requeue", {}),
        ("#SBATCH --dependency=singleton", "-W depend=afterok:1", {"dependency": "afterok:1", **KILL}),
        ("#PBS -W depend=afterok:1", "--slurm --kill-on-invalid-dep=no",
         {"dependency": "afterok:1", "kill-on-invalid-dep": "no"}),
        ("#SBATCH --mail-type=END", "--slurm --mail-type=FAIL", {"mail-type": "END,FAIL"}),
        ("#PBS -m b\n#SBATCH --mail-type=END", "", {"mail-type": "END"}),
        ("#SBATCH --mail-type=END", "-m b", {"mail-type": "BEGIN"}),
        ("#SBATCH --begin=now+1hour", "-a 203001021530", {"begin": "2030-01-02T15:30:00"}),
    ],
)  # fmt: skip
def test_of_two_that_say_the_same_the_last_one_counts(
    script: str, words: str, expected: dict[str, str], slurm: SlurmSite, vsub_run: Runner
) -> None:
    slurm.site.script(f"#!/bin/sh\n{script}\n")
    assert changes(slurm, vsub_run, "job.sh", *shlex.split(words)) == expected


def test_the_script_and_its_arguments(slurm: SlurmSite, vsub_run: Runner) -> None:
    slurm.site.script()
    assert vsub_run("--slurm", "-p", "x", "job.sh", "a b", "-c", "--mem=1").status == 0
    assert (slurm.asked["partition"], slurm.site.spec.arguments) == ("x", "'a b' -c --mem=1")


def test_our_own_words_behind_slurm(slurm: SlurmSite, vsub_run: Runner) -> None:
    slurm.site.script()
    shown = vsub_run("--slurm", "-vm", "vcpus=3", "-p", "x", "--dry-run", "--json", "job.sh")
    assert not slurm.site.called
    tree = json.loads(shown.stdout)
    assert tree["values"]["vcpus"]["value"] == "3" and "--partition=x" in tree["argv"]
    assert tree["environment"]["PBS_O_WORKDIR"] == str(slurm.site.work)


def test_what_is_too_little_is_raised_where_the_site_says_so(slurm: SlurmSite, vsub_run: Runner) -> None:
    """Then the processors are asked for anew, as tasks: how the user parted them says nothing any more."""
    config = slurm.site.install.config
    config.write_text(config.read_text().replace("policy: {", "policy: {raise_requests: true, "))
    slurm.site.script()
    words = "job.sh", "-vm", "vcpus=3,ram=1G", "--slurm", "-N2", "-c2", "--mem-per-cpu=100M"
    assert changes(slurm, vsub_run, *words) == {"nodes": "2", "ntasks-per-node": "3", "mem": "1281M"}
    assert "note: --nodes=2 --cpus-per-task=2 (the command line) is raised" in vsub_run("--explain", *words).stderr


def test_the_policy_of_a_queue_is_that_of_a_partition(slurm: SlurmSite, vsub_run: Runner) -> None:
    config = slurm.site.install.config
    config.write_text(config.read_text().replace("policy: {", "policy: {queues: {small: {vcpus: {max: 1}}}, "))
    slurm.site.script("#!/bin/sh\n#SBATCH -p small\n")
    assert vsub_run("job.sh", "-vm", "vcpus=2").stderr.startswith("vsub: VT-POLICY: vcpus=2")
    assert vsub_run("job.sh", "-vm", "vcpus=2", "-q", "large").status == 0


def test_a_request_for_guests_in_an_sbatch_line(slurm: SlurmSite, vsub_run: Runner) -> None:
    slurm.site.script("#!/bin/sh\n#SBATCH -vm vcpus=2 --time=3\n")
    assert vsub_run("job.sh").status == 0
    assert slurm.asked["time"] == "3" and slurm.site.spec.groups[0].vcpus == 2


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("-l vmem=1gb", "OPTION", "-l vmem=1gb (the command line) has no counterpart on Slurm: vmem: Slurm bounds"),
        ("-l pvmem=1gb", "OPTION", "Slurm bounds memory, not addresses; say mem="),
        ("-l cput=5", "OPTION", "say walltime="),
        ("-l pcput=5", "OPTION", "say walltime="),
        ("-l file=1gb", "OPTION", "file: it is not known"),
        ("-l prologue=/x", "OPTION", "say -vm vm_prologue="),
        ("-l epilogue=/x", "OPTION", "say -vm vm_epilogue="),
        ("-l gres=matlab", "OPTION", "say --gres after --slurm"),
        ("-l host=n1", "OPTION", "say nodes=HOST"),
        ("-l naccesspolicy=odd", "OPTION", "singlejob, singleuser, uniqueuser, shared have one"),
        ("-l nodes=1:ppn=2+1:ppn=3", "OPTION", "ask for nodes of one kind"),
        ("-l nodes=2:ppn=2#shared", "OPTION", "ask for nodes of one kind"),
        ("-l nodes=1:a|b", "OPTION", "'a|b' is no name of a feature or a node"),
        ("-l walltime=x", "USAGE", "write walltime=HH:MM:SS"),
        ("-l walltime=0", "USAGE", "walltime=0 (the command line) is no time: TORQUE ends such a job at once, and "
         "Slurm would give it no limit; write walltime=HH:MM:SS, or seconds; --slurm --time=0 asks for no limit"),
        ("-l walltime=0:00:00", "USAGE", "walltime=0:00:00 (the command line) is no time"),
        ("-L tasks=1:lprocs=2", "OPTION", "say -l nodes=N:ppn=M"),
        ("-f", "OPTION", "a guest job needs all of its nodes"),
        ("-b 5", "OPTION", "vsub does not try again"),
        ("-K 5", "OPTION", "KillWait"),
        ("-E", "OPTION", "in any case"),
        ("-q a@b", "OPTION", "name one partition"),
        ("-q a,b", "OPTION", "name one partition"),
        ("-p 1", "OPTION", "-p 1 (the command line) has no counterpart on Slurm: it lets its operators alone raise"),
        ("-p 1024", "USAGE", "a number from -1024 to 1023"),
        ("-p x", "USAGE", "a number from -1024 to 1023"),
        ("-r x", "USAGE", "-r y or -r n"),
        ("-m x", "USAGE", "letters of abef"),
        ("-a 99", "USAGE", "not a date"),
        ("-j x", "USAGE", "allowed: oe, eo, n"),
        ("-k d", "USAGE", "allowed: o, e, oe, eo, n"),
        ("-o other:x", "OPTION", "output is written by the job's node, not on other"),
        ("-o 'a\\b'", "USAGE", "names no path"),
        ("-o '$PBS_NODENUM'", "OPTION", "the variable PBS_NODENUM is not known before the job runs"),
        ("-N a/b", "USAGE", "is no name for a job"),
        ("-N 'a b'", "USAGE", "is no name for a job"),
        (f"-N {'ä' * 101}", "USAGE", "the job's name (the command line) has 202 bytes: none of its"),
        ("-W depend=on:2", "OPTION", "on: say afterok"),
        ("-W depend=beforeok:2", "OPTION", "beforeok: say afterok"),
        ("-W depend=afterokarray:12[][3].ref", "OPTION", "afterokarray:12[][3].ref: say afterok on the whole array"),
        ("-W depend=afterstartarray:12[].ref[3]", "OPTION", "say after on the whole array"),
        ("-W depend=afteranyarray:1:12[3]", "OPTION", "say afterany on the whole array"),
        ("-W depend=afterok", "USAGE", "the dependency 'afterok'"),
        ("-W depend=afterok:x", "USAGE", "the dependency 'afterok:x'"),
        ("-W stagein=a@b:c", "OPTION", "the attribute stagein"),
        ("-W umask=022", "OPTION", "the attribute umask"),
        ("-W x=qos:high", "OPTION", "the attribute x"),
        ("-v SLURM_JOB_ID=1", "OPTION", "it is Slurm's own"),
        ("-v 'a b=1'", "USAGE", "does not begin with a variable's name"),
        ("-T x", "OPTION", "-T x"),
        ("-X", "OPTION", "X11"),
        ("-c enabled", "OPTION", "checkpoint"),
        ("--slurm --gpus=1", "OPTION", "--gpus=1 (the command line) cannot be honoured in a guest: guests get no GPUs"),
        ("--slurm --gres=gpu:2", "OPTION", "guests get no GPUs"),
        ("--slurm -N 1-4", "OPTION", "name one number"),
        ("--slurm -N x", "USAGE", "a number from 1 is needed"),
        ("--slurm -n 0", "USAGE", "a number from 1 is needed"),
        ("--slurm -N2 -n3", "OPTION", "every node has as many guests"),
        ("--slurm -n 5 --ntasks-per-node=2", "OPTION", "every node has as many guests"),
        ("--slurm --mem=0", "OPTION", "name a size"),
        ("--slurm --mem=x", "USAGE", "such as 2G"),
        ("--slurm -p a,b", "OPTION", "name one partition"),
        ("-vm vcpus=3 --slurm -c 2", "RESOURCE", "--cpus-per-task=2 (the command line) gives 2; ask for at least 3"),
        ("-vm ram=1G --slurm --mem=1G", "RESOURCE", "--mem=1G (the command line) gives 1G; ask for at least 1280M"),
        ("--slurm -N 9", "POLICY", "--nodes=9 (the command line) asks for 9 nodes with guests"),
        ("--slurm --wrap=ls", "OPTION", "put the command into a script"),
        ("--slurm --wait", "OPTION", "say --wait before --slurm"),
        ("--slurm --uid=0", "OPTION", "its own user"),
        ("--slurm -i x", "OPTION", "standard input"),
        ("--slurm --signal=USR1@60", "OPTION", "no steps of Slurm's in a guest, to which it would go; say --signal=B:"),
        ("--slurm --signal=R:ABRT@60", "OPTION", "say --signal=RB:ABRT@60"),
        ("--slurm --comm=x", "USAGE", "sbatch's option --comm is not known (the command line), --comment is;"),
        ("--slurm --nodse 2", "USAGE", "sbatch's option --nodse is not known (the command line), --nodes is; options"),
        ("--slurm --vm vcpus=2", "USAGE", "sbatch's option --vm is not known (the command line), -vm is; options of"),
        ("--slurm --xyzzy=1", "USAGE", "sbatch's option --xyzzy is not known (the command line); options of"),
        ("--nodes=2", "USAGE", "the option --nodes=2 is not known (the command line); options of sbatch stand behind"),
        ("--slurm --nodelist=n[1-2],n9", "OPTION", "--nodelist=n[1-2],n9 (the command line) names 3 nodes, and the job "
         "has 1; say --nodes=3"),
        ("--slurm -w n1,n2 -N1", "OPTION", "--nodelist=n1,n2 (the command line) names 2 nodes, and the job has 1"),
        ("--slurm -w n[1-", "USAGE", "--nodelist=n[1- (the command line) is no list of nodes"),
        ("--slurm --hold=1", "USAGE", "--hold has no value"),
        ("--slurm -y", "USAGE", "sbatch's option -y is not known"),
        ("--slurm --comment", "USAGE", "--comment needs a value"),
        ("--slurm -a 0-15:0", "USAGE", "is no request of a job array"),
        ("--slurm -a 9-1:2", "USAGE", "is no request of a job array"),
        ("--slurm -a 0-9999999:2", "USAGE", "is no request of a job array"),
        ("-t 0-15:4", "USAGE", "is no request of a job array"),
    ],
)  # fmt: skip
def test_what_is_refused(words: str, code: str, text: str, slurm: SlurmSite, vsub_run: Runner) -> None:
    slurm.site.script()
    done = vsub_run("job.sh", *shlex.split(words))
    assert done.stderr.startswith(f"vsub: VT-{code}: ") and text in done.stderr, done.stderr
    assert not slurm.site.called and slurm.site.left_in_home() == []


def test_every_option_of_sbatch_is_refused_or_given_on(slurm: SlurmSite, vsub_run: Runner) -> None:
    """None of them is read and then forgotten."""
    slurm.site.script()
    values = {
        "array": "1-2", "nodes": "2", "ntasks": "1", "ntasks-per-node": "1", "cpus-per-task": "2", "mem": "1G",
        "mem-per-cpu": "1G", "comment": "mine", "partition": "x", "gres": "a:1", "export": "ALL", "signal": "B:1",
    }  # fmt: skip
    missing = []
    for name, option in TABLE.items():
        takes = option.takes.name == "VALUE"
        word = f"--{name}={values.get(name, 'x')}" if takes else f"--{name}"
        done = vsub_run("--explain", "--json", "job.sh", "--slurm", word)
        if option.refused is not None:
            assert done.stderr.startswith("vsub: VT-OPTION: ") and option.refused in done.stderr, (name, done.stderr)
        else:
            assert done.status == 0, (name, done.stderr)
            asked = explained(done.stdout)
            if values.get(name, "x" if takes else "yes") not in asked.get(f"--{name}", ("missing", ""))[0]:
                missing.append(name)
    assert missing == ["export", "mem", "mem-per-cpu", "ntasks", "parsable", "quiet"]
    # in other forms: what the environment is made of, MiB on each node, tasks on each; and vsub itself reads the id


def test_a_folder_with_a_backslash_gets_no_output(slurm: SlurmSite, vsub_run: Runner) -> None:
    """Slurm would take it out of the path, and leave patterns as they are."""
    slurm.site.script()
    (slurm.site.work / "a\\b").mkdir()
    done = vsub_run("-d", "a\\b", "job.sh")
    assert done.status == 0, "the folder of submission counts"
    done = vsub_run("-w", "a\\b", "job.sh")
    assert done.stderr.startswith("vsub: VT-USAGE: ") and "a backslash" in done.stderr, done
    assert vsub_run("-w", "a\\b", "-o", str(slurm.site.work / "o"), "-j", "oe", "job.sh").status == 0


def test_a_comment_has_its_bounds(slurm: SlurmSite, vsub_run: Runner) -> None:
    slurm.site.script()
    assert vsub_run("job.sh", "--slurm", "--comment=" + "x" * 100).status == 0
    assert slurm.site.argv[3] == f"--comment=vtorque:DIR {'x' * 100}"
    room = 1024 - len(slurm.site.argv_raw[3].removeprefix("--comment=").encode()) + 100
    assert vsub_run("job.sh", "--slurm", "--comment=" + "x" * room).status == 0
    done = vsub_run("job.sh", "--slurm", "--comment=" + "x" * (room + 1))
    assert done.stderr.startswith("vsub: VT-VALUE: the comment (the command line) is too long: ")
    assert "1025 bytes" in done.stderr


def test_other_batch_systems_know_no_sbatch(site: Site, vsub_run: Runner) -> None:
    site.script()
    assert "the batch system of this site is not Slurm" in vsub_run("job.sh", "--slurm", "-p", "x").stderr


def test_a_job_type_is_not_for_slurm(slurm: SlurmSite, vsub_run: Runner) -> None:
    slurm.configure(submit=", job_type: vtorque")
    slurm.site.script()
    assert "submit.job_type" in vsub_run("job.sh").stderr and not slurm.site.called


def test_each_value_has_its_source(slurm: SlurmSite, vsub_run: Runner) -> None:
    slurm.site.script("#!/bin/sh\n#SBATCH --mem=2G -J x\n#PBS -l walltime=60\n")
    found = explained(vsub_run("--explain", "--json", "job.sh", "-l", "nodes=2").stdout)
    assert found["--time"] == ("00:01:00", "job.sh line 3")
    assert found["--job-name"] == ("x", "--job-name=x, job.sh line 2")
    assert found["--mem"] == ("2048M", "--mem=2G (job.sh line 2)")
    assert found["--nodes"] == ("2", "the command line")
    assert found["--requeue"] == ("yes", "as of qsub")
    assert not slurm.site.called


def test_a_job_that_can_go_on_keeps_its_output(slurm: SlurmSite, vsub_run: Runner) -> None:
    slurm.configure(policy=", suspend: {enabled: true}", more="suspended: {folder: /s}\n")
    slurm.site.script()
    assert changes(slurm, vsub_run, "-vm", "suspend=on", "job.sh")["open-mode"] == "append"
    words = "-vm", "suspend=on", "job.sh", "--slurm", "--open-mode=truncate"
    assert changes(slurm, vsub_run, *words)["open-mode"] == "truncate"


def test_a_session_goes_to_srun(slurm: SlurmSite, vsub_run: Runner) -> None:
    """On each node one task: the first is the session, and no other is waited for."""
    slurm.site.script()
    (slurm.site.record / "result").write_text('{"v": 1, "status": 7, "code": null}')
    words = "-I", "-x", "-l", "nodes=2:ppn=3", "-N", "talk", "-j", "oe", "-r", "n", "job.sh"
    assert vsub_run(*words, "--slurm", "-p", "x").status == 7
    base = {"pty": None, "wait": "0", "export": "ALL", "comment": "vtorque:DIR", "mem": "768M", "exclusive": "user"}
    assert slurm.asked == {
        **base, "partition": "x", "job-name": "talk", "nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "3",
    }  # fmt: skip
    assert slurm.site.argv[-1] == "DIR/job"


def test_a_session_asked_for_in_a_job_is_no_step_of_it(
    slurm: SlurmSite, vsub_run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.site.script()
    for name, value in {"SLURM_JOB_ID": "5", "SLURM_CONF": "/x/slurm.conf", "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    vsub_run("-V", "-I", "-x", "job.sh")
    assert {name: value for name, value in slurm.environment.items() if "SLURM" in name} == {
        "SLURM_CONF": "/x/slurm.conf"
    }


HOSTILE = st.text(alphabet=st.sampled_from("-=,;:'\"$`%\\ \t\nabx/#&|"), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(letter=st.sampled_from("NqAlMmoeWpatjkrv"), value=HOSTILE)
@example(letter="N", value="--uid=0")
@example(letter="A", value="x --uid=0")
@example(letter="M", value="--wrap=ls")
@example(letter="q", value="-x")
@example(letter="l", value="walltime=1,nodes=--uid:ppn=1")
def test_no_word_of_a_users_becomes_an_option(slurm: SlurmSite, vsub_run: Runner, letter: str, value: str) -> None:
    """Whatever is asked for: it is refused, or stands behind the name of an option that vsub has chosen."""
    slurm.site.script()
    (slurm.site.record / "argv").unlink(missing_ok=True)
    done = vsub_run(f"-{letter}", value, "job.sh")
    if not slurm.site.called:
        assert done.status != 0 and done.stderr.startswith("vsub: VT-") and done.stderr.count("\n") == 1
        return
    words = slurm.site.argv[:-1]
    ours = {f"--{name}" for name in TABLE} | {"--parsable", "--ignore-pbs"}
    assert all(word.partition("=")[0] in ours for word in words)
    assert not any(TABLE[word[2:].partition("=")[0]].refused for word in words if word != "--ignore-pbs")
    assert slurm.site.argv[-1] == "DIR/job"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.one_of(HOSTILE, st.sampled_from([f"--{name}" for name in TABLE])), max_size=4))
@example(words=["--comment", "--uid=0"])
@example(words=["-J", "--wrap=x"])
def test_no_word_behind_slurm_becomes_another_option(slurm: SlurmSite, vsub_run: Runner, words: list[str]) -> None:
    """What is refused never reaches sbatch, however it is written."""
    slurm.site.script()
    (slurm.site.record / "argv").unlink(missing_ok=True)
    vsub_run("job.sh", "--slurm", *words)
    if slurm.site.called:
        names = [word[2:].partition("=")[0] for word in slurm.site.argv[:-1]]
        assert not any(TABLE[name].refused for name in names if name != "ignore-pbs")
        assert slurm.site.argv[-1] == "DIR/job"


@given(
    st.dictionaries(
        st.sampled_from([f"SBATCH_{name}" for name in (*_VARIABLES, "REQ_SWITCH", "WAIT4SWITCH", "NO_SUCH")]),
        st.text(max_size=20) | st.text(st.sampled_from("+-012\u00b2\u0663"), max_size=4),
    )
)
def test_whatever_stands_in_the_variables_of_sbatch(environ: dict[str, str]) -> None:
    """Each becomes an option that is known, or nothing."""
    for option in from_environment(environ):
        assert option.source.partition("SBATCH_")[2]
        assert option.letter != SBATCH or split_option(option)[0] in TABLE
