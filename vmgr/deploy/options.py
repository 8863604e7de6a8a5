"""The command line of `install.sh`, and the answers that stand in for it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Optional

from vmgr.deploy import answers, slurmfiles
from vmgr.deploy.hookfiles import MODES, WRAP
from vmgr.errors import Code, VTorqueError
from vmgr.pdsh import CLUSH, PDSH

PREFIX = "/opt/vtorque"
TORQUE_HOME = "/var/spool/torque"
FANOUT = 32
NODE_SECONDS = 900
TORQUE, SLURM = "torque", slurmfiles.MODE
_PATH = re.compile(r"(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)+")

INSTALL, UPGRADE, CHECK, UNINSTALL = "install", "upgrade", "check", "uninstall"


@dataclass
class Options:
    """What is asked for; None where nobody said."""

    action: str = INSTALL
    prefix: str = PREFIX
    nodes: Optional[str] = None
    all: bool = False
    engine: Optional[str] = None
    hooks: Optional[str] = None
    torque_home: Optional[str] = None
    prologalarm: Optional[str] = None
    forget: Optional[str] = None
    dry_run: bool = False
    yes: bool = False
    links: bool = True
    config: Optional[str] = None
    python: str = "/usr/bin/python3"
    wheels: Optional[str] = None
    via: Optional[str] = None
    fanout: int = FANOUT
    timeout: int = NODE_SECONDS


class _Parser(argparse.ArgumentParser):
    """Refuses with one line, as all of vTorque does."""

    def error(self, message: str) -> NoReturn:
        raise VTorqueError(message, code=Code.USAGE, hint="see ./install.sh --help")


_ANSWERS = {
    "prefix": str, "nodes": str, "all": bool, "engine": str, "hooks": str, "torque-home": str, "prologalarm": str,
    "links": bool, "config": str, "wheels": str, "via": str, "fanout": int, "timeout": int,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The options, each without a default, so that an answer can stand where none is given."""
    made = _Parser(
        prog="install.sh",
        usage="./install.sh [OPTION…]",
        description="Installs vTorque on this machine as root, and on the nodes of a cluster over pdsh and SSH.",
        epilog="Example: ./install.sh --nodes 'n[01-16],n20' --hooks wrap",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--prefix", metavar="DIR", help=f"where to (default {PREFIX}); it and all above must be writable by root alone")
    add("--nodes", metavar="SET", help="also on these nodes, such as n[01-16],n20; root reaches them over SSH")
    add("--all", action="store_true", help="also on all nodes that the batch system has")
    add("--engine", metavar="NAME", help="torque, or slurm: a new configuration says so (default: what it says)")
    add("--hooks", metavar="MODE", help="wrap: ours run the site's own (default); jobtype: ours for guest jobs only")
    add("--torque-home", metavar="DIR", help=f"TORQUE's folder on the nodes (default {TORQUE_HOME})")
    add("--prologalarm", metavar="DO", help="keep (default), or raise: give hooks the time that the timeouts need")
    add("--upgrade", action="store_true", help="bring up to date what is here, and on all nodes that have it")
    add("--check", action="store_true", help="verify what is installed here and on the nodes; changes nothing")
    add("--uninstall", action="store_true", help="take it all away again; with --nodes or --all, only from those nodes")
    add("--forget", metavar="SET", help="these nodes are gone for good: nothing is done for them any more")
    add("--dry-run", action="store_true", help="say what would be done, and change nothing")
    add("--yes", action="store_true", help="ask nothing")
    add("--answers", metavar="FILE", help=f"options from a file, as `key: value`: {', '.join(_ANSWERS)}")
    add("--no-links", dest="links", action="store_false", help="nothing outside of the prefix")
    add("--config", metavar="FILE", help="the configuration to start with (default contrib/vtorque.yaml)")
    add("--python", metavar="PROGRAM", help="the Python to run with, 3.9 or newer (default /usr/bin/python3)")
    add("--wheels", metavar="DIR", help="Python packages from this folder, nothing from the network")
    add("--via", metavar="PROGRAM", help="pdsh or clush (default: the first that is there)")
    add("--fanout", metavar="N", type=int, help=f"so many nodes at a time (default {FANOUT})")
    add("--timeout", metavar="S", type=int, help=f"seconds that one node may take (default {NODE_SECONDS})")
    return made


def read(argv: Sequence[str]) -> Options:
    """The options of a command line, checked. Raises VTorqueError: VT-USAGE, VT-VALUE, VT-KEY."""
    given = vars(parser().parse_args(argv))
    file = given.pop("answers", None)
    named = {name: f"--{name}" for name in (UPGRADE, CHECK, UNINSTALL) if given.pop(name, False)}
    if len(named) > 1:
        raise VTorqueError(f"{' and '.join(named.values())} exclude each other", code=Code.USAGE)
    answered = _answers(file) if file is not None else {}
    if "nodes" in given or "all" in given:  # the command line says which
        answered.pop("nodes", None)
        answered.pop("all", None)
    options = Options(next(iter(named), INSTALL), **{**answered, **given})
    options.prefix = options.prefix.rstrip("/")  # as shells complete names
    options.torque_home = options.torque_home and options.torque_home.rstrip("/")
    _check(options)
    return options


def _answers(file: str) -> dict[str, object]:
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            data = stream.read(answers.MAX_BYTES + 1)
    except OSError as err:
        raise VTorqueError(f"--answers {file}: {err.strerror}", code=Code.VALUE) from err
    if len(data) > answers.MAX_BYTES:
        raise VTorqueError(f"--answers {file}: more than {answers.MAX_BYTES} bytes", code=Code.VALUE)
    found = answers.parse(data.decode("utf-8", "replace"), file, _ANSWERS)
    return {key.replace("-", "_"): value for key, value in found.items()}


def _check(options: Options) -> None:
    for name, value in (("prefix", options.prefix), ("torque-home", options.torque_home)):
        if value is not None and (not _PATH.fullmatch(value) or "/.." in value):
            raise VTorqueError(
                f"--{name} {value}", code=Code.VALUE, hint="an absolute path of letters, digits, . _ and - is needed"
            )
    for name, value, allowed in (
        ("engine", options.engine or TORQUE, (TORQUE, SLURM)),
        ("hooks", options.hooks or WRAP, MODES),
        ("prologalarm", options.prologalarm or "keep", ("keep", "raise")),
        ("via", options.via or PDSH, (PDSH, CLUSH)),
    ):
        if value not in allowed:
            raise VTorqueError(f"--{name} {value}", code=Code.VALUE, hint=f"{' or '.join(allowed)} is needed")
    for name, number, most in (("fanout", options.fanout, 512), ("timeout", options.timeout, 86400)):
        if not 1 <= number <= most:
            raise VTorqueError(f"--{name} {number}", code=Code.VALUE, hint=f"1 to {most} is needed")
    for name, value in (("config", options.config), ("wheels", options.wheels)):
        if value is not None and not os.access(value, os.R_OK):
            raise VTorqueError(f"--{name} {value} cannot be read", code=Code.VALUE)
    if options.wheels is not None:
        if not Path(options.wheels).is_dir():
            raise VTorqueError(f"--wheels {options.wheels} is no folder", code=Code.VALUE)
        options.wheels = os.path.realpath(options.wheels)
    if options.nodes is not None and options.all:
        raise VTorqueError("--nodes and --all exclude each other", code=Code.USAGE)
    if options.engine == SLURM:
        refuse_moms(options)


def refuse_moms(options: Options) -> None:
    """Refuse what is about moms, which Slurm has not. Raises VTorqueError (VT-USAGE)."""
    given = {"hooks": options.hooks, "prologalarm": options.prologalarm, "torque-home": options.torque_home}
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if named:
        raise VTorqueError(
            f"{', '.join(named)}: the engine is slurm, which has no mom", code=Code.USAGE, hint="leave it out"
        )


def may_ask(options: Options) -> bool:
    """Whether somebody is there to answer."""
    return not (options.yes or options.dry_run) and sys.stdin.isatty() and sys.stderr.isatty()
