"""`install.sh` as it installs and upgrades: on the front end, and on nodes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Optional

from vmgr.deploy import moms, options, slurmfiles, slurmsite
from vmgr.deploy.front import Front, Site, first_config
from vmgr.deploy.hookfiles import DEFAULT_JOB_TYPE, JOB_TYPE, WRAP
from vmgr.deploy.job import NODE_PROGRAMS, Job, ask, finish, home_of, order_for, same_engine, send
from vmgr.deploy.nodes import INSTALLED, PENDING, Known
from vmgr.deploy.options import INSTALL, SLURM, UPGRADE
from vmgr.errors import Code, VTorqueError, printable

FRONT_PROGRAMS = ("ssh", "ssh-keygen")


def install(job: Job) -> int:
    """Do it; gives the exit status. Raises VTorqueError, OSError."""
    wanted, front = job.options, job.front
    if wanted.action == UPGRADE and not front.is_there() and not os.path.isdir(f"{front.prefix}/venv"):
        raise VTorqueError(
            f"there is nothing in {front.prefix} to upgrade", code=Code.VALUE, hint="leave --upgrade out"
        )
    _need_programs(job)
    config = first_config(
        wanted.config or f"{front.source.folder}/contrib/vtorque.yaml", front.prefix, wanted.torque_home, wanted.engine
    )
    about = f"{len(job.names)} nodes" if job.names else "no node"
    if wanted.dry_run:
        return _dry_install(job, about)
    if not ask(job, f"install vTorque {front.source.version} in {front.prefix}, and on {about}?"):
        return 1
    front.prepare()
    with front.store.held():
        site = front.build_programs(config)
        if wanted.engine is not None:
            same_engine(wanted.engine, site.engine, front.config)
        job.engine = site.engine
        if site.engine == SLURM:
            options.refuse_moms(wanted)
        _one_batch_system(job)
        lines = moms.content(front.slurm_lines).decode("utf-8", "replace")
        new = front.new_keys()
        outcome = front.switch(config, site)
        print(f"vTorque is in {front.prefix}; its configuration is {front.config}")
        for line in new:
            print(f"new in the configuration: {line}")
        for line in outcome.kept:
            print(f"kept: {line}")
        if site.engine == SLURM:
            _tell_lines(front, lines)
        status = _on_nodes(job, site) if job.names else 0
        if site.engine == SLURM:
            tell_slurm(front, site)
        return status


def _tell_lines(front: Front, before: str) -> None:
    """Print the lines for slurm.conf, and what has changed since the text `before`."""
    text = moms.content(front.slurm_lines).decode("utf-8", "replace")
    there = f", which are in {front.slurm_lines} too" if text else ""
    print(f"slurm.conf needs these lines{there}; install.sh does not edit it:")
    wanted = slurmfiles.conf_lines(slurmsite.hooks_folder(front.prefix))
    for line in wanted:
        print(f"  {line}")
    if before and before != text:
        for line in before.splitlines():
            if line and line not in text.splitlines():
                print(f"no longer needed in slurm.conf: {printable(line)}")
        for line in wanted:
            if line not in before.splitlines():
                print(f"new for slurm.conf: {line}")


def tell_slurm(front: Front, site: Site) -> bool:
    """Print what the site's slurm.conf has of the lines; gives whether guest jobs cannot run with it."""
    report = slurmsite.report(front.prefix, site.slurm_bin)
    for line in report.lines:
        print(line)
    return report.bad


def _need_programs(job: Job) -> None:
    """Say which programs this machine lacks for guests of its own; it may be a front end that runs none.

    Raises VTorqueError (VT-ACCESS) where it lacks what every front end needs.
    """
    missing = [name for name in NODE_PROGRAMS if shutil.which(name) is None]
    if not missing:
        return
    text = Path(job.front.source.folder, "contrib", "packages.txt").read_text(encoding="utf-8")
    packages = " ".join(line.split("#")[0].strip() for line in text.splitlines()).split()
    told, hint = f"missing: {', '.join(missing)}", f"on Debian: apt-get install {' '.join(packages)}"
    if set(missing) & set(FRONT_PROGRAMS):
        raise VTorqueError(told, code=Code.ACCESS, hint=hint)
    if not job.names and not job.known:
        print(f"{told}: no guests can run on this machine; {hint}")


def _dry_install(job: Job, about: str) -> int:
    front = job.front
    what = "is current" if front.is_there() and not front.check(b"") else "would be installed or changed"
    print(f"vTorque {front.source.version} in {front.prefix}: {what}; {about}")
    if job.engine == SLURM:
        _tell_lines(front, "")
        tell_slurm(front, job.site)
    if not job.names:
        return 0
    _one_batch_system(job)
    return finish(job, send(job, order_for(job, INSTALL, job.site)))


def _one_batch_system(job: Job) -> None:
    """Raises VTorqueError (VT-CONFIG) where a node of this run has what another batch system than the engine needs."""
    for name in job.names:
        known = job.known.get(name)
        if known is not None and (known.mode == slurmfiles.MODE) != (job.engine == SLURM):
            raise VTorqueError(
                f"{name} has vTorque for another batch system than {job.engine}", code=Code.CONFIG,
                hint=f"./install.sh --uninstall --nodes {name} first",
            )  # fmt: skip


def _on_nodes(job: Job, site: Site) -> int:
    wanted = job.options
    slurm = site.engine == SLURM
    home = slurmfiles.HOME if slurm else wanted.torque_home or home_of(site)
    changes: dict[str, Optional[Known]] = {}
    for name in job.names:
        before = job.known.get(name)
        mode = slurmfiles.MODE if slurm else wanted.hooks or (before.mode if before else WRAP)
        if mode == JOB_TYPE and site.job_type is None:
            raise VTorqueError(
                f"hooks of the mode {JOB_TYPE} need submit.job_type in {job.front.config}",
                code=Code.CONFIG,
                hint=f"set it, for instance to {DEFAULT_JOB_TYPE}",
            )
        changes[name] = Known(wanted.torque_home or (before.home if before else home), mode, PENDING)
    if site.engine == "local":
        raise VTorqueError(
            f"{job.front.config} says engine: local, which has no nodes",
            code=Code.CONFIG,
            hint="set engine: torque or slurm",
        )
    job.book.note(changes)
    job.known = job.book.read()
    answers = send(job, order_for(job, INSTALL, site))
    done = {answer.node: job.known[answer.node] for answer in answers if answer.status == "ok"}
    job.book.note({name: known._replace(state=INSTALLED) for name, known in done.items()})
    return finish(job, answers)
