"""What a site's slurm.conf says of the lines that we need: read from its text or from Slurm's answer, and judged.

Pure, and with nothing but the standard library. Facts from slurm.conf(5) and scontrol(1) of Slurm 22.05, and seen
there: a line has `Key=Value` once or more, keys in any case, values perhaps in double quotes; `#` begins a comment
unless a backslash is before it, a backslash at the end of a line goes on in the next one; `Include FILE` stands for a
file's lines, relative to the folder of slurm.conf; of a key that is there twice the last value holds, but of `Prolog`
and `Epilog` all of them since 24.05. `scontrol show config` tells a line `NAME = VALUE` for each (numbered since then,
`Prolog[0] = PATH`), where `(null)` is nothing. Of `PrologFlags`, Contain, X11 and RunInJob imply `Alloc`; with them,
where `ProctrackType` is proctrack/cgroup, Slurm makes control groups for a job on each of its nodes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Callable, NamedTuple, Union

from vmgr.deploy.slurmfiles import FLAGS, conf_lines

MAX_FILES = 64
ALLOC = ("alloc", "contain", "x11", "runinjob")
"""Flags of a Prolog that runs on every node of a job, in lower case."""
CONTAIN = ("contain", "x11", "runinjob")
"""Flags with which a job has something of its own on each of its nodes from its start, in lower case."""
TRACKER = "proctrack/cgroup"
THERE, MISSING, DIFFERENT = "there", "missing", "different"

_SETTING = re.compile(r"^([A-Za-z]+)(?:\[[0-9]+\])?\s*=\s?(.*?)\s*$", re.MULTILINE)
_INCLUDE = re.compile(r"\s*include\s+(\S+)\s*", re.IGNORECASE)
_PAIR = re.compile(r'\s*([A-Za-z0-9_.]+)\s*[-*+/]?=\s*(?:"([^"]*)"|([^\s"]\S*))(?=\s|$)')
_COMMENT = re.compile(r"(?<!\\)#.*")
_BROAD = re.compile(r"[*?\[%]")
_SEVERAL = ("prolog", "epilog")


class Value(NamedTuple):
    """A value of a setting, and where it stands; nothing where Slurm itself told it."""

    text: str
    where: str = ""


Settings = Mapping[str, Sequence[Value]]
"""Values by the names of settings in lower case."""


class Judged(NamedTuple):
    """A line that is needed, whether it is there, and why not; `bad` keeps guest jobs from running."""

    line: str
    state: str
    why: str
    bad: bool

    def __str__(self) -> str:
        return f"{self.line} is {self.state}{': ' if self.why else ''}{self.why}"


def parse_settings(text: str) -> dict[str, tuple[str, ...]]:
    """Each setting of `scontrol show config` with its values, none for one that is not set."""
    found: dict[str, tuple[str, ...]] = {}
    for name, value in _SETTING.findall(text):
        found[name] = (*found.get(name, ()), *(() if value in ("", "(null)") else (value,)))
    return found


def told(text: str) -> Settings:
    """The settings in what `scontrol show config` prints."""
    return {name.lower(): [Value(value) for value in values] for name, values in parse_settings(text).items()}


def parse_file(path: str, read: Callable[[str], str]) -> Settings:
    """The settings of a slurm.conf and of what it includes; `read` gives a file's text.

    Raises ValueError with file and line for a line that is none, a file that is included and cannot be read (OSError
    of `read`) or has a pattern for a name, and more than MAX_FILES files. Raises OSError for slurm.conf itself.
    """
    found: dict[str, list[Value]] = {}
    count = 0

    def take(name: str, text: str) -> None:
        nonlocal count
        count += 1
        for number, line in _lines(text):
            where = f"{name} line {number}"
            include = _INCLUDE.fullmatch(line)
            if include is None:
                for key, value in _pairs(line, where):
                    earlier = found.get(key, []) if key in _SEVERAL else []
                    found[key] = [*earlier, Value(value, where)]
                continue
            inner = os.path.join(os.path.dirname(path), include[1])
            if _BROAD.search(inner) or count >= MAX_FILES:
                why = "a pattern" if _BROAD.search(inner) else f"file number {MAX_FILES + 1}"
                raise ValueError(f"{where}: Include {include[1]} is not followed: it is {why}")
            try:
                more = read(inner)
            except OSError as err:
                raise ValueError(f"{where}: Include {include[1]} cannot be read: {err.strerror or err}") from err
            take(inner, more)

    take(path, read(path))
    return found


def _lines(text: str) -> Iterable[tuple[int, str]]:
    """The lines that say something, put together where one goes on, with the number of their first."""
    whole, first = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        first = first if whole else number
        whole += _COMMENT.sub("", line.rstrip("\r"))
        if whole.endswith("\\"):
            whole = whole[:-1] + " "
            continue
        if whole.strip():
            yield first, whole
        whole = ""
    if whole.strip():
        yield first, whole


def _pairs(line: str, where: str) -> Iterable[tuple[str, str]]:
    """The keys of a line, in lower case, with their values; the first names it. Raises ValueError."""
    at = 0
    pairs: list[tuple[str, str]] = []
    while line[at:].strip():
        match = _PAIR.match(line, at)
        if match is None:
            raise ValueError(f"{where} is no line of slurm.conf")
        pairs.append((match[1].lower(), match[2] if match[2] is not None else match[3]))
        at = match.end()
    return pairs


def judge(folder: str, settings: Settings, calls: Callable[[str, str], bool]) -> list[Judged]:
    """What a site's settings say of each line for hooks in `folder`.

    `calls` tells of a program, or pattern of several, whether it comes to run our hook at a path.
    """
    found = []
    for line in conf_lines(folder):
        name, _, wanted = line.partition("=")
        values = settings.get(name.lower(), ())
        if name == "PrologFlags":
            found.append(_judge_flags(line, values, has_groups=tracks_groups(settings.get("proctracktype", ()))))
            continue
        optional = name == "TaskProlog"
        if not values:
            found.append(Judged(line, MISSING, "PBS_JOBID and the like in jobs without guests" if optional else "",
                                not optional))  # fmt: skip
        elif any(value.text == wanted for value in values):
            alone = f"before Slurm 24.05 {_shown(values[-1:])} would run alone"
            found.append(Judged(line, THERE, alone if _hidden(wanted, values) else "", False))
        elif any(calls(value.text, wanted) for value in values):
            found.append(Judged(line, THERE, f"by way of {_shown(values)}", False))
        else:
            found.append(Judged(line, DIFFERENT, f"it is {_shown(values)}", not optional))
    return found


def _hidden(wanted: str, values: Sequence[Value]) -> bool:
    """Whether a line of a file has another one of its kind behind it."""
    return values[-1].text != wanted and bool(values[-1].where)


def flags_of(values: Iterable[Value]) -> frozenset[str]:
    """The flags in the values of `PrologFlags`, in lower case."""
    return frozenset(flag.strip().lower() for value in values for flag in value.text.split(","))


def tracks_groups(values: Sequence[Value]) -> bool:
    """Whether the values of `ProctrackType` say that Slurm has its jobs in control groups."""
    return [value.text.lower() for value in values] == [TRACKER]


def _judge_flags(line: str, values: Sequence[Value], *, has_groups: bool) -> Judged:
    """Where Slurm has its jobs in control groups, guests are in them with Contain only: then that is asked for."""
    flags = flags_of(values)
    contains = bool(flags & set(CONTAIN))
    if has_groups and not contains:
        line = f"PrologFlags=Contain,{FLAGS[1]}"
    if not values:
        return Judged(line, MISSING, "", True)
    alloc, deferred = bool(flags & set(ALLOC)), FLAGS[1].lower() in flags
    if has_groups and not contains:
        return Judged(line, DIFFERENT, f"it is {_shown(values)}, and guests are not in control groups", not alloc)
    if {flag.lower() for flag in FLAGS} <= flags:
        return Judged(line, THERE, "", False)
    if alloc and deferred:
        return Judged(line, THERE, f"it is {_shown(values)}", False)
    return Judged(line, DIFFERENT, f"it is {_shown(values)}", not alloc)


def _shown(values: Sequence[Value]) -> str:
    return ", ".join(f"{value.text} ({value.where})" if value.where else value.text for value in values)


def commands_folder(value: Union[str, Mapping[str, str]], host: str) -> str:
    """The folder of Slurm's commands on a host, of `slurm.bin`; empty where no pattern fits."""
    if not isinstance(value, str):
        names = (host, host.partition(".")[0])
        value = next((each for name, each in value.items() if any(fnmatchcase(n, name) for n in names)), "")
    return value.rstrip("/")
