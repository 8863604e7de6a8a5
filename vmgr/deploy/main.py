"""`install.sh`, once there is a Python: what is asked for, done on this machine and then on nodes."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from vmgr import __version__, pdsh
from vmgr.deploy import alarm, build, moms, nodes, options, slurmfiles, slurmsite
from vmgr.deploy.front import Front, Site, engine_in, first_config, site_of
from vmgr.deploy.hookfiles import DEFAULT_JOB_TYPE, JOB_TYPE, WRAP
from vmgr.deploy.nodes import INSTALLED, PENDING, REMOVING, Answer, Book, Known, Reach
from vmgr.deploy.nodeside import Order
from vmgr.deploy.options import CHECK, INSTALL, SLURM, TORQUE, UNINSTALL, UPGRADE, Options
from vmgr.errors import Code, VTorqueError, printable
from vmgr.trust import check_trusted

FRONT_PROGRAMS = ("ssh", "ssh-keygen")
NODE_PROGRAMS = ("ssh", "ssh-keygen", "qemu-system-x86_64", "qemu-img")


_PLACES = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
"""Where pip would put packages instead."""


def main(source: str, argv: Sequence[str]) -> int:
    """Do what a command line of `install.sh` asks for, from the checkout in `source`; gives the exit status.

    0 when all is done, 1 when some nodes are not, or a check has found something; 2 when it is refused.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    os.umask(0o022)
    for name in [name for name in os.environ if name.startswith("PYTHON") or name in _PLACES]:
        del os.environ[name]  # the Python that builds listens to them
    os.environ["PIP_USER"] = "no"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run(source, options.read(argv))
    except VTorqueError as err:
        print(err, file=sys.stderr)
        return err.code.status
    except OSError as err:
        where = f"{os.fsdecode(err.filename)}: " if isinstance(err.filename, (str, bytes)) else ""
        print(f"install.sh: {printable(where)}{err.strerror or err}", file=sys.stderr)
        return Code.INTERNAL.status
    except KeyboardInterrupt:
        print("install.sh: interrupted; the same command goes on", file=sys.stderr)
        return 130


@dataclass
class Job:
    """One run: what is asked for, where, and which nodes it is about."""

    options: Options
    front: Front
    book: Book
    known: dict[str, Known]
    names: list[str]
    program: str
    engine: str

    @property
    def reach(self) -> Reach:
        return Reach(self.program, self.options.fanout, self.options.timeout, self.options.python)


def run(source: str, wanted: Options) -> int:
    """The same with options that are read. Raises VTorqueError, OSError."""
    if os.geteuid() != 0:
        raise VTorqueError("must be run as root", code=Code.ACCESS, hint="sudo ./install.sh …")
    checkout = build.source_at(source, __version__, wanted.python)
    front = Front(wanted.prefix, checkout, python=wanted.python, wheels=wanted.wheels, links=wanted.links)
    if wanted.action != INSTALL and os.path.isdir(front.prefix):
        check_trusted(front.prefix)  # what lies in it says what is run, and what is removed
    engine = _engine(wanted, front)
    book = Book(front.book)
    known = book.read()
    names, program = _nodes(wanted, known, engine)
    job = Job(wanted, front, book, known, names, program, engine)
    if wanted.forget is not None:
        _forget(job)
    if wanted.action == CHECK:
        return _check(job)
    if wanted.action == UNINSTALL:
        with front.store.held() if front.is_there() else nullcontext():
            return _uninstall(job)
    return _install(job)


def _engine(wanted: Options, front: Front) -> str:
    """The batch system that this is about. Raises VTorqueError: VT-CONFIG where the configuration says another one."""
    there = front.engine()
    if wanted.engine is not None and there is not None:
        _same_engine(wanted.engine, there, front.config)
    given = engine_in(moms.content(wanted.config).decode("utf-8", "replace")) if wanted.config else None
    if wanted.engine is not None and there is None and given is not None:
        _same_engine(wanted.engine, given, str(wanted.config))
    engine = wanted.engine or there or given or TORQUE
    if engine == SLURM:
        options.refuse_moms(wanted)
    return engine


