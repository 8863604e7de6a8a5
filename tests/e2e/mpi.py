"""An MPI program, MPIs of a user's own that start it, and what it says when every message came through."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from .conftest import REPOSITORY, User

RING = REPOSITORY / "examples" / "ring.c"
ELEMENTS = 200_000
"""How many numbers the program reduces."""

OPENMPI = Path("/usr/lib/x86_64-linux-gnu/openmpi/lib/openmpi3")
"""The components of Debian's Open MPI."""
LEFT_OUT = (
    "ucx", "ofi", "psm", "openib", "slurm", "gridengine", "flux", "monitoring", "scoll", "spml", "sshmem", "memheap",
    "osc", "_io_", "fcoll", "_fs_", "fbtl", "sharedfp",
)  # fmt: skip
"""Parts of the names of those for other hardware, batch systems, and what the program does not do."""
OWN_OPENMPI = """\
export PATH=$HOME/own/bin:$PATH LD_LIBRARY_PATH=$HOME/own/lib OPAL_PREFIX=$HOME/own
export OMPI_MCA_mca_base_component_path=$HOME/own/lib/openmpi3 PMIX_MCA_pcompress_base_silence_warning=1
export OMPI_MCA_pml=ob1 OMPI_MCA_btl=self,tcp
"""
"""The lines of a script by which it finds what `own_openmpi` has put into the home."""


def libraries(*programs: Path) -> list[Path]:
    """The libraries of programs, but `libc` itself, which every image has and of the same release."""
    listed = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=True).stdout
    found = {Path(path) for path in re.findall(r"=> (/\S+)", listed)}
    return sorted(path for path in found if not path.name.startswith("libc."))


def put(user: User, folder: str, *files: Path) -> None:
    """Copy files into a folder in the user's home."""
    target = user.home / folder
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, target / file.name)


def compiled(user: User, mpi: str, compiler: str) -> Path:
    """The ring program for an MPI, in the user's home."""
    target = user.home / f"ring.{mpi}"
    subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(target), str(RING)], check=True)
    return target


def own_mpich(user: User) -> None:
    """MPICH, as `pip install mpich` has it, and the ring program for it, in the user's home.

    Debian 12 has 4.0, which now and then stays in MPI_Finalize over TCP, on any machine: mended in 4.2 (pmodels/mpich,
    pull request 6596).
    """
    here = Path(sys.prefix)
    put(user, "own/bin", here / "bin" / "hydra_pmi_proxy")
    shutil.copy(here / "bin" / "mpirun", user.home / "own" / "bin" / "mpirun.mpich")
    put(user, "own/lib", here / "lib" / "libmpi.so.12")
    shutil.copytree(here / "lib" / "mpich", user.home / "own" / "lib" / "mpich")
    compiled(user, "mpich", str(here / "bin" / "mpicc"))


def own_openmpi(user: User) -> None:
    """Open MPI with TCP, and the ring program for it, in the user's home, for images that have no MPI."""
    programs = [Path("/usr/bin/mpirun.openmpi"), Path("/usr/bin/orted")]
    components = [path for path in OPENMPI.glob("mca_*.so") if not any(part in path.name for part in LEFT_OUT)]
    put(user, "own/bin", *programs)
    put(user, "own/lib/openmpi3", *components)
    put(user, "own/lib", *libraries(compiled(user, "openmpi", "mpicc.openmpi"), *programs, *components))


def ring(hosts: list[str]) -> list[str]:
    """What the ring program says when it ran on these hosts and every message and sum was right."""
    ranks = len(hosts)
    total = sum(range(1, ranks + 1))
    return [
        f"ranks {ranks}",
        *(f"host {rank} {name}" for rank, name in enumerate(hosts)),
        f"ring {sum(number * number for number in range(1, ranks + 1))}",
        f"sum {total} {total * ELEMENTS}",
        f"max {ranks - 1} {hosts[-1]}",
    ]
