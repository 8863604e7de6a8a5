"""The options of Slurm's `sbatch`, read as getopt_long(3) reads them, and what becomes of each in a guest job.

Names, short forms and which options have values: sbatch(1) of Slurm 22.05 to 26.05. What a cluster's own version does
not have is refused by its sbatch. Options that qsub has as well become qsub's, so that the plan of a job need know only
those; the others stay as they are, under the letter `SBATCH`, one `--name` or `--name=value` each. Abbreviated names,
which mean other things in other versions, are not taken.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vsub.options import COMMAND_LINE, DRY_RUN, SBATCH, Option

OWN = ("--explain", DRY_RUN, "--json", "--debug")
"""Our own words that no option of sbatch is called by."""


EXPEDITE = "expedite"
"""What `--requeue` may say beside nothing, since Slurm 25.11."""

MAX_STEPS = 512
"""So many members of an array may be asked for by a range with a step."""
_STEPS = r"([0-9]{1,7})-([0-9]{1,7}):([0-9]{1,7})"

USAGE = "options of sbatch stand behind --slurm, those of qsub and vsub before it; see man sbatch, vsub --help"
"""What to do about an option that is not known."""


class ForSbatch(str):
    """The source of an option that was written for sbatch, whatever letter it has now."""


class Takes(enum.Enum):
    """Whether an option has a value: never, always, or only in the form `--name=value`."""

    NOTHING = 0
    VALUE = 1
    PERHAPS = 2


class Sbatch(NamedTuple):
    """One option. `letter` is qsub's for the same, `refused` why a guest job cannot have it, `only_sbatch` is set for
    those that `srun` has not.
    """

    takes: Takes
    letter: Optional[str] = None
    refused: Optional[str] = None
    only_sbatch: bool = False


_N, _V, _P = Takes.NOTHING, Takes.VALUE, Takes.PERHAPS
_GPU = "guests get no GPUs of the node"
_LAYOUT = "say --nodes, --ntasks-per-node and --cpus-per-task"
_OWN_USER = "a guest job is submitted by its own user"
_PLACES = "vCPUs are placed by -vm vcpu_pinning"
_NO_TASKS = "there are no tasks of Slurm's in a guest"
_IN_GUEST = "the job runs in a guest"

TABLE: dict[str, Sbatch] = {
    "account": Sbatch(_V, "A"),
    "acctg-freq": Sbatch(_V),
    "array": Sbatch(_V, "t", only_sbatch=True),
    "autocomplete": Sbatch(_V, refused="say sbatch --autocomplete"),
    "batch": Sbatch(_V, refused="the job begins on its first node", only_sbatch=True),
    "bb": Sbatch(_V),
    "bbf": Sbatch(_V),
    "begin": Sbatch(_V),
    "chdir": Sbatch(_V, "w"),
    "cluster-constraint": Sbatch(_V, refused="the job is submitted to one cluster", only_sbatch=True),
    "clusters": Sbatch(_V, refused="the job is submitted to one cluster"),
    "comment": Sbatch(_V),
    "constraint": Sbatch(_V),
    "consolidate-segments": Sbatch(_N),
    "container": Sbatch(_V, refused=_IN_GUEST),
    "container-id": Sbatch(_V, refused=_IN_GUEST),
    "container-type": Sbatch(_V, refused=_IN_GUEST),
    "contiguous": Sbatch(_N),
    "core-spec": Sbatch(_V, refused="cores of the host are kept by the site's resources.host_cores"),
    "cores-per-socket": Sbatch(_V, refused=_LAYOUT),
    "cpu-freq": Sbatch(_V),
    "cpus-per-gpu": Sbatch(_V, refused=_GPU),
    "cpus-per-task": Sbatch(_V),
    "deadline": Sbatch(_V),
    "delay-boot": Sbatch(_V),
    "dependency": Sbatch(_V),
    "distribution": Sbatch(_V, refused=_NO_TASKS),
    "error": Sbatch(_V),
    "exclude": Sbatch(_V),
    "exclusive": Sbatch(_P),
    "export": Sbatch(_V),
    "export-file": Sbatch(_V, refused="say -v or --export", only_sbatch=True),
    "external": Sbatch(_N, refused="the job's script runs in its first guest", only_sbatch=True),
    "extra": Sbatch(_V),
    "extra-node-info": Sbatch(_V, refused=_LAYOUT),
    "get-user-env": Sbatch(_P, refused="the guest's login shell has that environment", only_sbatch=True),
    "gid": Sbatch(_V, refused=_OWN_USER, only_sbatch=True),
    "gpu-bind": Sbatch(_V, refused=_GPU),
    "gpu-freq": Sbatch(_V, refused=_GPU),
    "gpus": Sbatch(_V, refused=_GPU),
    "gpus-per-node": Sbatch(_V, refused=_GPU),
    "gpus-per-socket": Sbatch(_V, refused=_GPU),
    "gpus-per-task": Sbatch(_V, refused=_GPU),
    "gres": Sbatch(_V),
    "gres-flags": Sbatch(_V),
    "help": Sbatch(_N, refused="say sbatch --help"),
    "hint": Sbatch(_V, refused=_PLACES),
    "hold": Sbatch(_N, "h"),
    "ignore-pbs": Sbatch(_N, refused="say -C '' before --slurm", only_sbatch=True),
    "input": Sbatch(_V, refused="the standard input of a job is not passed on to its guest"),
    "job-name": Sbatch(_V, "N"),
    "kill-on-invalid-dep": Sbatch(_V, only_sbatch=True),
    "licenses": Sbatch(_V),
    "mail-type": Sbatch(_V),
    "mail-user": Sbatch(_V),
    "mcs-label": Sbatch(_V),
    "mem": Sbatch(_V),
    "mem-bind": Sbatch(_V, refused=_PLACES),
    "mem-per-cpu": Sbatch(_V),
    "mem-per-gpu": Sbatch(_V, refused=_GPU),
    "mem-update": Sbatch(_V, refused="guests keep the memory that they begin with"),
    "mincpus": Sbatch(_V, refused=_LAYOUT),
    "network": Sbatch(_V),
    "nice": Sbatch(_P),
    "no-kill": Sbatch(_P, refused="a guest job needs all of its nodes"),
    "no-requeue": Sbatch(_N, only_sbatch=True),
    "nodefile": Sbatch(_V, refused="say --nodelist", only_sbatch=True),
    "nodelist": Sbatch(_V),
    "nodes": Sbatch(_V),
    "ntasks": Sbatch(_V),
    "ntasks-per-core": Sbatch(_V, refused=_LAYOUT),
    "ntasks-per-gpu": Sbatch(_V, refused=_GPU),
    "ntasks-per-node": Sbatch(_V),
    "ntasks-per-socket": Sbatch(_V, refused=_LAYOUT),
    "oom-kill-step": Sbatch(_P),
    "open-mode": Sbatch(_V),
    "output": Sbatch(_V),
    "overcommit": Sbatch(_N, refused="guests need the processors that they ask for"),
    "oversubscribe": Sbatch(_N),
    "parsable": Sbatch(_N, only_sbatch=True),
    "partition": Sbatch(_V, "q"),
    "power": Sbatch(_V),
    "prefer": Sbatch(_V),
    "priority": Sbatch(_V),
    "profile": Sbatch(_V),
    "propagate": Sbatch(_P),
    "qos": Sbatch(_V),
    "quiet": Sbatch(_N),
    "reboot": Sbatch(_N),
    "requeue": Sbatch(_P, only_sbatch=True),
    "reservation": Sbatch(_V),
    "resources": Sbatch(_V),
    "resv-ports": Sbatch(_P, refused="ports of the node are not those of its guests"),
    "segment": Sbatch(_V),
    "signal": Sbatch(_V),
    "sockets-per-node": Sbatch(_V, refused=_LAYOUT),
    "spread-job": Sbatch(_N),
    "spread-segments": Sbatch(_N),
    "stepmgr": Sbatch(_N, refused=_NO_TASKS),
    "switches": Sbatch(_V),
    "test-only": Sbatch(_N, refused="say --dry-run before --slurm"),
    "thread-spec": Sbatch(_V, refused="cores of the host are kept by the site's resources.host_cores"),
    "threads-per-core": Sbatch(_V, refused=_LAYOUT),
    "time": Sbatch(_V),
    "time-min": Sbatch(_V),
    "tmp": Sbatch(_V),
    "tres-bind": Sbatch(_V, refused=_NO_TASKS),
    "tres-per-task": Sbatch(_V, refused=_LAYOUT),
    "uid": Sbatch(_V, refused=_OWN_USER, only_sbatch=True),
    "usage": Sbatch(_N, refused="say sbatch --usage"),
    "use-min-nodes": Sbatch(_N),
    "verbose": Sbatch(_N),
    "version": Sbatch(_N, refused="say sbatch --version"),
    "wait": Sbatch(_N, refused="say --wait before --slurm"),
    "wait-all-nodes": Sbatch(_V, refused="the job waits for all of its nodes", only_sbatch=True),
    "wckey": Sbatch(_V),
    "wrap": Sbatch(_V, refused="put the command into a script", only_sbatch=True),
}
"""Every option by its whole name."""

_OTHER_NAMES = {"tasks": "ntasks", "tasks-per-node": "ntasks-per-node", "share": "oversubscribe", "workdir": "chdir"}
SHORT = {
    "A": "account", "a": "array", "b": "begin", "C": "constraint", "c": "cpus-per-task", "d": "dependency",
    "D": "chdir", "e": "error", "B": "extra-node-info", "F": "nodefile", "G": "gpus", "h": "help", "H": "hold",
    "i": "input", "J": "job-name", "k": "no-kill", "L": "licenses", "m": "distribution", "M": "clusters", "n": "ntasks",
    "N": "nodes", "o": "output", "O": "overcommit", "p": "partition", "q": "qos", "Q": "quiet", "s": "oversubscribe",
    "S": "core-spec", "t": "time", "v": "verbose", "V": "version", "w": "nodelist", "W": "wait", "x": "exclude",
}  # fmt: skip

_VARIABLES = {
    "ACCOUNT": "account", "ACCTG_FREQ": "acctg-freq", "ARRAY_INX": "array", "BATCH": "batch", "BURST_BUFFER": "bb",
    "CLUSTER_CONSTRAINT": "cluster-constraint", "CLUSTERS": "clusters", "CONSOLIDATE_SEGMENTS": "consolidate-segments",
    "CONSTRAINT": "constraint", "CONTAINER": "container", "CONTAINER_ID": "container-id",
    "CONTAINER_TYPE": "container-type", "CORE_SPEC": "core-spec", "CPU_FREQ_REQ": "cpu-freq",
    "CPUS_PER_GPU": "cpus-per-gpu", "DELAY_BOOT": "delay-boot", "DISTRIBUTION": "distribution", "ERROR": "error",
    "EXCLUSIVE": "exclusive", "EXPORT": "export", "GET_USER_ENV": "get-user-env", "GPU_BIND": "gpu-bind",
    "GPU_FREQ": "gpu-freq", "GPUS": "gpus", "GPUS_PER_NODE": "gpus-per-node", "GPUS_PER_SOCKET": "gpus-per-socket",
    "GPUS_PER_TASK": "gpus-per-task", "GRES": "gres", "GRES_FLAGS": "gres-flags", "HINT": "hint", "INPUT": "input",
    "JOB_NAME": "job-name", "MEM_BIND": "mem-bind", "MEM_PER_CPU": "mem-per-cpu", "MEM_PER_GPU": "mem-per-gpu",
    "MEM_PER_NODE": "mem", "NETWORK": "network", "NO_KILL": "no-kill", "NO_REQUEUE": "no-requeue",
    "OPEN_MODE": "open-mode", "OUTPUT": "output", "OVERCOMMIT": "overcommit", "PARTITION": "partition",
    "POWER": "power", "PROFILE": "profile", "QOS": "qos", "REQUEUE": "requeue", "RESERVATION": "reservation",
    "SEGMENT_SIZE": "segment", "SIGNAL": "signal", "SPREAD_JOB": "spread-job", "SPREAD_SEGMENTS": "spread-segments",
    "THREAD_SPEC": "thread-spec", "THREADS_PER_CORE": "threads-per-core", "TIMELIMIT": "time", "TRES_BIND": "tres-bind",
    "TRES_PER_TASK": "tres-per-task", "USE_MIN_NODES": "use-min-nodes", "WAIT": "wait",
    "WAIT_ALL_NODES": "wait-all-nodes", "WCKEY": "wckey",
}  # fmt: skip
"""What sbatch reads in `SBATCH_…`, beside the two of switches; debugging and `#PBS` lines are its own matter."""
_ALSO = {"CLUSTERS": "SLURM_CLUSTERS", "HINT": "SLURM_HINT"}
"""What it reads for the same, and takes first."""


class Parsed(NamedTuple):
    """Options of sbatch with what follows them; ours, which are taken out, and what is wrong, as in `Line`.

    `rest` are the words of the options as they were written, and everything from a word on that is not known.
    """

    options: tuple[Option, ...]
    operands: tuple[str, ...]
    vm: tuple[Option, ...]
    own: frozenset[str]
    rest: tuple[str, ...]
    problem: Optional[str]


def parse_sbatch(words: Sequence[str], source: str = COMMAND_LINE, *, own_words: bool = True) -> Parsed:
    """Take words of sbatch apart: options, then the script, whose arguments may look as they like.

    `own_words` is false for directives, where only `-vm` is ours. Raises VTorqueError (VT-USAGE) for a `-vm` without a
    value.
    """
    reader = _Reader(words, source, own_words)
    reader.run()
    return Parsed(
        tuple(reader.options), tuple(reader.operands), tuple(reader.vm), frozenset(reader.own), tuple(reader.rest),
        reader.problem,
    )  # fmt: skip


def from_environment(environ: Mapping[str, str]) -> list[Option]:
    """What the user's variables ask for; a flag is asked for by nothing, `yes` or a number but 0."""
    found = []
    for variable, name in _VARIABLES.items():
        names = (_ALSO.get(variable, ""), f"SBATCH_{variable}")
        read = next((each for each in names if each in environ), None)
        if read is None:
            continue
        value, source = environ[read], f"the variable {read}"
        if TABLE[name].takes is Takes.NOTHING or (name == "requeue" and value.lower() != EXPEDITE):
            if _is_set(value):
                found.append(as_option(name, None, source))
        elif TABLE[name].takes is Takes.VALUE or value:
            found.append(as_option(name, value, source))
        else:
            found.append(as_option(name, None, source))
    return [*found, *_switches(environ)]


