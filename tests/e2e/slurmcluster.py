"""A real Slurm cluster of the tests' own: its daemons, started by hand on simulated nodes of an installation."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import slurmprograms
from slurmprograms import BIN, PATH, lacking

from vmgr.deploy.slurmfiles import conf_lines
from vmgr.node.process import Process, identify
from vsub.engines.local.machine import Layout

from .cluster import EVERYWHERE, Cluster, nodes_of
from .conftest import PATIENCE_S, User, eventually, installed
from .terminal import Terminal

SITE = EVERYWHERE.replace("nodes: 3, ", "nodes: 4, ")
"""Three nodes to run jobs on, and one that can be lost."""
ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")

CONF = (
    slurmprograms.CONF
    + """\
SlurmctldHost={host}({address})
AuthInfo=socket={folder}/munge/socket,cred_expire=8
SlurmdTimeout=20
{tracking}
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=1
KillWait=5
PrologEpilogTimeout=120
{hooks}
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=spare Nodes=ALL MaxTime=INFINITE State=UP PreemptMode=CANCEL
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""
)
# cred_expire: for so long a job that is queued again waits; bf_interval: 23.11 leaves members of arrays to backfill

TRACKING = """\
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectTypeParameters=CR_CPU"""


class Slurm(Cluster):
    """An installation with simulated nodes, each with its slurmd; munged and slurmctld run on the machine itself."""

    engine = "slurm"
    limits = ()
    umask, file_kib = 0o022, "unlimited"
    session_end = ""
    tracking = TRACKING
    cpus = 4
    """Of each node."""
    cgroup_conf = ""
    more: tuple[str, ...] = ()
    """Lines of slurm.conf; of a key that is there before it is the last value that holds."""

    def __init__(self, prefix: Path, root: Path, nodes: tuple[str, ...]) -> None:
        super().__init__(prefix, root, nodes)
        self.folder = root / "slurm"
        self.conf = self.folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.conf)}
        self._own = {"PATH": PATH, "LANG": "C.UTF-8", **self.environment}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all daemons; returns when every node is idle."""
        self.folder.mkdir(mode=0o755)
        for name in ("ctld", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir(mode=0o755)
        self.conf.write_text(self._conf())
        (self.folder / "cgroup.conf").write_text(self.cgroup_conf)
        self._daemon("munged", *slurmprograms.munged(self.folder))
        eventually((self.folder / "munge" / "socket").exists, "munged listens", limit_s=20)
        self.start_controller()
        local = str(self.prefix / "libexec" / "vtorque-local")
        for node in self.nodes:
            self._daemon(node, local, "enter", node, "slurmd", "-D", "-N", node)
        eventually(lambda: self.states() == dict.fromkeys(self.nodes, "IDLE"), lambda: str(self.states()), limit_s=60)

    def start_controller(self) -> None:
        self._daemon("slurmctld", "slurmctld", "-D")
        eventually(lambda: self.control("ping").returncode == 0, "slurmctld answers", limit_s=60)

    def end(self, name: str) -> None:
        """End one daemon."""
        slurmprograms.end(self.daemons.pop(name))

    def close(self) -> None:
        """End all daemons, slurmd before the controller that they talk to."""
        for name in [*reversed(self.daemons)]:
            self.end(name)

    def _daemon(self, name: str, *argv: str) -> None:
        self.daemons[name] = slurmprograms.start(argv, self._own, self.folder / f"{name}.log")

    def _conf(self) -> str:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr={self.address(node)} CPUs={self.cpus} RealMemory=4000"
            for node in self.nodes
        ]
        hooks = self.prefix / "share" / "vtorque" / "mom_priv_hooks" / "slurm"
        return CONF.format(
            host=socket.gethostname(), address=self.outside, port=port, folder=self.folder,
            hooks="\n".join((*conf_lines(str(hooks)), *self.more)), nodes="\n".join(nodes), tracking=self.tracking,
        )  # fmt: skip

    def control(self, *arguments: str, program: str = "scontrol") -> subprocess.CompletedProcess[str]:
        """A command of Slurm's, as root."""
        return subprocess.run(
            [str(BIN / program), *arguments], env=self._own, capture_output=True, text=True,
            timeout=PATIENCE_S,
        )  # fmt: skip

    def states(self) -> dict[str, str]:
        """The state of each node that Slurm has not lost."""
        told = self.control("-o", "show", "nodes").stdout
        found = dict(re.findall(r"^NodeName=(\S+) .* State=(\S+)", told, re.MULTILINE))
        return {node: found.get(node, "") for node in self.nodes}

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm says of a job, by the id that vTorque has for it or Slurm's own."""
        told = self.control("-o", "show", "job", job.partition(".")[0]).stdout
        return dict(re.findall(r"(\w+)=(\S*)", told))

    def wait(self, job_id: str) -> int:
        """Wait for the end of a job on all nodes; gives its exit status, 128 + n for signal n."""
        found: dict[str, str] = {}

        def ended() -> bool:
            found.update(self.facts(job_id))
            return found.get("JobState") in ENDED

        eventually(ended, lambda: f"{job_id}: {found}")
        status, _, number = found["ExitCode"].partition(":")
        return 128 + int(number) if int(number) else int(status)

    def delete_all(self) -> None:
        self.control("--user", "root,nobody", program="scancel")
        for job in re.findall(r"JobId=(\d+)", self.control("-o", "show", "jobs").stdout):
            self.control(job, program="scancel")
        eventually(lambda: not self.left_behind(), lambda: f"left behind: {self.left_behind()}", limit_s=60)

    @contextmanager
    def offline(self, node: str) -> Iterator[None]:
        assert self.control("update", f"nodename={node}", "state=drain", "reason=tests").returncode == 0
        try:
            yield
        finally:
            assert self.control("update", f"nodename={node}", "state=resume").returncode == 0

    def held(self, job_id: str) -> bool:
        facts = self.facts(job_id)
        return (facts["JobState"], facts["Reason"]) == ("PENDING", "JobHeldUser")

    def running(self, job_id: str) -> bool:
        return self.facts(job_id)["JobState"] == "RUNNING"

    def entering(self, *command: str, user: Optional[User] = None) -> list[str]:
        own = (f"{name}={value}" for name, value in self.environment.items())
        return super().entering("env", *own, *command, user=user)

    def enter(self, node: str, *command: str) -> str:
        done = subprocess.run(
            ["nsenter", f"--target={self._first(node)}", "--mount", "--uts", "--net", "--pid", "--", *command],
            env=self._own, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _first(self, node: str) -> int:
        """The first process of a node's namespaces."""
        noted = json.loads(Layout(self.root / "local").node_list.read_bytes())
        (process,) = (Process(*each) for name, _, each in noted if name == node)
        assert identify(process.pid) == process
        return process.pid

    def lose(self, node: str) -> None:
        """The power of a node fails: the first process of its namespaces ends, and with it all of them."""
        os.kill(self._first(node), signal.SIGKILL)
        self.daemons.pop(node).wait(20)
        self.nodes = tuple(each for each in self.nodes if each != node)

    def whole(self, job_id: str) -> str:
        return f"{job_id.partition('.')[0]}.ref"

    def own_errors(self, text: str) -> str:
        return re.sub(r"^(?:slurmstepd-\S+:|\[\S+\]) error: \*\*\* JOB .* \*\*\*\n", "", text, flags=re.MULTILINE)

    def plain_output(self, name: str, job_id: str) -> str:
        return f"slurm-{job_id}.out"

    def plain_status(self, status: int) -> int:
        return status

    def session(self, tty: Terminal, user: User) -> str:
        """`srun` shows nothing of its job."""
        words = ("--noheader", "--format=%i", "--states=PENDING,RUNNING", f"--user={user.name}")
        found: list[str] = []

        def there() -> bool:
            found[:] = self.control(*words, program="squeue").stdout.split()
            return len(found) == 1

        eventually(there, lambda: f"one job: {found}\n{tty.seen}")
        return found[0]

    def command(self, name: str, *arguments: str) -> list[str]:
        words = {"qdel": ["scancel"], "qrls": ["scontrol", "release"], "qrerun": ["scontrol", "requeue"]}[name]
        return [str(BIN / words[0]), *words[1:], *(job.partition(".")[0] for job in arguments)]

    def by_hand(self, folder: Path, script: Path) -> list[str]:
        streams = [f"--{name}={script.name}.{name[0]}%j" for name in ("output", "error")]
        return ["/usr/bin/sbatch", "--parsable", f"--comment=vtorque:{folder}", *streams, str(script)]

    def hook_times(self) -> list[float]:
        return []

    def waits(self, job_id: str) -> bool:
        return self.facts(job_id)["JobState"] == "PENDING"


def for_slurm(text: str) -> str:
    """The configuration for the embedded batch system, for Slurm: its nodes are simulated ones in any case."""
    changes = {"engine: local": f"engine: slurm\nslurm: {{{{bin: {BIN}}}}}", "boot: 400": "boot: 400, sisters: 25"}
    if not nodes_of(text):
        changes["local: {{"] = "local: {{nodes: 2, "
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


@contextmanager
def slurm_site(text: str = SITE, kind: type[Slurm] = Slurm) -> Iterator[Slurm]:
    """An installation for Slurm with a cluster of its own; nothing of it stays. `text` is that of the embedded one."""
    text = for_slurm(text)
    with installed(text) as site:
        here = kind(site.prefix, site.root, nodes_of(text))
        try:
            here.start()
            yield here
        finally:
            here.close()


def found_programs() -> Optional[str]:
    """A program of Slurm's that is not installed."""
    return lacking(("munged", "slurmctld", "slurmd", "sbatch"))
