"""A small real Slurm: munged, slurmctld and two slurmd on this machine, without guests and without hooks."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import slurmprograms
from slurmprograms import PATH, lacking

LIMIT_S = 60
CONF = (
    slurmprograms.CONF
    + """\
SlurmctldHost={host}(127.0.0.1)
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,bf_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=4 RealMemory=4000 Features=ib
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=4 RealMemory=4000 Features=ib
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=long Nodes=ALL MaxTime=INFINITE State=UP
"""
)


def missing() -> Optional[str]:
    """A program of Slurm's that is not installed."""
    return lacking(("munged", "slurmctld", "slurmd", "sbatch", "srun"))


@contextmanager
def slurm(folder: Path) -> Iterator[Path]:
    """Its configuration file, once both nodes are idle; nothing runs any more afterwards."""
    (folder / "ctld").mkdir(mode=0o700)
    conf = folder / "slurm.conf"
    port, first, second = _free_ports(3)
    host = os.uname().nodename
    conf.write_text(CONF.format(host=host, folder=folder, port=port, first=first, second=second))
    daemons = {
        "munged": slurmprograms.munged(folder),
        "slurmctld": ["slurmctld", "-D"],
        "n1": ["slurmd", "-D", "-N", "n1"],
        "n2": ["slurmd", "-D", "-N", "n2"],
    }  # fmt: skip
    environment = {"PATH": PATH, "SLURM_CONF": str(conf), "LANG": "C.UTF-8"}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, argv in daemons.items():
            started.append(slurmprograms.start(argv, environment, folder / f"{name}.said"))
            if name == "munged":
                _until(lambda: (folder / "munge" / "socket").exists())
        _until(lambda: _states(environment) == ["idle", "idle"])
        yield conf
    finally:
        subprocess.run(["scancel", "-u", "root"], env=environment, timeout=LIMIT_S)
        for daemon in reversed(started):
            slurmprograms.end(daemon)


def _until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not met():
        assert time.monotonic() < deadline, "Slurm's daemons do not start"
        time.sleep(0.05)  # they tell of nothing by themselves


def _states(environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        ["sinfo", "-h", "-p", "long", "-N", "-o", "%T"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    return done.stdout.split()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
