"""What qsub's options come to on Slurm: a value for each option of `sbatch`, with the place that it comes from.

Pure: what a translation depends on beside the options stands in `Circumstances`. Options are gone through in their
order, so that of two that say the same the last one counts, whatever language each is in. What has no counterpart is
refused by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vsub.attributes import Attribute, read_attributes
from vsub.engines.slurmdepend import dependency_list
from vsub.engines.slurmoptions import TABLE, ForSbatch, split_option
from vsub.engines.slurmoutput import Output, Place, patterns
from vsub.engines.slurmrequest import PBS_MEMORY, PBS_NODES, SLURM_MEMORY, SLURM_NODES, without_counterpart
from vsub.options import SBATCH, Option
from vsub.resources import Resource, read_resources

MAX_NAME_BYTES = 200
"""A job's name with `.o`, the number and the index behind it is the name of a file, which may have 255."""

_ELSEWHERE = frozenset("cCdFISTuvVxz")
"""Options that vsub takes care of, or that are part of the job's environment."""
_SAME = {"A": "account", "N": "job-name", "h": "hold", "t": "array"}
"""Options that mean the same, with the same value."""
_NOTHING = {
    "b": "vsub does not try again",
    "E": "the job has the variables of TORQUE in any case",
    "f": "a guest job needs all of its nodes",
    "K": "the time between TERM and KILL is the site's KillWait",
}
_REQUEUE = ("requeue", "no-requeue")
_OPPOSITE = {"exclusive": ("oversubscribe",), "oversubscribe": ("exclusive",), "requeue": ("no-requeue",)}
_ACCESS = {"singlejob": "", "singleuser": "user", "uniqueuser": "user", "shared": None}
_MAIL = {"a": "FAIL", "f": "FAIL", "b": "BEGIN", "e": "END"}
_ADDRESSES = "Slurm bounds memory, not addresses; say mem="
_INSTEAD = {
    "prologue": "Slurm runs no prologue of a user's; say -vm vm_prologue=",
    "epilogue": "Slurm runs no epilogue of a user's; say -vm vm_epilogue=",
    "host": "say nodes=HOST",
    "gres": "say --gres after --slurm",
    "vmem": _ADDRESSES,
    "pvmem": _ADDRESSES,
    "cput": "Slurm bounds the time that passes; say walltime=",
    "pcput": "Slurm bounds the time that passes; say walltime=",
}


class Circumstances(NamedTuple):
    """What a translation depends on: the folder that relative paths are in, the user, the host, the time."""

    folder: str
    home: str
    user: str
    hosts: tuple[str, ...]
    now: time.struct_time
    is_folder: Callable[[str], bool]


class Value(NamedTuple):
    """The value of an option of sbatch, None for a flag, and where it comes from."""

    text: Optional[str]
    source: str


Translated = dict[str, Value]
"""Options of sbatch by name."""


def words(found: Translated) -> list[str]:
    """The options as sbatch takes them: one word each, so that no value is ever taken for an option."""
    return [f"--{name}" if value.text is None else f"--{name}={value.text}" for name, value in found.items()]


def check_refused(options: Iterable[Option], *, interactive: bool = False) -> None:
    """Refuse options of sbatch's that no guest job, or none like this, can have. Raises VTorqueError (VT-OPTION)."""
    for option in options:
        if option.letter != SBATCH:
            continue
        name, value = split_option(option)
        reason = TABLE[name].refused
        if name in ("gres", "bb", "bbf") and value and "gpu" in value.lower():
            reason = "guests get no GPUs of the node"
        if name == "signal" and not interactive:
            reason = _why_unheard(value or "")
        if reason is not None:
            raise VTorqueError(
                f"{option} ({option.source}) cannot be honoured in a guest: {reason}",
                code=Code.OPTION,
                hint="leave it out, or add -vm off",
            )


def _why_unheard(signal: str) -> Optional[str]:
    """Why the script does not hear of `--signal=[{R|B}:]SIGNAL[@SECONDS]`, which without B is for steps alone."""
    head, colon, rest = signal.rpartition(":")
    if colon and "B" in head.upper():
        return None
    return f"there are no steps of Slurm's in a guest, to which it would go; say --signal={head}B:{rest}"


def translate(options: tuple[Option, ...], around: Circumstances, job_name: str) -> Translated:
    """Every option but those of nodes, memory, output and comment. Raises VTorqueError (VT-OPTION, VT-USAGE)."""
    walk = _Walk(around)
    for option in options:
        walk.take(option)
    walk.finish()
    found = walk.found
    found.setdefault("job-name", Value(job_name, "the script's name"))
    _check_name(found["job-name"])
    return found


