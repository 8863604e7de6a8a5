"""`install.sh`, once there is a Python: what is asked for, done on this machine and then on nodes."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from vmgr import __version__, pdsh
from vmgr.deploy import build, moms, nodes, options, slurmsite
from vmgr.deploy.front import Front, engine_in
from vmgr.deploy.installing import install, tell_slurm
from vmgr.deploy.job import Job, finish, order_for, same_engine, send
from vmgr.deploy.nodes import Book
from vmgr.deploy.options import CHECK, INSTALL, SLURM, TORQUE, UNINSTALL, UPGRADE, Options
from vmgr.deploy.removing import uninstall
from vmgr.errors import Code, VTorqueError, printable
from vmgr.trust import check_trusted

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
    job = Job(wanted, front, book, book.read(), engine)
    job.names, job.program = _nodes(job)
    if wanted.forget is not None:
        _forget(job)
    if wanted.action == CHECK:
        return _check(job)
    if wanted.action == UNINSTALL:
        with front.store.held() if front.is_there() else nullcontext():
            return uninstall(job)
    return install(job)


def _engine(wanted: Options, front: Front) -> str:
    """The batch system that this is about. Raises VTorqueError: VT-CONFIG where the configuration says another one."""
    there = front.engine()
    if wanted.engine is not None and there is not None:
        same_engine(wanted.engine, there, front.config)
    given = engine_in(moms.content(wanted.config).decode("utf-8", "replace")) if wanted.config else None
    if wanted.engine is not None and there is None and given is not None:
        same_engine(wanted.engine, given, str(wanted.config))
    engine = wanted.engine or there or given or TORQUE
    if engine == SLURM:
        options.refuse_moms(wanted)
    return engine


def _nodes(job: Job) -> tuple[list[str], str]:
    """The nodes that this is about, and the program that reaches them."""
    wanted = job.options
    named = wanted.nodes is not None or wanted.all
    whole = wanted.action in (UPGRADE, CHECK, UNINSTALL) and not named
    names: list[str] = []
    if wanted.nodes is not None:
        names = pdsh.expand(wanted.nodes, program=pdsh.tool(wanted.via))
    elif wanted.all:
        if job.engine == SLURM:
            names = slurmsite.all_nodes(job.site.slurm_bin)
        else:
            names = nodes.all_nodes(wanted.torque_home or options.TORQUE_HOME)
    elif whole:
        names = sorted(job.known, key=pdsh.natural)
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


def _check(job: Job) -> int:
    problems = job.front.check(b"")
    for line in problems:
        print(f"{job.front.prefix}: {line}")
    if not problems:
        print(f"{job.front.prefix}: vTorque {job.front.source.version}, all as installed")
    status = int(bool(problems))
    if job.engine == SLURM and job.front.is_there():
        status |= tell_slurm(job.front, job.site)
    if job.names and job.front.is_there():
        status |= finish(job, send(job, order_for(job, CHECK, job.site)))
    return status
