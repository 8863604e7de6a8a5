"""Slurm on a node: its Prolog and Epilog are ours, have the time that they need, and have not drained the node.

Facts from slurm.conf(5) and scontrol(1) of Slurm 22.05, and seen there: `scontrol show config` tells what holds, a line
`NAME = VALUE` for each (24.05 and newer number the Prologs, `Prolog[0] = PATH`); `(null)` is nothing, a time of 65534
none; `PrologFlags` that imply `Alloc` are Contain, X11 and RunInJob. A hook that fails, or takes longer than
`PrologEpilogTimeout`, drains its node with a reason that names it, perhaps behind one that is there already and
` : `. Since 25.05 `EpilogTimeout` and `PrologTimeout` are told in place of `PrologEpilogTimeout` where they differ.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Optional

from vmgr.config import Timeouts
from vmgr.deploy.slurmconf import (
    ALLOC,
    CONTAIN,
    TRACKER,
    Value,
    commands_folder,
    flags_of,
    parse_settings,
    tracks_groups,
)
from vmgr.deploy.slurmfiles import FLAGS, conf_lines
from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.doctor.hooks import judge_hook
from vmgr.doctor.run import run
from vmgr.errors import VTorqueError
from vmgr.node.slurmgroups import group_paths, slurms_root
from vmgr.trust import check_trusted

NO_LIMIT = 65534
COMMANDS = ("sbatch", "srun", "squeue", "sinfo")
_PASSED = ("SLURM_CONF", "SLURM_CONF_SERVER")
_OF_HOOKS = re.compile(r"(?:^|:)\s*(prolog|epilog)", re.IGNORECASE)
_EPILOG_TIMES = ("EpilogTimeout", "PrologEpilogTimeout")

_find = finder("batch system")


def check(node: Node) -> Iterator[Finding]:
    scontrol = _scontrol(node)
    if scontrol is None:
        yield _find(Level.WARNING, "slurm.bin names no folder for this host", "add a pattern that fits it")
        return
    if not os.access(scontrol, os.X_OK):
        yield _find(
            Level.NOTE, f"there is no {scontrol} (slurm.bin): hooks and nodes are not looked at",
            "set slurm.bin where Slurm's commands lie elsewhere",
        )  # fmt: skip
        return
    yield from _judge_commands(Path(scontrol).parent)
    told = run([scontrol, "show", "config"], passed=_PASSED)
    if told.status != 0:
        yield _find(Level.WARNING, f"Slurm does not tell its configuration: {told.reason}", "is slurmctld running?")
        return
    settings = parse_settings(told.out)
    yield from judge_hooks(settings, node)
    yield from judge_flags(settings.get("PrologFlags", ()))
    yield from judge_groups(settings, os.uname().nodename)
    yield from judge_timeout(settings, node.config.timeouts)
    nodes = run([scontrol, "-o", "show", "nodes"], passed=_PASSED)
    if nodes.status != 0:
        yield _find(Level.WARNING, f"Slurm does not tell its nodes: {nodes.reason}", "is slurmctld running?")
        return
    yield from judge_state(nodes.out, os.uname().nodename)


def _judge_commands(folder: Path) -> Iterator[Finding]:
    """Whether the other commands of Slurm's are there that vsub submits with, and vmgr asks."""
    lacking = [name for name in COMMANDS if not os.access(folder / name, os.X_OK)]
    if lacking:
        yield _find(
            Level.WARNING, f"{folder} (slurm.bin) has no {', '.join(lacking)}: vsub and vmgr on this host need them",
            "install Slurm's client commands here",
        )  # fmt: skip


def _scontrol(node: Node) -> Optional[str]:
    folder = commands_folder(node.config.slurm_bin, os.uname().nodename)
    return f"{folder}/scontrol" if folder else None


def judge_hooks(settings: Mapping[str, tuple[str, ...]], node: Node) -> Iterator[Finding]:
    """Whether Prolog and Epilog are ours, or call ours; of the TaskProlog, which a job can do without, a note."""
    folder = f"{node.install.prefix}/share/vtorque/mom_priv_hooks/slurm"
    lines = dict(line.split("=", 1) for line in conf_lines(folder))
    program = node.install.program("vtorque-hook")
    for name in ("Prolog", "Epilog"):
        paths = [path for pattern in settings.get(name, ()) for path in _files(pattern)]
        ours = [path for path in paths if _calls(path, (program, "mom_priv_hooks/slurm/"))]
        remedy = f"add {name}={lines[name]} to slurm.conf, or have the site's own call that; then scontrol reconfigure"
        if ours:
            yield from judge_hook(Path(ours[0]), program)
        elif paths:
            yield _find(Level.FAILURE, f"{name} ({', '.join(paths)}) does not call {program}", remedy)
        else:
            yield _find(Level.FAILURE, f"Slurm has no {name}: guest jobs end with VT-AGENT", remedy)
        yield from _judge_trust(name, (path for path in paths if path not in ours[:1]))
    yield from _judge_task_prolog(settings.get("TaskProlog", ()), lines["TaskProlog"])


def _judge_task_prolog(values: Sequence[str], ours: str) -> Iterator[Finding]:
    if any(os.path.realpath(path) == os.path.realpath(ours) or _calls(path, (ours,)) for path in values):
        return
    what = f"TaskProlog ({', '.join(values)}) does not call ours" if values else "Slurm has no TaskProlog"
    yield _find(
        Level.NOTE, f"{what}: scripts for qsub find no PBS_JOBID and the like in jobs without guests",
        f"add TaskProlog={ours} to slurm.conf, or have the site's own call that; then scontrol reconfigure",
    )  # fmt: skip