def _same_engine(wanted: str, said: str, where: str) -> None:
    if wanted != said:
        raise VTorqueError(
            f"--engine {wanted}: {where} says engine: {said}", code=Code.CONFIG, hint=f"set engine: {wanted} there"
        )


def _nodes(wanted: Options, known: Mapping[str, Known], engine: str) -> tuple[list[str], str]:
    """The nodes that this is about, and the program that reaches them."""
    named = wanted.nodes is not None or wanted.all
    whole = wanted.action in (UPGRADE, CHECK, UNINSTALL) and not named
    names: list[str] = []
    if wanted.nodes is not None:
        names = pdsh.expand(wanted.nodes, program=pdsh.tool(wanted.via))
    elif wanted.all:
        slurm = engine == SLURM
        names = slurmsite.all_nodes() if slurm else nodes.all_nodes(wanted.torque_home or options.TORQUE_HOME)
    elif whole:
        names = sorted(known, key=pdsh.natural)
    if wanted.forget is not None:
        gone = set(pdsh.expand(wanted.forget, program=pdsh.tool(wanted.via)))
        names = [name for name in names if name not in gone]
    return names, pdsh.tool(wanted.via) if names else pdsh.PDSH


def _forget(job: Job) -> None:
    assert job.options.forget is not None
    gone = pdsh.expand(job.options.forget, program=pdsh.tool(job.options.via))
    there = [name for name in gone if name in job.known]
    if there and not job.options.dry_run:
        job.book.note(dict.fromkeys(there))
        job.known = job.book.read()
    for name in there:
        print(f"{name}: forgotten")


def _ask(job: Job, question: str) -> bool:
    """Whether somebody at a terminal agrees; yes where nobody is asked."""
    if not options.may_ask(job.options):
        return True
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# --- install, upgrade


def _install(job: Job) -> int:
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
    if not _ask(job, f"install vTorque {front.source.version} in {front.prefix}, and on {about}?"):
        return 1
    front.prepare()
    with front.store.held():
        site = front.build_programs(config)
        if wanted.engine is not None:
            _same_engine(wanted.engine, site.engine, front.config)
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
            _tell_slurm(front, site)
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


def _tell_slurm(front: Front, site: Site) -> bool:
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
        _tell_slurm(front, _site_or_default(job))
    if not job.names:
        return 0
    _one_batch_system(job)
    return _finish(job, _send(job, _order(job, INSTALL, _site_or_default(job))))


def _site_or_default(job: Job) -> Site:
    """What the configuration says; the defaults where nothing is installed yet."""
    current = f"{job.front.prefix}/current"
    if os.path.exists(current):
        return site_of(build.settings(current, job.front.prefix))
    home = job.options.torque_home or options.TORQUE_HOME
    return Site(job.engine, "/var/spool/vtorque", "", f"{home}/mom_priv", DEFAULT_JOB_TYPE, 0, 0)


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
    home = slurmfiles.HOME if slurm else wanted.torque_home or _home_of(site)
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
    answers = _send(job, _order(job, INSTALL, site))
    done = {answer.node: job.known[answer.node] for answer in answers if answer.status == "ok"}
    job.book.note({name: known._replace(state=INSTALLED) for name, known in done.items()})
    return _finish(job, answers)


def _home_of(site: Site) -> str:
    """TORQUE's home of the configuration's `torque.mom_priv`."""
    home, _, name = site.mom_priv.rpartition("/")
    return home if name == "mom_priv" and home else options.TORQUE_HOME


def _order(job: Job, action: str, site: Site) -> Order:
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


# --- uninstall, check


