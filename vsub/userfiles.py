"""YAML files of the user's that a submission reads: a mapping of vCPUs to CPUs, and cloud-config."""

from __future__ import annotations

from typing import Any

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import GuestGroup, Pinning, is_cpu_list, is_plain
from vmgr.yamlfile import parse_yaml
from vsub.script import read_user_file

MAX_BYTES = 32 << 10


def read_pinning(path: str, source: str, group: GuestGroup) -> Pinning:
    """The mapping in a file: `guest (from 1): {vCPU (from 0): CPU list}` for each guest of a node and each vCPU.

    Raises VTorqueError: VT-SCRIPT when it cannot be read, VT-VALUE when it is not complete or names no CPUs.
    """
    tree = _read(path, "vcpu_pinning", source, texts=True)
    wanted = f"{group.per_node} guests with {group.vcpus} vCPUs each, such as `1: {{0: 2, 1: 4-5}}`"
    if not isinstance(tree, dict) or set(tree) != {str(number) for number in range(1, group.per_node + 1)}:
        raise _wrong(path, source, "its guests are not numbered from 1", wanted)
    guests = []
    for number in range(1, group.per_node + 1):
        vcpus = tree[str(number)]
        if not isinstance(vcpus, dict) or set(vcpus) != {str(vcpu) for vcpu in range(group.vcpus)}:
            raise _wrong(path, source, f"the vCPUs of guest {number} are not numbered from 0", wanted)
        texts = [str(vcpus[str(vcpu)]).replace(" ", "") for vcpu in range(group.vcpus)]
        bad = next((text for text in texts if not is_cpu_list(text)), None)
        if bad is not None:
            raise _wrong(path, source, f"{bad[:40]!r} of guest {number} is no list of CPUs", wanted)
        guests.append(tuple(texts))
    return Pinning("map", tuple(guests))


def read_metadata(path: str, source: str) -> dict[str, Any]:
    """The cloud-config in a file. Raises VTorqueError: VT-SCRIPT when it cannot be read, VT-VALUE when it is none."""
    tree = _read(path, "metadata", source)
    if not isinstance(tree, dict) or not tree or not is_plain(tree):
        raise _wrong(path, source, "it is no cloud-config", "a mapping of plain values, nested up to 16 deep")
    return tree


def _read(path: str, key: str, source: str, *, texts: bool = False) -> Any:
    """What a file holds; with `texts` every value as it is written, for `010` is no number of a CPU."""
    data = read_user_file(path, key, kind="YAML file")
    if len(data) > MAX_BYTES:
        raise _wrong(path, source, f"it has {len(data)} bytes", f"at most {MAX_BYTES}")
    try:
        return parse_yaml(data, path, texts=texts)[0]
    except VTorqueError as err:
        raise VTorqueError(f"{key} ({source}): {err.message}", code=Code.VALUE) from None


def _wrong(path: str, source: str, problem: str, wanted: str) -> VTorqueError:
    return VTorqueError(f"{path} ({source}) cannot be used: {problem}", code=Code.VALUE, hint=f"needed: {wanted}")
