"""What nodes of this version cannot do yet: refused on the node by name, and told to administrators beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Pool
from vmgr.jobspec import Spec
from vmgr.policy import LAYERS, overridden
from vmgr.request import COMPONENTS

_COMPONENTS = {
    "iocm": "the I/O core manager (iocm)",
    "vrdma": "virtual RDMA devices (vrdma)",
    "unclot": "shared memory between guests (unclot)",
}


def check(spec: Spec) -> None:
    """Refuse what is legal, and asked for, but not possible yet. Raises VTorqueError (VT-NODE)."""
    for beyond, what, possible in (
        (spec.iocm is not None, _COMPONENTS["iocm"], "guests without it"),
        (spec.vrdma, _COMPONENTS["vrdma"], "guests without them"),
        (spec.unclot_mib is not None, _COMPONENTS["unclot"], "guests without it"),
    ):
        if beyond:
            raise VTorqueError(
                f"the nodes of this version cannot do this yet: {what}",
                code=Code.NODE,
                hint=f"possible now: {possible}",
            )


def without_software(guest: Mapping[str, Any], pool: Pool) -> list[str]:
    """A line where the section `guest` of a configuration has guests install what images of the pool cannot."""
    keys = [key for key, off in (("packages", []), ("updates", "off")) if guest[key] != off]
    lacking = []
    for name in pool.names() if keys else []:
        with suppress(VTorqueError):  # an image that cannot be used has no guests
            if "cloud-init" not in pool.get(name).features:
                lacking.append(name)
    if not lacking:
        return []
    which = " and ".join(f"guest.{key}" for key in keys)
    return [f"{which}: guests of {', '.join(lacking)} install nothing, because they have no cloud-init"]


class Provided(NamedTuple):
    """What some requests need: a bridge, folders for workspaces and for suspended jobs; None where there is none."""

    bridge: Optional[str]
    workspace: Optional[str]
    suspended: Optional[str]


def provided_by(tree: Mapping[str, Any]) -> Provided:
    """What a checked configuration provides."""
    return Provided(tree["network"]["bridge"]["name"], tree["workspace"]["folder"], tree["suspended"]["folder"])


def beyond_nodes(policy: Mapping[str, Any], components: Mapping[str, bool], provided: Provided) -> list[str]:
    """A line for each thing that a configuration allows and nodes refuse, with its key. For `vmgr config check`.

    `policy` is the checked tree below `policy`, overrides and all, `components` the one below `components`. What an
    override shares with the general policy is said once.
    """
    general = {key: value for key, value in policy.items() if key not in LAYERS}
    found = dict(_beyond(general, components, provided))
    lines = [f"policy.{key} {text}" for key, text in found.items()]
    for layer in LAYERS:
        for name, override in policy[layer].items():
            for key, text in _beyond(overridden(general, override), components, provided):
                if found.get(key) != text:
                    lines.append(f"policy.{layer}.{name}.{key} {text}")
    return lines


def _beyond(policy: Mapping[str, Any], components: Mapping[str, bool], provided: Provided) -> Iterator[tuple[str, str]]:
    """The leaf and the text of each thing in one variant of the policy."""
    kinds = policy["fs_type"]
    if provided.workspace is None and "sharedfs" in kinds["allowed"] and (
        kinds["enabled"] or kinds["default"] == "sharedfs"
    ):  # fmt: skip
        yield "fs_type.allowed", "has sharedfs: nodes refuse it as long as workspace.folder is not set"
    networks = policy["network"]
    if provided.bridge is None and "bridge" in networks["allowed"] and (
        networks["enabled"] or "bridge" in (networks["default"], networks["several"])
    ):  # fmt: skip
        yield "network.allowed", "has bridge: nodes refuse it as long as network.bridge.name is not set"
    if provided.suspended is None and policy["suspend"]["default"]:
        yield "suspend.default", "is true: no job can be suspended as long as suspended.folder is not set"
    if policy["metadata"]["enabled"]:
        from vmgr.node.cloudconfig import KEYS  # loads PyYAML, which an agent can do without

        refused = [key for key in policy["metadata"]["allowed"] if key not in KEYS]
        if refused:
            yield "metadata.allowed", f"has {', '.join(refused)}: nodes refuse these keys of cloud-config"
    for key in COMPONENTS:
        leaf = "default" if policy[key]["default"] else "enabled"
        if components[key] and policy[key][leaf]:
            yield f"{key}.{leaf}", f"is true, and components.{key} too: nodes refuse {_COMPONENTS[key]} yet"