def _files(pattern: str) -> list[str]:
    """The files of a pattern of glob(7); itself where there are none."""
    found = sorted(os.fspath(path) for path in Path("/").glob(pattern[1:])) if pattern.startswith("/") else []
    return found or [pattern]


def _judge_trust(name: str, paths: Iterable[str]) -> Iterator[Finding]:
    """The site's own hooks beside ours: who can write them is root on the node."""
    for path in paths:
        try:
            check_trusted(path)
        except VTorqueError as err:
            yield _find(Level.WARNING, f"{name} {path}: {err.message}", err.hint or f"take {path} out of slurm.conf")


def _calls(path: str, words: Iterable[str]) -> bool:
    try:
        with open(path, "rb") as stream:
            text = stream.read(1 << 20)
    except OSError:
        return False
    return any(word.encode() in text for word in words)


def judge_flags(values: Iterable[str]) -> Iterator[Finding]:
    """Whether a Prolog runs on every node of a job, before the job."""
    flags = flags_of(map(Value, values))
    remedy = f"set PrologFlags={','.join(FLAGS)} in slurm.conf; then scontrol reconfigure"
    if not flags & set(ALLOC):
        yield _find(
            Level.FAILURE, "PrologFlags has no Alloc: on all but the first node of a job no Prolog runs, and no guests",
            remedy,
        )  # fmt: skip
    elif "deferbatch" not in flags:
        yield _find(
            Level.NOTE, "PrologFlags has no DeferBatch: a job whose Prolog fails on a node has begun on another", remedy
        )
    else:
        yield _find(Level.OK, f"PrologFlags is {','.join(sorted(flags))}")


def judge_groups(settings: Mapping[str, tuple[str, ...]], host: str) -> Iterator[Finding]:
    """Whether guests are in the control groups of their job, where Slurm makes some."""
    if not tracks_groups([Value(value) for value in settings.get("ProctrackType", ())]):
        return
    flags = flags_of(map(Value, settings.get("PrologFlags", ())))
    if not flags & set(CONTAIN):
        yield _find(
            Level.WARNING, f"ProctrackType is {TRACKER}, and PrologFlags has no Contain: guests are not in the control "
            "groups of their job, whose bounds do not hold for them",
            f"set PrologFlags=Contain,{FLAGS[1]} in slurm.conf, and restart slurmctld and slurmd",
        )  # fmt: skip
    elif "runinjob" in flags:
        yield _find(
            Level.WARNING, "PrologFlags has RunInJob: node agents are in the job's control groups, and guests die with "
            "the first signal to their job",
            f"set PrologFlags=Contain,{FLAGS[1]} in slurm.conf, and restart slurmctld and slurmd",
        )  # fmt: skip
    elif slurms_root(group_paths(host.partition(".")[0], 0, 0, None)) is not None:
        yield _find(Level.OK, "guests are in the control groups of their job")
    else:
        yield _find(
            Level.WARNING, f"ProctrackType is {TRACKER}, and slurmd's control groups are not where they are looked for",
            "is slurmd running here? CgroupSlice of cgroup.conf must be system.slice, its default",
        )  # fmt: skip


def judge_timeout(settings: Mapping[str, tuple[str, ...]], timeouts: Timeouts) -> Iterator[Finding]:
    """Whether an Epilog may wait as long as it does where a guest has a persistent disk, or a job has other nodes."""
    name = next((name for name in _EPILOG_TIMES if settings.get(name)), _EPILOG_TIMES[-1])
    values = settings.get(name, ())
    seconds = next((int(match[1]) for value in values for match in [re.match(r"([0-9]{1,9})\b", value)] if match), None)
    needed, key = max((timeouts.disk, "timeouts.disk"), (timeouts.sisters, "timeouts.sisters"))
    if seconds is None or seconds == NO_LIMIT:
        yield _find(Level.OK, f"{name} is not set: hooks have all the time that they take")
    elif seconds <= needed:
        yield _find(
            Level.FAILURE, f"{key} is {needed} s, {name} {seconds} s: an Epilog that waits so long is killed, and its "
            "node drained",
            f"set {key} below {seconds}, or {name} above {needed}",
        )  # fmt: skip
    else:
        yield _find(Level.OK, f"{name} is {seconds} s, {key} {needed} s")


def judge_state(text: str, host: str) -> Iterator[Finding]:
    """What Slurm says of this node in the output of `scontrol -o show nodes`."""
    names = (host, host.partition(".")[0])
    for line in text.splitlines():
        fields = dict(re.findall(r"(?:^| )([A-Za-z]+)=(\S*)", line))
        if fields.get("NodeName") in names or fields.get("NodeHostName") in names:
            yield _judge_node(fields["NodeName"], fields.get("State", ""), _reason(line))
            return
    yield _find(
        Level.NOTE, f"{host} is no node of Slurm's: it runs no jobs",
        "a front end is none; else add its NodeName or NodeHostname to slurm.conf",
    )  # fmt: skip


def _reason(line: str) -> str:
    match = re.search(r" Reason=(.*?)(?: [A-Za-z]+=.*)?$", line)
    return match[1].strip() if match else ""


def _judge_node(name: str, state: str, reason: str) -> Finding:
    if "DRAIN" not in state and "DOWN" not in state and "FAIL" not in state:
        return _find(Level.OK, f"the node {name} is {state.lower()}")
    if _OF_HOOKS.search(reason):
        return _find(
            Level.FAILURE, f"the node {name} is {state.lower()}: {reason}",
            "vTorque's hooks end with 0: look for the site's own, or PrologEpilogTimeout, in slurmd's log; then "
            f"scontrol update nodename={name} state=resume",
        )  # fmt: skip
    return _find(
        Level.WARNING, f"the node {name} is {state.lower()}{': ' + reason if reason else ''}",
        f"scontrol update nodename={name} state=resume, once it is in order",
    )  # fmt: skip
