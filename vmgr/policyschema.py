"""The keys below `policy`: what users may ask for, in general and for single queues, groups and users."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Callable

from vmgr.fields import (
    Key,
    Named,
    Path_,
    Problem,
    choice,
    choices,
    flag,
    image,
    images,
    names,
    nullable,
    number,
    positive_size,
    size,
)
from vmgr.jobspec import MAX_PER_NODE, PINNINGS
from vmgr.policy import LAYERS, is_among, overridden
from vmgr.request import SIZES
from vmgr.units import format_size_mib


def _feature(what: str, *, on: bool = True, **leaves: Key) -> dict[str, Key]:
    return {"enabled": Key(flag, on, f"whether {what} may be asked for at all"), **leaves}


def _bounded(what: str, read: Callable[[Any], int], low: int, high: int, default: int) -> dict[str, Key]:
    return _feature(
        what,
        min=Key(read, low, f"least {what}"),
        max=Key(read, high, f"most {what}"),
        default=Key(read, default, f"{what}, when the user does not say"),
    )


def _switch(what: str) -> dict[str, Key]:
    return _feature(what, default=Key(flag, False, f"{what}, when the user does not say"))


def _chosen(what: str, known: tuple[str, ...], allowed: list[str], default: str, defaults: str = "") -> dict[str, Key]:
    return _feature(
        what,
        allowed=Key(choices(*known), allowed, f"{what}: what may be asked for"),
        default=Key(
            choice(*(word for word in known if word != defaults)), default, f"{what}, when the user does not say"
        ),
    )


_VCPUS = number(1, 4096)
_CORES = number(0, 4096)
_NETWORKS = ("user", "bridge", "job")

KEYS: dict[str, Any] = {
    "nodes": {
        "min": Key(number(1, 100000), 1, "least nodes of a guest job"),
        "max": Key(number(1, 100000), 1024, "most nodes of a guest job"),
    },
    "img": _feature(
        "an image",
        default=Key(nullable(image), None, "image of a guest when the user names none"),
        allowed=Key(
            nullable(images), None, "images that may be asked for, in any revision or in one; all when not set"
        ),
    ),
    "distro": _feature("a distribution"),
    "arch": _feature("an architecture"),
    "vcpus": _bounded("vCPUs of a guest", _VCPUS, 1, 64, 1),
    "ram": _bounded("RAM of a guest", positive_size, 128, 1024 * 1024, 512),
    "vms_per_node": _bounded("guests on a node", number(1, MAX_PER_NODE), 1, 16, 1),
    "vcpu_pinning": _chosen("pinning of vCPUs", (*PINNINGS, "file"), [*PINNINGS, "file"], "auto", "file"),
    "fs_type": _chosen("the kind of the guest's disk", ("overlay", "sharedfs", "ramdisk"), ["overlay"], "overlay"),
    "disk": _feature(
        "a persistent disk", on=False, max=Key(size, 100 * 1024, "most that a new persistent disk may hold")
    ),
    "vm_prologue": _feature("a VM prologue of the user's own"),
    "vm_epilogue": _feature("a VM epilogue of the user's own"),
    "metadata": _feature(
        "cloud-config of the user's own",
        allowed=Key(names, [], "keys of cloud-config that users may give; guests run them as root"),
    ),
    "network": {
        **_chosen("the network", _NETWORKS, ["user", "job"], "user"),
        "several": Key(
            nullable(choice(*_NETWORKS)),
            "job",
            "the same for a job of several guests, where it is allowed; null: as for one",
        ),
    },
    "mounts": _feature(
        "a choice of shares",
        allowed=Key(nullable(names), None, "shares that may be asked for; all when not set"),
        default=Key(
            nullable(names), None, "shares of a guest when the user names none; all that are allowed when not set"
        ),
    ),
    "suspend": _switch("the suspension of a job"),
    "iocm": _switch("the I/O core manager"),
    "iocm_min_cores": _bounded("cores kept for I/O", _CORES, 0, 64, 1),
    "iocm_max_cores": _bounded("cores taken for I/O", _CORES, 0, 64, 1),
    "vrdma": _switch("virtual RDMA"),
    "unclot": _switch("shared memory between guests"),
    "unclot_shmem": _bounded("shared memory of a node's guests", positive_size, 1, 1024 * 1024, 64),
    "raise_requests": Key(flag, False, "raise `ppn` and memory that are too small for the guests, instead of refusing"),
    "grow_defaults": Key(flag, True, "let default vCPUs and RAM grow to what the job's own `ppn` and memory leave"),
}
"""What can be set in general and overridden; every key of `-vm` is here."""

POLICY: dict[str, Any] = {
    **KEYS,
    "queues": Named(KEYS, "overrides for the jobs of a queue, by its name"),
    "groups": Named(KEYS, "overrides for the users whose primary group this is; they win over queues"),
    "users": Named(KEYS, "overrides for a user; they win over groups"),
}


def check_policy(policy: dict[str, Any], shares: list[str]) -> None:
    """Refuse bounds that are not in order, in general or under any one override. Raises Problem."""
    for at, tree in _variants(policy):
        for word, leaves in tree.items():
            where = (*at, word)
            if isinstance(leaves, dict):
                _check_order(word, leaves, where, general=len(at) == 1)
                _check_default(leaves, where)
        for leaf in ("allowed", "default"):
            unknown = sorted(set(tree["mounts"][leaf] or ()) - set(shares))
            if unknown:
                raise Problem((*at, "mounts", leaf), f"{unknown[0]} is none of the shares {', '.join(shares)}")


def _variants(policy: dict[str, Any]) -> Iterator[tuple[Path_, dict[str, Any]]]:
    """The policy in general and as each override alone makes it, with the place of each."""
    general = {word: policy[word] for word in KEYS}
    yield ("policy",), general
    for layer in LAYERS:
        for title, override in policy[layer].items():
            yield ("policy", layer, title), overridden(general, override)


def _check_order(word: str, leaves: dict[str, Any], where: Path_, *, general: bool) -> None:
    if "min" not in leaves:
        return
    show = format_size_mib if word in SIZES else str
    low, high = leaves["min"], leaves["max"]
    if low > high:
        raise Problem(where, f"min {show(low)} is above max {show(high)}")
    default = leaves.get("default", low)
    if general and not low <= default <= high:  # one that an override leaves behind moves to the nearest bound
        raise Problem(where, f"min {show(low)}, default {show(default)}, max {show(high)} are not in this order")


def _check_default(leaves: dict[str, Any], where: Path_) -> None:
    allowed, default = leaves.get("allowed"), leaves.get("default")
    if allowed is None or default is None:
        return
    for item in default if isinstance(default, list) else [default]:
        if not is_among(item, allowed):
            raise Problem(
                (*where, "default"), f"{item} is not among what is allowed: {', '.join(allowed) or 'nothing'}"
            )
