"""What `qsub` can do and a guest job cannot: refused by name, never dropped."""

from __future__ import annotations

from typing import Optional

from vmgr.config import Mount
from vmgr.errors import Code, VTorqueError
from vsub.attributes import Attribute
from vsub.options import Option
from vsub.resources import Resource
from vsub.visible import is_visible

_NEVER = {
    "X": "X11 is not forwarded from guests",
    "T": "vTorque's own hooks must run, and those of another name would run in their place",
    "P": "a guest job is submitted by its own user",
    "J": "a guest job is submitted by its own user",
    "D": "the root folder of a guest is its own",
}
_RESOURCES = {
    "gpus": "guests get no GPUs of the node",
    "mics": "guests get no accelerators of the node",
    "naccelerators": "guests get no accelerators of the node",
    "neednodes": "say nodes=",
    "size": "say nodes=",
    "nice": "a guest's processes do not compete with those of the node",
    "geometry": "say nodes=",
}
_DEVICES = ("gpus=", "mics=")


def check_options(options: tuple[Option, ...], attributes: list[Attribute], account: str, group: Optional[str]) -> None:
    """Refuse options and attributes that a guest job of the user `account` cannot honour.

    `group` is the user's primary group. Raises VTorqueError (VT-OPTION).
    """
    last = {option.letter: option for option in options}
    for option in options:
        if option.letter in _NEVER:
            raise refused(option, _NEVER[option.letter])
    for attribute in attributes:
        if attribute.letter is not None and attribute.letter not in "It":
            raise refused(attribute.option, _NEVER.get(attribute.letter, f"write it as -{attribute.letter}"))
        if attribute.name == "group_list" and set(_hostless(attribute.value)) != {group}:
            raise refused(attribute.option, f"a guest job runs with the primary group of its user, {group}")
    if "u" in last and any(name != account for name in _hostless(last["u"].value or "")):
        raise refused(last["u"], f"a guest job runs as the user who submits it, {account}")
    if "c" in last and (last["c"].value or "").strip() not in ("n", "none"):
        raise refused(last["c"], "a guest is not checkpointed by the batch system")


def check_resources(wanted: dict[str, Resource]) -> None:
    """Refuse resources that a guest has not. Raises VTorqueError (VT-OPTION)."""
    for name, item in wanted.items():
        reason = _RESOURCES.get("gpus" if name.startswith("gpus") else name)
        if name == "nodes" and any(word.startswith(_DEVICES) for word in item.value.replace("+", ":").split(":")):
            reason = "guests get no devices of the node"
        if name.startswith("mpp"):
            reason = "say nodes="
        if name == "gres" and item.value.startswith("gpus"):
            reason = _RESOURCES["gpus"]
        if reason is not None:
            raise refused(item.option, f"{name}: {reason}")


def check_staging(attributes: list[Attribute], mounts: tuple[Mount, ...], home: str) -> None:
    """Refuse files that would be staged to, or from, where the guest does not see them. Raises VTorqueError."""
    for attribute in attributes:
        if attribute.name in ("stagein", "stageout"):
            for pair in attribute.value.split(","):
                local = pair.partition("@")[0].strip()
                path = local if local.startswith("/") else f"{home}/{local}"
                if not is_visible(path.rpartition("/")[0] or "/", mounts):
                    raise refused(attribute.option, f"{local} on the node is not visible in the guest")


def job_shell(option: Optional[Option]) -> Optional[str]:
    """The interpreter in `-S path[@host][,…]`; None when none is asked for."""
    if option is None or not option.value:
        return None
    entries = [entry.partition("@") for entry in option.value.split(",")]
    path = next((path for path, at, _ in entries if not at), None)
    if path is None:
        raise refused(option, "it names shells for single hosts only, and the job's is not known yet")
    if not path.startswith("/"):
        raise VTorqueError(f"{option} ({option.source}) names no absolute path", code=Code.VALUE)
    return path


def refused(option: Option, reason: str) -> VTorqueError:
    """The refusal of an option."""
    return VTorqueError(
        f"{option} ({option.source}) cannot be honoured in a guest: {reason}",
        code=Code.OPTION,
        hint="leave it out, or add -vm off",
    )


def _hostless(text: str) -> list[str]:
    return [entry.partition("@")[0].strip() for entry in text.split(",")]
