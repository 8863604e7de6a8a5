"""The variables of TORQUE's that a job on Slurm has, made of Slurm's own: scripts that were written for it go on.

The `PBS_O_…` variables come with the job, from its submission. Names: qsub(1B) of TORQUE 6.1, sbatch(1) and srun(1) of
Slurm 22.05.
"""

from __future__ import annotations

from collections.abc import Mapping

_SAME = {
    "PBS_JOBNAME": "SLURM_JOB_NAME",
    "PBS_QUEUE": "SLURM_JOB_PARTITION",
    "PBS_ARRAYID": "SLURM_ARRAY_TASK_ID",
    "PBS_NUM_NODES": "SLURM_JOB_NUM_NODES",
    "PBS_NUM_PPN": "SLURM_CPUS_ON_NODE",
}


def pbs_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What a job has of them, from the environment that Slurm gives it.

    `PBS_JOBID` is the id by which `vmgr` knows the job, `12.CLUSTER`; a member of an array has one of its own.
    """
    found = {name: environ[slurm] for name, slurm in _SAME.items() if slurm in environ}
    if "SLURM_JOB_ID" in environ and "SLURM_CLUSTER_NAME" in environ:
        found["PBS_JOBID"] = f"{environ['SLURM_JOB_ID']}.{environ['SLURM_CLUSTER_NAME']}"
    batch = environ.get("ENVIRONMENT") == "BATCH"
    found["PBS_ENVIRONMENT"] = "PBS_BATCH" if batch else "PBS_INTERACTIVE"
    found.update(PBS_NODENUM="0", PBS_VNODENUM="0", PBS_TASKNUM="1")
    nodes, each = (environ.get(name, "") for name in ("SLURM_JOB_NUM_NODES", "SLURM_CPUS_ON_NODE"))
    if nodes.isdecimal() and each.isdecimal() and len(nodes + each) < 20:
        found["PBS_NP"] = str(int(nodes) * int(each))
    return found
