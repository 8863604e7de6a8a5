"""Where a job's output goes on Slurm: the paths of `qsub -o`, `-e`, `-j` and `-k` as patterns of file names.

TORQUE brings output home at the job's end, under `NAME.oID` and `NAME.eID` unless told otherwise; Slurm writes it as
it comes, so that the pattern is the whole path. In a pattern `%j` is the job's id, `%A` that of an array, `%a` a
member's index (4294967294 outside of arrays), `%%` a per cent sign; a backslash anywhere would switch all of that off
(sbatch(1)).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vsub.engines.slurmoptions import ForSbatch
from vsub.engines.slurmrequest import without_counterpart
from vsub.options import SBATCH, Option

_VARIABLE = r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))"
_OF_MEMBERS = ("PBS_ARRAYID", "PBS_ARRAY_INDEX")
_PATTERNS = {"PBS_JOBID": "%j", **dict.fromkeys(_OF_MEMBERS, "%a")}


class Place(NamedTuple):
    """What paths are made of: the job's name, its folder, the user's home and name, the host's names.

    `is_array` says whether the job is an array, `is_folder` whether a path is one.
    """

    job_name: str
    folder: str
    home: str
    user: str
    hosts: tuple[str, ...]
    is_array: bool
    is_folder: Callable[[str], bool]


class Output(NamedTuple):
    """The options that count, of either language; `join` and `keep` are qsub's."""

    output: Optional[Option] = None
    error: Optional[Option] = None
    join: Optional[Option] = None
    keep: Optional[Option] = None


def patterns(asked: Output, place: Place) -> dict[str, tuple[str, str]]:
    """Pattern and source of `output` and, unless it goes there too, `error`. Raises VTorqueError."""
    found = _patterns(asked, place)
    for path, source in found.values():
        if "\\" in path and not isinstance(source, ForSbatch):
            raise VTorqueError(
                f"output cannot go to {path[:80]!r} ({source}): Slurm takes a backslash for its own", code=Code.USAGE,
                hint="submit from another folder, or write -o /PATH -j oe",
            )  # fmt: skip
    return found


def _patterns(asked: Output, place: Place) -> dict[str, tuple[str, str]]:
    join = _choice(asked.join, ("oe", "eo", "n"))
    keep = _choice(asked.keep, ("o", "e", "oe", "eo", "n"))
    output = _pattern("o", asked.output, asked.keep if "o" in keep else None, place)
    error = _pattern("e", asked.error, asked.keep if "e" in keep else None, place)
    if join in ("oe", "eo"):
        return {"output": output if join == "oe" else error}
    of_slurm = asked.output is not None and asked.output.letter == SBATCH
    if of_slurm and asked.error is None and asked.join is None and "e" not in keep:
        return {"output": output}  # to Slurm one file is for both, unless there is another
    return {"output": output, "error": error}


def _choice(option: Optional[Option], allowed: tuple[str, ...]) -> str:
    """The value of an option, `` for none. Raises VTorqueError (VT-USAGE)."""
    if option is None:
        return ""
    if option.value not in allowed:
        raise VTorqueError(
            f"{option} ({option.source}) cannot be read", code=Code.USAGE, hint=f"allowed: {', '.join(allowed)}"
        )
    return option.value


def _pattern(letter: str, option: Optional[Option], keep: Optional[Option], place: Place) -> tuple[str, str]:
    default = f"{literal(place.job_name)}.{letter}" + ("%A-%a" if place.is_array else "%j")
    if keep is not None:
        return f"{literal(place.home)}/{default}", keep.source
    if option is None:
        return f"{literal(place.folder.rstrip('/'))}/{default}", "as of qsub"
    if option.letter == SBATCH:
        return (option.value or "").partition("=")[2], option.source
    path = _path(option, place)
    if path.endswith("/") or place.is_folder(path.replace("%%", "%")):
        path = f"{path.rstrip('/')}/{default}"
    return path, option.source


def _path(option: Option, place: Place) -> str:
    """The absolute path in `[host:]path`, as a pattern. Raises VTorqueError (VT-OPTION, VT-USAGE)."""
    path = option.value or ""
    head, colon, rest = path.partition(":")
    if colon and "/" not in head:
        if head not in (*place.hosts, "localhost", ""):
            raise without_counterpart(option, f"output is written by the job's node, not on {head}")
        path = rest
    if path.startswith("~/"):
        path = place.home + path[1:]
    if not path or "\\" in path or any(ord(char) < 32 for char in path):
        raise VTorqueError(f"{option} ({option.source}) names no path", code=Code.USAGE, hint="write -o /PATH")
    known = {
        "HOME": place.home, "PBS_O_HOME": place.home, "USER": place.user, "LOGNAME": place.user,
        "PBS_O_LOGNAME": place.user, "PBS_O_WORKDIR": place.folder, "PBS_JOBNAME": place.job_name,
        **({} if place.is_array else dict.fromkeys(_OF_MEMBERS, "")),
    }  # fmt: skip
    found, at = "", 0
    for match in re.finditer(_VARIABLE, path):
        found += literal(path[at : match.start()]) + _variable(match[1] or match[2], known, option)
        at = match.end()
    found += literal(path[at:])
    return found if found.startswith("/") else f"{literal(place.folder.rstrip('/'))}/{found}"


def _variable(name: str, known: Mapping[str, str], option: Option) -> str:
    if name in known:
        return literal(known[name])
    if name not in _PATTERNS:
        raise without_counterpart(option, f"the variable {name} is not known before the job runs")
    return _PATTERNS[name]


def literal(text: str) -> str:
    """A text that stands for itself in a pattern."""
    return text.replace("%", "%%")
