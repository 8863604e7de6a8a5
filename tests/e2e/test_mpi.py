"""MPI over several nodes with several guests on each: names, ssh from guest to guest, `mpirun` without options.

The image has an Open MPI. Programs are compiled against it here, as users do on the front end; hpcc is Debian's own
binary. An MPI of the user's own, MPICH, stands in the home.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import EVERYWHERE, Cluster
from .conftest import Done, Site, User, on_engine
from .mpi import compiled, libraries, own_mpich, put, ring

ENGINES = ("local", "slurm")
PATIENCE_S = 1700
"""Processes that wait for messages keep their vCPUs busy; under emulation on a few cores that takes its time."""

NODES = {"local": 2, "slurm": 3}
"""Three show most; two take half the time, in which all tests run on the embedded batch system."""
MPI = "-vm", "img=debian-12,ram=640M,network=job"

JOB = """\
#!/bin/bash
umask 0027
export WORDS="it's two  words" PATH=$HOME/own/bin:$PATH LD_LIBRARY_PATH=$HOME/own/lib
say() { echo "== $1"; }
say nodefile; cat $PBS_NODEFILE
say hosts; cat /etc/hosts
say ssh; for guest in $VTORQUE_GUESTS; do ssh $guest hostname; done
say mpirun; mpirun hostname
say environment; mpirun sh -c 'echo "$VTORQUE_RANK $(hostname) $PATH $WORDS $(umask)"'
say openmpi; mpirun ./ring.openmpi
say mpich; mpirun.mpich ./ring.mpich
say end
"""

HPCC = """\
#!/bin/bash
export LD_LIBRARY_PATH=$HOME/own/lib
mpirun ./hpcc
"""

HPCC_INPUT = """\
HPLinpack benchmark input file
of a problem as small as emulated processors need
HPL.out      output file name (if any)
8            device out (6=stdout,7=stderr,file)
1            # of problems sizes (N)
{n}          Ns
1            # of NBs
32           NBs
0            PMAP process mapping (0=Row-,1=Column-major)
1            # of process grids (P x Q)
1            Ps
{ranks}      Qs
16.0         threshold
1            # of panel fact
2            PFACTs (0=left, 1=Crout, 2=Right)
1            # of recursive stopping criterium
4            NBMINs (>= 1)
1            # of panels in recursion
2            NDIVs
1            # of recursive panel fact.
1            RFACTs (0=left, 1=Crout, 2=Right)
1            # of broadcast
1            BCASTs (0=1rg,1=1rM,2=2rg,3=2rM,4=Lng,5=LnM)
1            # of lookahead depth
1            DEPTHs (>=0)
2            SWAP (0=bin-exch,1=long,2=mix)
64           swapping threshold
0            L1 in (0=transposed,1=no-transposed) form
0            U  in (0=transposed,1=no-transposed) form
1            Equilibration (0=no,1=yes)
8            memory alignment in double (> 0)
##### this line is a separator
0            Number of additional problem sizes for PTRANS
1200         values of N
0            number of additional blocking sizes for PTRANS
40           values of NB
"""


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with on_engine(request.param, EVERYWHERE) as here:
        yield here


def run(user: User, script: str, *options: str) -> Done:
    """Run a script as a job to its end."""
    path = user.write("job.sh", script)
    waiting = user.start(str(user.site.vsub), "--wait", *options, str(path))
    job, progress = waiting.communicate(timeout=PATIENCE_S)
    return user.finished(job.strip(), waiting.returncode, progress)


def sections(out: str) -> dict[str, list[str]]:
    """The job's output by its headings."""
    parts = re.split(r"^== (\w+)\n", out, flags=re.MULTILINE)
    return {name: text.splitlines() for name, text in zip(parts[1::2], parts[2::2])}


@pytest.mark.timeout(1800)
def test_mpi_over_nodes_with_two_guests_each(cluster: Cluster, user: User) -> None:
    nodes = NODES[cluster.engine]
    guests = [f"vn{node}-{guest}" for node in range(1, nodes + 1) for guest in (1, 2)]
    compiled(user, "openmpi", "mpicc.openmpi")
    own_mpich(user)
    done = run(user, JOB, "-l", f"nodes={nodes}:ppn=2", *MPI, "-vm", "vms_per_node=2")
    assert (done.status, done.err) == (0, ""), done
    said = sections(done.out)
    assert said["nodefile"] == guests
    assert said["hosts"][:2] == ["127.0.0.1 localhost", "::1 localhost"]
    assert [line.split()[1:] for line in said["hosts"][2:]] == [[name] for name in guests]
    assert len({line.split()[0] for line in said["hosts"][2:]}) == len(guests)
    assert said["ssh"] == guests
    assert sorted(said["mpirun"]) == guests
    path = f"{user.home}/own/bin:/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
    assert sorted(said["environment"]) == [
        f"{rank} {name} {path} it's two  words 0027" for rank, name in enumerate(guests)
    ]
    assert said["openmpi"] == ring(guests)
    assert said["mpich"] == ring(guests)
    assert said["end"] == []


@pytest.mark.only("local", reason="what a batch system has to do with MPI, the test before shows")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_hpcc_as_debian_ships_it(cluster: Cluster, user: User) -> None:
    hpcc = Path("/usr/bin/hpcc")
    put(user, "", hpcc)
    put(user, "own/lib", *(path for path in libraries(hpcc) if path.name.startswith("libblas")))
    user.write("hpccinf.txt", HPCC_INPUT.format(n=200, ranks=2))
    # not pinned: each simulated node would take the first CPU of the same machine
    done = run(user, HPCC, "-l", "nodes=2:ppn=1", *MPI, "-vm", "vcpu_pinning=off")
    assert (done.status, done.err) == (0, ""), done
    report = (user.home / "hpccoutf.txt").read_text()
    assert re.search(r"^CommWorldProcs=2$", report, re.MULTILINE)
    assert re.search(r"^Success=1$", report, re.MULTILINE)
    passed, failed = (
        [int(number) for number in re.findall(rf"^ +(\d+) tests completed and {how} residual checks", report, re.M)]
        for how in ("passed", "failed")
    )
    assert len(passed) == 2 and min(passed) >= 1, "PTRANS and HPL, each with its own verification"
    assert failed == [0, 0]
    assert "FAILED" not in report