def output_options(options: tuple[Option, ...], around: Circumstances, found: Translated) -> Translated:
    """`--output` and `--error` of a job whose other options are `found`. Raises VTorqueError."""
    asked = Output()
    for option in options:
        name = split_option(option)[0] if option.letter == SBATCH else option.letter
        if name == "o":
            asked = asked._replace(output=option)
        elif name == "e":
            asked = asked._replace(error=option)
        elif name == "output":
            asked = _only_here("o", asked)._replace(output=option)
        elif name == "error":
            asked = _only_here("e", asked)._replace(error=option)
        elif name == "j":
            asked = asked._replace(join=option)
        elif name == "k":
            asked = asked._replace(keep=option)
    place = Place(
        job_name=found["job-name"].text or "", folder=around.folder, home=around.home, user=around.user,
        hosts=around.hosts, is_array="array" in found, is_folder=around.is_folder,
    )  # fmt: skip
    return {name: Value(*pattern) for name, pattern in patterns(asked, place).items()}


def _only_here(letter: str, asked: Output) -> Output:
    """Without what was said in qsub's language before to have one of the streams, `o` or `e`, elsewhere."""
    keep, join = asked.keep, asked.join
    if join is not None and join.value in ("oe", "eo") and not join.value.startswith(letter):
        join = None
    if keep is not None and keep.value in ("oe", "eo", letter):
        keep = keep._replace(value=keep.value.replace(letter, "") or "n")
    return asked._replace(keep=keep, join=join)


def for_session(found: Translated) -> Translated:
    """The options that `srun` has too; a session is never queued again. Raises VTorqueError (VT-OPTION) for others."""
    for name, value in found.items():
        if TABLE[name].only_sbatch and name not in _REQUEUE:
            raise VTorqueError(
                f"--{name} ({value.source}) cannot be honoured in an interactive job: srun has no such option",
                code=Code.OPTION,
                hint="leave it out",
            )
    return {name: value for name, value in found.items() if name not in _REQUEUE}


def access_option(access: Optional[str], found: Translated, source: str) -> Translated:
    """The option for who may share the nodes, where nobody has said that."""
    if access is None or "exclusive" in found or "oversubscribe" in found:
        return {}
    text = _ACCESS[access]
    return {} if text is None else {"exclusive": Value(text or None, source)}


class _Walk:
    """Goes over the options once."""

    def __init__(self, around: Circumstances) -> None:
        self.found: Translated = {}
        self._around = around
        self._mail: Optional[Option] = None

    def take(self, option: Option) -> None:
        letter = option.letter
        if letter == SBATCH:
            self._of_sbatch(option)
        elif letter == "l":
            for item in read_resources((option,)):
                self._resource(item)
        elif letter == "W":
            for attribute in read_attributes((option,)):
                self._attribute(attribute)
        elif letter in _SAME:
            self._set(_SAME[letter], option.value, option.source)
        elif letter in _NOTHING:
            raise without_counterpart(option, _NOTHING[letter])
        elif letter not in _ELSEWHERE and letter not in "oejkL":
            getattr(self, f"_letter_{letter}", self._unknown)(option)

    def finish(self) -> None:
        if "mail-user" in self.found and "mail-type" not in self.found:
            self._set("mail-type", "FAIL", "as of qsub -M without -m")

    def _set(self, name: str, text: Optional[str], source: str, *without: str) -> None:
        """Set an option, in place of what was said before, and of others that mean the opposite."""
        for other in (name, *without):
            self.found.pop(other, None)
        self.found[name] = Value(text, source)

    def _of_sbatch(self, option: Option) -> None:
        name, text = split_option(option)
        if name in SLURM_NODES | SLURM_MEMORY or name in ("output", "error", "export", "parsable", "quiet"):
            return
        if name == "mail-type":
            text = self._all_mail(text or "")
        self._set(name, text, option.source, *_OPPOSITE.get(name, ()))

    def _all_mail(self, kinds: str) -> str:
        """The kinds of mail that sbatch makes of this `--mail-type` and those before it; NONE takes none away."""
        earlier = self.found.get("mail-type")
        if earlier is None or not isinstance(earlier.source, ForSbatch):
            return kinds
        said = [each for each in (earlier.text or "", kinds) if each.upper() != "NONE"]
        return ",".join(said) or kinds

    def _unknown(self, option: Option) -> None:
        raise without_counterpart(option, "it is not known")

    def _letter_q(self, option: Option) -> None:
        queue, at, _ = (option.value or "").partition("@")
        if at or not queue or "," in queue:
            raise without_counterpart(option, "name one partition, whose policy holds")
        self._set("partition", queue, option.source)

    def _letter_n(self, option: Option) -> None:
        self._set("exclusive", None, option.source, "oversubscribe")

    def _letter_r(self, option: Option) -> None:
        if option.value not in ("y", "n"):
            raise _unreadable(option, "-r y or -r n")
        stays = option.value == "n"
        self._set("no-requeue" if stays else "requeue", None, option.source, *_REQUEUE)

    def _letter_w(self, option: Option) -> None:
        self._set("chdir", self._around.folder, option.source)

    def _letter_p(self, option: Option) -> None:
        text = (option.value or "").strip()
        digits = text.lstrip("+-")
        if not (digits.isascii() and digits.isdigit() and len(text) - len(digits) < 2 and len(digits) < 6):
            raise _unreadable(option, "a number from -1024 to 1023")
        priority = int(text)
        if not -1024 <= priority <= 1023:
            raise _unreadable(option, "a number from -1024 to 1023")
        if priority > 0:
            raise without_counterpart(option, "it lets its operators alone raise a job's priority")
        self._set("nice", str(-priority), option.source, "priority")

    def _letter_a(self, option: Option) -> None:
        from vsub.engines.local.dates import epoch  # few jobs have a date

        try:
            begin = epoch((option.value or "").strip(), self._around.now)
        except ValueError as err:
            raise _unreadable(option, str(err)) from None
        self._set("begin", time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(begin)), option.source)

    def _letter_m(self, option: Option) -> None:
        letters = (option.value or "").strip()
        if letters in ("n", "p"):
            self._set("mail-type", "NONE", option.source)
            return
        if not letters or any(letter not in _MAIL for letter in letters):
            raise _unreadable(option, "letters of abef, or n")
        kinds = dict.fromkeys(_MAIL[letter] for letter in letters)
        self._set("mail-type", ",".join(kinds), option.source)

    def _letter_M(self, option: Option) -> None:
        self._set("mail-user", (option.value or "").strip(), option.source)

    def _resource(self, item: Resource) -> None:
        if item.name in PBS_NODES or item.name in PBS_MEMORY:
            return
        if item.name == "walltime":
            self._set("time", _slurm_time(item), item.option.source)
        elif item.name == "naccesspolicy":
            self._access(item.value, item.option)
        elif item.name in ("feature", "advres", "qos"):
            name = {"feature": "constraint", "advres": "reservation", "qos": "qos"}[item.name]
            self._set(name, item.value.replace(":", "&") if name == "constraint" else item.value, item.option.source)
        else:
            raise without_counterpart(item.option, f"{item.name}: {_INSTEAD.get(item.name, 'it is not known')}")

    def _access(self, policy: str, option: Option) -> None:
        if policy.lower() not in _ACCESS:
            raise without_counterpart(option, f"naccesspolicy={policy}: {', '.join(_ACCESS)} have one")
        text = _ACCESS[policy.lower()]
        if text is None:
            self._set("oversubscribe", None, option.source, "exclusive")
        else:
            self._set("exclusive", text or None, option.source, "oversubscribe")

    def _attribute(self, attribute: Attribute) -> None:
        name, value = attribute.name, attribute.value
        if attribute.letter in ("I", "t"):
            if attribute.letter == "t":
                self._set("array", value, attribute.option.source)
        elif name == "group_list":
            pass  # it is the user's own group: another was refused
        elif name == "depend":
            self._set("dependency", dependency_list(value, attribute.option), attribute.option.source)
        elif name == "x" and value.lower().startswith("naccesspolicy:"):
            self._access(value.partition(":")[2], attribute.option)
        else:
            raise without_counterpart(attribute.option, f"the attribute {name[:40]}")


