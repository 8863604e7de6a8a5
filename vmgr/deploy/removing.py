"""`install.sh --uninstall`: from nodes, and from the front end.

It goes by the manifest and by what is known of the nodes, so that a configuration which cannot be read is no hindrance.
"""

from __future__ import annotations

from vmgr.deploy import slurmsite
from vmgr.deploy.job import Job, ask, finish, order_for, send, supposed
from vmgr.deploy.nodes import REMOVING
from vmgr.deploy.options import SLURM, UNINSTALL
from vmgr.errors import Code, VTorqueError


def uninstall(job: Job) -> int:
    """Do it; gives the exit status. Raises VTorqueError, OSError."""
    wanted, front = job.options, job.front
    only_nodes = wanted.nodes is not None or wanted.all
    what = f"{len(job.names)} nodes" if only_nodes else f"{front.prefix} and {len(job.names)} nodes"
    if not ask(job, f"take vTorque away from {what}?"):
        return 1
    there = front.is_there()
    status = 0
    if there and SLURM in (job.engine, front.noted().engine):
        _not_in_use(job, only_nodes)
    if job.names:
        if there and not wanted.dry_run:
            known = {name: job.known.get(name) or supposed(job) for name in job.names}
            job.book.note({name: each._replace(state=REMOVING) for name, each in known.items()})
            job.known = job.book.read()
        answers = send(job, order_for(job, UNINSTALL, job.site))
        if there and not wanted.dry_run:
            job.book.note({answer.node: None for answer in answers if answer.status == "ok"})
        status = finish(job, answers)
    if only_nodes:
        return status
    if status:
        print(f"{front.prefix} stays until that is done, or --forget SET names nodes that are gone for good")
        return status
    outcome = front.uninstall(dry=wanted.dry_run)
    if wanted.dry_run:
        print(f"{front.prefix}: would be removed, {len(outcome.removed)} files and folders")
        return 0
    for line in outcome.kept:
        print(f"kept: {line}")
    print(f"vTorque is removed from {front.prefix}" if there else f"nothing of vTorque is in {front.prefix}")
    return 0


def _not_in_use(job: Job, only_nodes: bool) -> None:
    """Slurm drains a node whose Prolog is not there.

    Raises VTorqueError (VT-ACCESS) while slurm.conf names ours and all is to go; of some nodes it is only said.
    """
    ours = slurmsite.report(job.front.prefix, job.site.slurm_bin).ours
    if not ours:
        return
    told = f"slurm.conf has hooks of vTorque ({', '.join(line.partition('=')[0] for line in ours)})"
    if not only_nodes:
        raise VTorqueError(
            f"{told}: Slurm drains nodes without them", code=Code.ACCESS,
            hint=f"take the lines of {job.front.slurm_lines} out of it, and: scontrol reconfigure",
        )  # fmt: skip
    print(f"{told}: Slurm drains nodes that have none, unless they are no longer its nodes")
