"""One run of `install.sh`: what is asked for, what is known of the site, and orders to its nodes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vmgr import pdsh
from vmgr.deploy import alarm, build, nodes, options, slurmfiles
from vmgr.deploy.front import Front, Site, site_of, slurm_bin_in
from vmgr.deploy.hookfiles import DEFAULT_JOB_TYPE, WRAP
from vmgr.deploy.moms import content
from vmgr.deploy.nodes import PENDING, Answer, Book, Known, Reach
from vmgr.deploy.nodeside import Order
from vmgr.deploy.options import CHECK, SLURM, UNINSTALL, Options
from vmgr.errors import Code, VTorqueError, printable

NODE_PROGRAMS = ("ssh", "ssh-keygen", "qemu-system-x86_64", "qemu-img")


@dataclass
class Job:
    """One run: what is asked for, where, and which nodes it is about."""

    options: Options
    front: Front
    book: Book
    known: dict[str, Known]
    engine: str
    names: Sequence[str] = ()
    program: str = pdsh.PDSH

    @property
    def reach(self) -> Reach:
        return Reach(self.program, self.options.fanout, self.options.timeout, self.options.python)

    @cached_property
    def site(self) -> Site:
        """What the configuration says; where nothing is installed yet, the defaults and what `--config` says of Slurm.

        Of a configuration that cannot be read, what the manifest has noted of it, when all is taken away. Raises
        VTorqueError: VT-CONFIG, VT-BUILD.
        """
        current = f"{self.front.prefix}/current"
        if not os.path.exists(current):
            home = self.options.torque_home or options.TORQUE_HOME
            given = content(self.options.config).decode("utf-8", "replace") if self.options.config else ""
            return Site(self.engine, mom_priv=f"{home}/mom_priv", slurm_bin=slurm_bin_in(given))
        try:
            return site_of(build.settings(current, self.front.prefix))
        except VTorqueError as err:
            if self.options.action != UNINSTALL:
                raise
            site = self.front.noted()
            print(
                f"the configuration cannot be read ({printable(err.message)}): what was installed goes all the same; "
                f"guest jobs are looked for in {site.spool} alone, as it said at the last installation"
            )
            return site


def ask(job: Job, question: str) -> bool:
    """Whether somebody at a terminal agrees; yes where nobody is asked."""
    if not options.may_ask(job.options):
        return True
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def same_engine(wanted: str, said: str, where: str) -> None:
    """Raises VTorqueError (VT-CONFIG) where an engine that is wanted is not the one that a file says."""
    if wanted != said:
        raise VTorqueError(
            f"--engine {wanted}: {where} says engine: {said}", code=Code.CONFIG, hint=f"set engine: {wanted} there"
        )


def home_of(site: Site) -> str:
    """TORQUE's home of the configuration's `torque.mom_priv`."""
    home, _, name = site.mom_priv.rpartition("/")
    return home if name == "mom_priv" and home else options.TORQUE_HOME


def order_for(job: Job, action: str, site: Site) -> Order:
    """An order to nodes, without home and mode, which are those of each."""
    machine, python = build.machine()
    front = job.front
    return Order(
        action=action,
        dry=job.options.dry_run,
        prefix=front.prefix,
        home="",
        tree=front.source.name,
        toolkit=front.source.version,
        front=front.id(),
        mode=WRAP,
        job_type=site.job_type or DEFAULT_JOB_TYPE,
        spool=site.spool,
        needed_s=alarm.needed(site.barrier_s, site.disk_s),
        raise_alarm=job.options.prologalarm == "raise",
        python=python,
        machine=machine,
        programs=NODE_PROGRAMS,
        hooks=front.source.hooks,
        config=front.config_files(),
        units=front.units(),
    )


def supposed(job: Job) -> Known:
    """What is taken to be so on a node of which nothing is known."""
    if job.engine == SLURM:
        return Known(slurmfiles.HOME, slurmfiles.MODE, PENDING)
    home = job.options.torque_home or home_of(job.site)
    return Known(home, job.options.hooks or WRAP, PENDING)


def send(job: Job, order: Order) -> list[Answer]:
    """Send an order to the nodes of this run, with a line for each as it answers."""
    groups: dict[Known, list[str]] = {}
    for name in job.names:
        known = job.known.get(name) or supposed(job)
        if job.options.torque_home is not None and known.mode != slurmfiles.MODE:
            known = known._replace(home=job.options.torque_home)
        groups.setdefault(known._replace(state=""), []).append(name)
    width = max(map(len, job.names))

    def tell(answer: Answer) -> None:
        mark = {"ok": "", "tree": "", "problems": "PROBLEMS: ", "failed": "FAILED: "}[answer.status]
        kept = f"; kept: {'; '.join(answer.kept)}" if answer.kept else ""
        print(f"{answer.node:<{width}}  {mark}{answer.text}{kept}", flush=True)

    return nodes.perform(groups, order, job.reach, job.front.tree, tell)


def finish(job: Job, answers: Sequence[Answer]) -> int:
    """The last line, which names the nodes that are not done; gives the exit status."""
    bad = sorted((answer.node for answer in answers if answer.status != "ok"), key=pdsh.natural)
    if not bad:
        print(f"{len(answers)} of {len(answers)} nodes done")
        return 0
    again = "" if job.options.action == CHECK else "; the same command does them later"
    print(f"{len(answers) - len(bad)} of {len(answers)} nodes done, not done: {', '.join(bad)}{again}")
    return 1