def _switches(environ: Mapping[str, str]) -> list[Option]:
    """The option that two variables make together."""
    count, patience = environ.get("SBATCH_REQ_SWITCH"), environ.get("SBATCH_WAIT4SWITCH")
    if not count:
        return []
    value = f"{count}@{patience}" if patience else count
    return [as_option("switches", value, "the variable SBATCH_REQ_SWITCH")]


def _is_set(value: str) -> bool:
    number = value.strip().lstrip("+-")
    return value == "" or value.lower() == "yes" or (number.isdecimal() and int(number[:9]) != 0)


def as_option(name: str, value: Optional[str], source: str) -> Option:
    """An option of sbatch as one of qsub's where that has it; then its source tells how it was written."""
    written = f"--{name}" if value is None else f"--{name}={value}"
    if name in ("requeue", "no-requeue") and value is None:
        return Option("r", "y" if name == "requeue" else "n", ForSbatch(f"{written}, {source}"))
    letter = TABLE[name].letter
    if letter == "t":
        value = re.sub(_STEPS, _members, value or "")
    if letter is None:
        return Option(SBATCH, written, ForSbatch(source))
    return Option(letter, value, ForSbatch(f"{written}, {source}"))


def _members(steps: re.Match[str]) -> str:
    """The members of an array in `FIRST-LAST:STEP`, one by one, as qsub has them; as it is where there are too many."""
    first, last, step = map(int, steps.groups())
    found = range(first, last + 1, step) if step else ()
    return ",".join(map(str, found)) if 0 < len(found) <= MAX_STEPS else steps[0]


