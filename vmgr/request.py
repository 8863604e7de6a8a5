"""What a user asks of guests: the keys of `-vm`, read exactly, each value with the place it came from."""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

from vmgr.errors import Code, VTorqueError
from vmgr.units import parse_count, parse_size_mib

KEYS = ("img", "distro", "vcpus", "ram", "vms_per_node", "vm_prologue", "vm_epilogue")
"""The keys of `-vm`; `off` stands alone."""


class Asked(NamedTuple):
    """One value that the user gave, and where: `-vm ram=2G` or `job.sh line 3`."""

    value: Union[str, int]
    source: str


Request = dict[str, Asked]
"""What was asked for, by key; sizes in MiB, counts as numbers."""


def parse_vm(text: str, source: str) -> Optional[Request]:
    """The request in one `-vm` argument, `key=value[,key=value…]`; None for `off`.

    Raises VTorqueError: VT-KEY for an unknown key or one given twice, VT-VALUE for a value that cannot be read.
    """
    if text == "off":
        return None
    request: Request = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if key not in KEYS or not equals:
            what = "a comma with nothing beside it" if not item else f"the key {key!r}" if equals else repr(item)
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
                f"{key} is asked for twice: {held.value} ({held.source}) and {asked.value} ({asked.source})",
                code=Code.KEY,
                hint="give it once",
            )


def _read(key: str, value: str, source: str) -> Union[str, int]:
    number: Optional[int]
    if key in ("vcpus", "vms_per_node"):
        number, form = parse_count(value), "a whole number"
    elif key == "ram":
        number, form = parse_size_mib(value), "a size such as 2048M or 1.5G (a whole number of MiB)"
    elif not value:
        raise VTorqueError(f"{key} in {source} has no value", code=Code.VALUE, hint=f"write {key}=VALUE")
    else:
        return value
    if number is None:
        raise VTorqueError(f"{key}={value} in {source} cannot be read", code=Code.VALUE, hint=f"{form} is needed")
    return number