def _uninstall(job: Job) -> int:
    wanted, front = job.options, job.front
    only_nodes = wanted.nodes is not None or wanted.all
    what = f"{len(job.names)} nodes" if only_nodes else f"{front.prefix} and {len(job.names)} nodes"
    if not _ask(job, f"take vTorque away from {what}?"):
        return 1
    there = front.is_there()
    status = 0
    if there and job.engine == SLURM:
        _not_in_use(job, only_nodes)
    if job.names:
        if there and not wanted.dry_run:
            known = {name: job.known.get(name) or _supposed(job) for name in job.names}
            job.book.note({name: each._replace(state=REMOVING) for name, each in known.items()})
            job.known = job.book.read()
        answers = _send(job, _order(job, UNINSTALL, _site_or_default(job)))
        if there and not wanted.dry_run:
            job.book.note({answer.node: None for answer in answers if answer.status == "ok"})
        status = _finish(job, answers)
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
    try:
        folder = _site_or_default(job).slurm_bin
    except VTorqueError:  # a configuration that is wrong does not keep it here
        folder = ""
    ours = slurmsite.report(job.front.prefix, folder).ours
    if not ours:
        return
    told = f"slurm.conf has hooks of vTorque ({', '.join(line.partition('=')[0] for line in ours)})"
    if not only_nodes:
        raise VTorqueError(
            f"{told}: Slurm drains nodes without them", code=Code.ACCESS,
            hint=f"take the lines of {job.front.slurm_lines} out of it, and: scontrol reconfigure",
        )  # fmt: skip
    print(f"{told}: Slurm drains nodes that have none, unless they are no longer its nodes")


def _supposed(job: Job) -> Known:
    """What is taken to be so on a node of which nothing is known."""
    if job.engine == SLURM:
        return Known(slurmfiles.HOME, slurmfiles.MODE, PENDING)
    home = job.options.torque_home or _home_of(_site_or_default(job))
    return Known(home, job.options.hooks or WRAP, PENDING)


def _check(job: Job) -> int:
    problems = job.front.check(b"")
    for line in problems:
        print(f"{job.front.prefix}: {line}")
    if not problems:
        print(f"{job.front.prefix}: vTorque {job.front.source.version}, all as installed")
    status = int(bool(problems))
    if job.engine == SLURM and job.front.is_there():
        status |= _tell_slurm(job.front, _site_or_default(job))
    if job.names and job.front.is_there():
        status |= _finish(job, _send(job, _order(job, CHECK, _site_or_default(job))))
    return status


# --- orders to nodes


def _send(job: Job, order: Order) -> list[Answer]:
    """Send an order to the nodes of this run, with a line for each as it answers."""
    groups: dict[Known, list[str]] = {}
    for name in job.names:
        known = job.known.get(name) or _supposed(job)
        if job.options.torque_home is not None and known.mode != slurmfiles.MODE:
            known = known._replace(home=job.options.torque_home)
        groups.setdefault(known._replace(state=""), []).append(name)
    width = max(map(len, job.names))

    def tell(answer: Answer) -> None:
        mark = {"ok": "", "tree": "", "problems": "PROBLEMS: ", "failed": "FAILED: "}[answer.status]
        kept = f"; kept: {'; '.join(answer.kept)}" if answer.kept else ""
        print(f"{answer.node:<{width}}  {mark}{answer.text}{kept}", flush=True)

    return nodes.perform(groups, order, job.reach, job.front.tree, tell)


def _finish(job: Job, answers: Sequence[Answer]) -> int:
    """The last line, which names the nodes that are not done; gives the exit status."""
    bad = sorted((answer.node for answer in answers if answer.status != "ok"), key=pdsh.natural)
    if not bad:
        print(f"{len(answers)} of {len(answers)} nodes done")
        return 0
    again = "" if job.options.action == CHECK else "; the same command does them later"
    print(f"{len(answers) - len(bad)} of {len(answers)} nodes done, not done: {', '.join(bad)}{again}")
    return 1