def _meant(name: str) -> str:
    """The option that a wrong name is probably meant for."""
    from difflib import get_close_matches  # for errors only

    found = get_close_matches(name, [*TABLE, "vm"], 1)
    return "".join(f", {'-' if name == 'vm' else '--'}{name} is" for name in found)


def split_option(option: Option) -> tuple[str, Optional[str]]:
    """Name and value of an option that is sbatch's."""
    name, equals, value = (option.value or "")[2:].partition("=")
    return name, value if equals else None


class _Reader:
    """Goes over the words once."""

    def __init__(self, words: Sequence[str], source: str, own_words: bool) -> None:
        self.words = list(words)
        self.at = 0
        self.source = source
        self.own_words = own_words
        self.options: list[Option] = []
        self.operands: list[str] = []
        self.vm: list[Option] = []
        self.own: set[str] = set()
        self.rest: list[str] = []
        self.problem: Optional[str] = None

    def run(self) -> None:
        while self.at < len(self.words) and self.problem is None:
            word = self.words[self.at]
            self.at += 1
            if word == "-vm":
                value = self._next()
                if value is None:
                    raise VTorqueError(f"-vm ({self.source}) has no value", code=Code.USAGE, hint="write -vm key=value")
                self.vm.append(Option("vm", value, ForSbatch(self.source)))
                continue
            if self.own_words and word in OWN:
                self.own.add(word)
                continue
            if word == "--":
                self._operands(self.at)
                continue
            if word == "-" or not word.startswith("-"):
                self._operands(self.at - 1)
                continue
            self.rest.append(word)
            if word.startswith("--"):
                self._long(word)
            else:
                self._bundle(word)
        self.rest += self.words[self.at :]

    def _next(self) -> Optional[str]:
        if self.at == len(self.words):
            return None
        self.at += 1
        return self.words[self.at - 1]

    def _operands(self, start: int) -> None:
        self.operands = self.words[start:]
        self.at = len(self.words)

    def _long(self, word: str) -> None:
        name, equals, value = word[2:].partition("=")
        name = _OTHER_NAMES.get(name, name)
        if name not in TABLE:
            self.problem = f"sbatch's option --{name} is not known ({self.source}){_meant(name)}"
        elif equals and TABLE[name].takes is Takes.NOTHING:
            self.problem = f"sbatch's option --{name} has no value ({self.source})"
        else:
            self._take(name, value if equals else None)

    def _bundle(self, word: str) -> None:
        for position, letter in enumerate(word[1:], 2):
            name = SHORT.get(letter)
            if name is None:
                self.problem = f"sbatch's option -{letter} is not known ({self.source})"
                return
            if TABLE[name].takes is Takes.VALUE:
                self._take(name, word[position:] or None)
                return
            self._take(name, None)

    def _take(self, name: str, value: Optional[str]) -> None:
        if value is None and TABLE[name].takes is Takes.VALUE:
            value = self._next()
            if value is None:
                self.problem = f"sbatch's option --{name} needs a value ({self.source})"
                return
            self.rest.append(value)
        self.options.append(as_option(name, value, self.source))
