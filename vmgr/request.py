"""What a user asks of guests: the keys of `-vm`, read exactly, each value with the place it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional, Union

from vmgr.errors import Code, VTorqueError
from vmgr.units import format_size_mib, parse_count, parse_size_mib

Value = Union[str, int, bool, tuple[str, ...]]
"""A value that was read: sizes in MiB, counts as numbers, lists as tuples."""


class Key(NamedTuple):
    """One key of `-vm`: `read` gives None for a text that is no value of it, `form` says what is needed.

    `help` is a line for users. `is_file` marks a path of a file that is read at submission.
    """

    read: Callable[[str], Optional[Value]]
    form: str
    help: str
    is_file: bool = False


_YES = ("true", "yes", "on", "enabled")
_NO = ("false", "no", "off", "disabled")


def _text(text: str) -> Optional[str]:
    return text or None


def _flag(text: str) -> Optional[bool]:
    word = text.lower()
    return True if word in _YES else False if word in _NO else None


def _names(text: str) -> Optional[tuple[str, ...]]:
    names = tuple(text.split("+"))
    return () if text == "none" else names if all(names) and len(set(names)) == len(names) else None


def _disk(text: str) -> Optional[Value]:
    return parse_size_mib(text) or None if text[:1].isdigit() else text or None


_SIZE = "a size such as 2048M or 1.5G (a whole number of MiB)"
_COUNT = "a whole number"
_SWITCH = "true, yes, on, enabled or false, no, off, disabled"
_WORD = "a word"
_PATH = "the path of a file"
_IMAGE = "the name of an image, NAME@REVISION, or the path of a disk"

KEYS = {
    "img": Key(
        _text,
        _IMAGE,
        "image of the guest, NAME or NAME@REVISION, see `vmgr list`; or a qcow2 disk of your own, /PATH or ./PATH",
    ),
    "distro": Key(_text, _WORD, "refuse unless the image is of this family or distribution"),
    "arch": Key(_text, _WORD, "refuse unless the image is for this architecture"),
    "vcpus": Key(parse_count, _COUNT, "vCPUs of a guest"),
    "ram": Key(parse_size_mib, _SIZE, "RAM of a guest; a bare number is MiB"),
    "vms_per_node": Key(parse_count, _COUNT, "guests on each node"),
    "vcpu_pinning": Key(_text, "auto, off, numad or the path of a mapping file", "which CPUs the vCPUs are bound to"),
    "fs_type": Key(_text, _WORD, "how the guest gets its disk"),
    "disk": Key(
        _disk, "a size such as 10G, or the path of a disk", "a persistent disk, mounted at /data in the first guest"
    ),
    "vm_prologue": Key(_text, _PATH, "your own script, run in the guest before the job", is_file=True),
    "vm_epilogue": Key(_text, _PATH, "your own script, run in the guest after the job", is_file=True),
    "metadata": Key(_text, _PATH, "cloud-config of your own for the guest", is_file=True),
    "network": Key(_text, _WORD, "how the guest is connected"),
    "mounts": Key(_names, "names of shares joined by +, or none", "the site's shares that the guest sees"),
    "suspend": Key(_flag, _SWITCH, "whether the job can be suspended, by `vmgr suspend`"),
    "iocm": Key(_flag, _SWITCH, "I/O core manager"),
    "iocm_min_cores": Key(parse_count, _COUNT, "cores that it keeps for I/O at least"),
    "iocm_max_cores": Key(parse_count, _COUNT, "cores that it takes for I/O at most"),
    "vrdma": Key(_flag, _SWITCH, "virtual RDMA devices"),
    "unclot": Key(_flag, _SWITCH, "shared memory between the guests of a node"),
    "unclot_shmem": Key(parse_size_mib, _SIZE, "size of that shared memory"),
}
"""The keys of `-vm`; `off` stands alone."""

COMPONENTS = {"iocm": ("iocm_min_cores", "iocm_max_cores"), "vrdma": (), "unclot": ("unclot_shmem",)}
"""The optional components, with the keys that only mean something when the component is asked for."""

SIZES = frozenset(("ram", "unclot_shmem"))
"""Keys whose numbers are MiB."""


class Asked(NamedTuple):
    """One value that the user gave, and where: `the command line` or `job.sh line 3`."""

    value: Value
    source: str


Request = dict[str, Asked]
"""What was asked for, by key."""


def parse_vm(text: str, source: str) -> Optional[Request]:
    """The request in one `-vm` argument, `key=value[,key=value…]`; None for `off`.

    Raises VTorqueError: VT-KEY for an unknown key or one given twice, VT-VALUE for a value that cannot be read.
    """
    if text == "off":
        return None
    request: Request = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if key in KEYS and not equals:
            raise VTorqueError(f"{key} in {source} has no value", code=Code.VALUE, hint=f"write {key}=VALUE")
        if key not in KEYS:
            what = (
                f"the key {key!r}" if equals else repr(item) if item or not text else "a comma with nothing beside it"
            )
            raise VTorqueError(
                f"unknown request in {source}: {what}",
                code=Code.KEY,
                hint=f"allowed: off, {', '.join(key + '=VALUE' for key in KEYS)}",
            )
        merge(request, {key: Asked(_read(key, value, source), source)})
    return request


def merge(request: Request, more: Request) -> None:
    """Add `more` to `request`; the same key with another value is an error that names both places."""
    for key, asked in more.items():
        held = request.setdefault(key, asked)
        if held.value != asked.value:
            raise VTorqueError(
                f"{key} is asked for twice: {show(key, held.value)} ({held.source}) "
                f"and {show(key, asked.value)} ({asked.source})",
                code=Code.KEY,
                hint="give it once",
            )


def show(key: str, value: object) -> str:
    """A value as its user would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "+".join(value) or "none"
    if isinstance(value, int) and (key in SIZES or key == "disk"):
        return format_size_mib(value)
    return str(value)


def _read(key: str, value: str, source: str) -> Value:
    if not value:
        raise VTorqueError(f"{key} in {source} has no value", code=Code.VALUE, hint=f"write {key}=VALUE")
    kind = KEYS[key]
    read = kind.read(value)
    if read is None:
        hint = f"{kind.form} is needed"
        if kind.read is _flag and value in ("0", "1"):
            hint += "; 0 and 1 are ambiguous: to the vTorque of 2018, 0 was enabled and 1 disabled"
        raise VTorqueError(f"{key}={value} in {source} cannot be read", code=Code.VALUE, hint=hint)
    return read
