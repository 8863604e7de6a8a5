"""The configuration's keys: what each may hold, what it is when nobody sets it, and the check of a whole tree.

A section is a mapping of names to keys or further sections. Checking takes plain data (from YAML) and gives plain
data back, complete with defaults, so that a checked tree can be stored as JSON and read again without a check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Callable, NamedTuple, Union

from vmgr.units import format_size_mib, parse_size_mib

Path_ = tuple[Union[str, int], ...]
"""Where a value stands in the tree: mapping keys and list positions."""


class Problem(Exception):
    """One thing wrong in a tree: where, and what is allowed."""

    def __init__(self, path: Path_, text: str) -> None:
        super().__init__(text)
        self.path = path
        self.text = text


class Key(NamedTuple):
    """One setting: `read` turns what stands in the file into the value or raises ValueError naming what is allowed."""

    read: Callable[[Any], Any]
    default: Any
    doc: str


class Items(NamedTuple):
    """A list of sections of the same shape."""

    section: Mapping[str, Any]
    default: list[dict[str, Any]]
    doc: str


MAX_RUN_PATH = 30
"""Longest `paths.run`: with the names below it the path of a socket stays within 107 bytes (unix(7))."""

REQUIRED = object()
"""The default of a key that has none and must be set."""


def text(value: Any) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError("a text without control characters is needed")
    return value


def name(value: Any) -> str:
    if not isinstance(value, str) or not value.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ValueError("a name of letters, digits, `-`, `_` and `.` is needed")
    return value


def path(value: Any) -> str:
    printable = isinstance(value, str) and value.isprintable() and not any(c.isspace() for c in value)
    if not printable or not value.startswith("/") or "/../" in value + "/":
        raise ValueError("an absolute path without blanks and `..` is needed")
    return str(value)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false is needed")
    return value


def size(value: Any) -> int:
    """A memory or disk size, as MiB."""
    mib = parse_size_mib(str(value)) if isinstance(value, (int, str)) and not isinstance(value, bool) else None
    if mib is None:
        raise ValueError("a size such as 512M or 2G (a whole number of MiB) is needed")
    return mib


def choice(*allowed: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)} is needed")
        return str(value)

    return read


def number(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high} is needed")
        return value

    return read


def names(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("a list of names is needed")
    return [name(item) for item in value]


def nullable(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def check(tree: Any, section: Mapping[str, Any], at: Path_ = ()) -> dict[str, Any]:
    """The values of `tree`, every key of `section` present. Raises Problem for the first thing that is wrong."""
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise Problem(at, "a mapping of " + ", ".join(section) + " is needed")
    for word in tree:
        if word not in section:
            raise Problem((*at, word), f"unknown key; allowed here: {', '.join(section)}")
    return {word: _check_value(tree, word, kind, (*at, word)) for word, kind in section.items()}


def _check_value(tree: dict[str, Any], word: str, kind: Any, at: Path_) -> Any:
    if isinstance(kind, Key):
        if word not in tree:
            if kind.default is REQUIRED:
                raise Problem(at[:-1], f"the key {word} is missing ({kind.doc})")
            return kind.default
        try:
            return kind.read(tree[word])
        except ValueError as err:
            raise Problem(at, str(err)) from None
    if isinstance(kind, Items):
        items = tree.get(word, kind.default)
        if not isinstance(items, list):
            raise Problem(at, "a list is needed")
        return [check(item, kind.section, (*at, index)) for index, item in enumerate(items)]
    return check(tree.get(word), kind, at)


def _bounded(read: Callable[[Any], int], low: int, high: int, default: int, what: str) -> dict[str, Any]:
    return {
        "min": Key(read, low, f"least {what}"),
        "max": Key(read, high, f"most {what}"),
        "default": Key(read, default, f"{what}, when the user does not say"),
    }


MOUNTS: list[dict[str, Any]] = [
    {"name": "home", "source": "{home}", "target": "{home}"},
    {"name": "opt-hpc", "source": "/opt", "target": "/opt-hpc", "readonly": True},
]
"""The shares of a guest when the site names none: the user's home, and the cluster's `/opt` as `/opt-hpc`."""

_VCPUS = number(1, 4096)

SCHEMA: dict[str, Any] = {
    "engine": Key(choice("torque", "local"), "torque", "the batch system that `vsub` submits to"),
    "submit": {
        "without_vm": Key(choice("guest", "qsub"), "guest", "what a submission without -vm is"),
        "qsub": Key(path, "/usr/bin/qsub", "the batch system's own qsub (engine torque)"),
        "qstat": Key(path, "/usr/bin/qstat", "the batch system's own qstat (engine torque)"),
    },
    "local": {
        "spool": Key(path, "/var/spool/vtorque-local", "state of the embedded batch system"),
        "socket": Key(path, "/run/vtorque-local.sock", "where its clients reach it"),
    },
    "paths": {
        "spool": Key(path, "/var/spool/vtorque", "records, seeds and host keys of running jobs, one folder a job"),
        "run": Key(path, "/run/vtorque", "agents' sockets and what is true until the next boot"),
    },
    "images": {
        "pool": Key(path, "/var/lib/vtorque/images", "the guest images"),
        "overlays": Key(path, "/var/spool/vtorque/overlays", "node-local folder for the guests' disks"),
        "overlays_max": Key(size, 64 * 1024, "most that the overlays of a node may grow to, together"),
    },
    "hypervisor": {
        "qemu": Key(path, "/usr/bin/qemu-system-x86_64", "the hypervisor"),
        "allow_emulation": Key(flag, False, "run guests by emulation where KVM does not work"),
        "overcommit_cpus": Key(flag, False, "let guests share CPUs when a node has too few"),
        "probe_seconds": Key(number(1, 120), 10, "how long KVM may take to show a kernel's first line"),
    },
    "policy": {
        "img": {
            "default": Key(nullable(name), None, "image of a guest when the user names none"),
            "allowed": Key(nullable(names), None, "images that may be asked for; all in the pool when not set"),
        },
        "vcpus": _bounded(_VCPUS, 1, 64, 1, "vCPUs of a guest"),
        "ram": _bounded(size, 128, 1024 * 1024, 512, "RAM of a guest"),
        "vms_per_node": _bounded(number(1, 1), 1, 1, 1, "guests on a node"),
        "user_vm_hooks": Key(flag, True, "users may give a VM prologue and epilogue of their own"),
    },
    "mounts": Items(
        {
            "name": Key(name, REQUIRED, "the share's tag"),
            "kind": Key(choice("9p"), "9p", "how it is served"),
            "source": Key(text, REQUIRED, "folder of the node; {home} stands for the user's"),
            "target": Key(text, REQUIRED, "where the guest mounts it"),
            "readonly": Key(flag, False, "whether the guest may not write"),
        },
        MOUNTS,
        "what guests see of the node's file systems, with the rights of the job's user",
    ),
    "guest": {
        "vm_hooks": Key(nullable(path), None, "folder with the site's VM prologue and epilogue, run as root"),
    },
    "timeouts": {
        "user_file": Key(number(1, 120), 5, "seconds for reading a file of the user's"),
        "launch": Key(number(1, 600), 30, "seconds for the hypervisor to answer"),
        "boot": Key(number(5, 3600), 240, "seconds from start to ready, the VM prologue included"),
        "barrier": Key(number(5, 3600), 270, "seconds that the user prologue waits; less than $prologalarm"),
        "attach": Key(number(5, 3600), 600, "seconds that a ready guest waits for its job; then it is ended"),
        "vm_epilogue": Key(number(1, 3600), 60, "seconds for the VM epilogue"),
        "shutdown": Key(number(1, 600), 15, "seconds for a guest to power off"),
    },
    "logging": {
        "level": Key(choice("debug", "info", "warning", "error"), "info", "least severe message that is kept"),
        "file": Key(nullable(path), "/var/log/vtorque/node.log", "the node's log; jobs' own logs lie beside it"),
        "rotate": {
            "size": Key(size, 16, "the node's log is rotated at this size"),
            "keep": Key(number(0, 1000), 4, "rotated logs that stay"),
            "jobs": Key(number(0, 1000000), 500, "jobs' logs that stay"),
        },
        "journal": Key(flag, False, "send messages to the system's journal too (/dev/log)"),
    },
}
"""Every key of `etc/vtorque/vtorque.yaml`."""


def check_config(tree: Any) -> dict[str, Any]:
    """A whole configuration, checked, with its defaults, and with the bounds of the policy in order."""
    checked = check(tree, SCHEMA)
    for word in ("vcpus", "ram", "vms_per_node"):
        bounds = checked["policy"][word]
        show = format_size_mib if word == "ram" else str
        if not bounds["min"] <= bounds["default"] <= bounds["max"]:
            low, default, high = (show(bounds[key]) for key in ("min", "default", "max"))
            raise Problem(("policy", word), f"min {low}, default {default}, max {high} are not in this order")
    if len(checked["paths"]["run"]) > MAX_RUN_PATH:
        raise Problem(("paths", "run"), f"at most {MAX_RUN_PATH} characters, because sockets lie below it")
    tags = [mount["name"] for mount in checked["mounts"]]
    for index, mount in enumerate(checked["mounts"]):
        if tags.count(mount["name"]) > 1:
            raise Problem(("mounts", index, "name"), f"{mount['name']} is used twice")
        for side in ("source", "target"):
            try:
                path(mount[side].replace("{home}", "/home/user"))
            except ValueError as err:
                raise Problem(("mounts", index, side), str(err)) from None
    allowed, default = checked["policy"]["img"]["allowed"], checked["policy"]["img"]["default"]
    if allowed is not None and default is not None and default not in allowed:
        raise Problem(("policy", "img", "default"), f"{default} is not among the images allowed")
    return checked