def _slurm_time(item: Resource) -> str:
    """`walltime` as hours, minutes and seconds. Raises VTorqueError (VT-USAGE).

    A mom of TORQUE's ends a job whose time exceeds 0 (`mom_over_limit`); of sbatch(1) "a time limit of zero requests
    that no time limit be imposed", which `--time=0` may ask for.
    """
    parts = item.value.strip().split(":")
    if not 1 <= len(parts) <= 4 or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise VTorqueError(
            f"walltime={item.value} ({item.option.source}) cannot be read", code=Code.USAGE,
            hint="write walltime=HH:MM:SS, or seconds",
        )  # fmt: skip
    days, hours, minutes, seconds = [0] * (4 - len(parts)) + [int(part) for part in parts]
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise VTorqueError(
            f"walltime={item.value} ({item.option.source}) is no time: TORQUE ends such a job at once, and Slurm would "
            "give it no limit",
            code=Code.USAGE,
            hint="write walltime=HH:MM:SS, or seconds; --slurm --time=0 asks for no limit",
        )
    return f"{total // 3600:02d}:{total // 60 % 60:02d}:{total % 60:02d}"


def _check_name(name: Value) -> None:
    text = name.text or ""
    if not text or "/" in text or "\\" in text or any(ord(char) < 33 or ord(char) == 127 for char in text):
        raise VTorqueError(
            f"{text[:80]!r} ({name.source}) is no name for a job", code=Code.USAGE,
            hint="no blanks, slashes and backslashes; give one by -N",
        )  # fmt: skip
    size = len(text.encode("utf-8", "surrogateescape"))
    if size > MAX_NAME_BYTES:
        raise VTorqueError(
            f"the job's name ({name.source}) has {size} bytes: none of its output could be kept", code=Code.USAGE,
            hint=f"{MAX_NAME_BYTES} are allowed; give another by -N",
        )  # fmt: skip


def _unreadable(option: Option, needed: str) -> VTorqueError:
    return VTorqueError(f"{option} ({option.source}) cannot be read", code=Code.USAGE, hint=needed)
