"""The specification: written and read exactly, whatever stands in the file."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodesite import a_spec

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import (
    MAX_MEMBERS,
    MAX_METADATA_DEPTH,
    MAX_SPEC_BYTES,
    PINNINGS,
    Disk,
    GuestGroup,
    Iocm,
    Pinning,
    Spec,
    dump_spec,
    is_cpu_list,
    members,
    parse_job_directory,
    parse_spec,
    spec_hash,
)

KEY = "ssh-ed25519 " + "A" * 68
SPEC = a_spec(asked=("vcpus",))

hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
paths = st.text(st.characters(blacklist_characters="\0"), max_size=40).map(lambda text: "/" + text)
words = st.from_regex(r"\A[A-Za-z0-9._-]{1,64}\Z")
counts = st.integers(1, 2**31)
cpu_lists = st.from_regex(r"\A[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}){0,3}\Z").filter(is_cpu_list)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
specs = st.builds(
    Spec,
    ruid=st.from_regex(r"\A[0-9a-z]{8,32}\Z"),
    groups=st.lists(
        st.builds(GuestGroup, st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,63}\Z"), counts, counts, counts),
        min_size=1,
        max_size=3,
    ).map(tuple),
    asked=st.lists(words, max_size=5).map(tuple),
    distro=st.none() | words,
    arch=st.none() | words,
    pinning=st.builds(Pinning, st.sampled_from(PINNINGS), st.none())
    | st.lists(st.lists(cpu_lists, min_size=1, max_size=3).map(tuple), min_size=1, max_size=2).map(
        lambda cpus: Pinning("map", tuple(cpus))
    ),
    fs_type=st.sampled_from(["overlay", "sharedfs", "ramdisk"]),
    disk=st.none()
    | counts.map(lambda size: Disk(None, size))
    | st.text(st.characters(blacklist_characters="\0"), max_size=4000).map(lambda name: Disk(f"/{name}", None)),
    metadata=st.none() | st.dictionaries(st.from_regex(r"\A[a-z][a-z0-9_-]{0,8}\Z"), plain, max_size=3),
    mounts=st.lists(words, max_size=5).map(tuple),
    network=st.sampled_from(["user", "bridge", "job"]),
    iocm=st.none() | st.tuples(st.integers(0, 9), st.integers(9, 99)).map(lambda cores: Iocm(*cores)),
    suspend=st.booleans(),
    vrdma=st.booleans(),
    unclot_mib=st.none() | counts,
    workdir=paths,
    shell=st.none() | paths,
    interactive=st.booleans(),
    array=st.none() | st.from_regex(r"\A[0-9]{1,7}(,0-[0-9]{1,4})?(,[0-9]{1,7}){0,3}\Z"),
    script=hashes,
    arguments=st.text(st.characters(blacklist_characters="\0\n", blacklist_categories=("Cs",)), max_size=40),
    vm_prologue=st.none() | hashes,
    vm_epilogue=st.none() | hashes,
    ssh_public_key=st.just(KEY),
    keep=st.booleans(),
)


def read(data: bytes) -> Spec:
    return parse_spec(data, sha256=spec_hash(data), source="spec")


@given(specs)
def test_round_trip(spec: Spec) -> None:
    data = dump_spec(spec)
    assert read(data) == spec
    assert dump_spec(read(data)) == data


def changed(**values: Any) -> bytes:
    return json.dumps({**json.loads(dump_spec(SPEC)), **values}).encode()


@pytest.mark.parametrize(
    "values",
    [
        {"version": 1},
        {"version": 3},
        {"version": True},
        {"more": 1},
        {"groups": []},
        {"groups": [{"image": "micro"}]},
        {"groups": [{"image": "micro@0", "per_node": 1, "vcpus": 1, "ram_mib": 1}]},
        {"groups": [{"image": "micro@1@1", "per_node": 1, "vcpus": 1, "ram_mib": 1}]},
        {"groups": [{"image": "/x\nVTORQUE_RANK=7", "per_node": 1, "vcpus": 1, "ram_mib": 1}]},
        {"groups": [{"image": "/x\0", "per_node": 1, "vcpus": 1, "ram_mib": 1}]},
        {"groups": [{"image": "/" + "x" * 4096, "per_node": 1, "vcpus": 1, "ram_mib": 1}]},
        {"groups": [{"image": "../x", "per_node": 1, "vcpus": 1, "ram_mib": 1}]},
        {"groups": [{"image": "micro", "per_node": 1, "vcpus": True, "ram_mib": 1}]},
        {"groups": [{"image": "micro", "per_node": 1, "vcpus": 1.0, "ram_mib": 1}]},
        {"groups": [{"image": "micro", "per_node": 0, "vcpus": 1, "ram_mib": 1}]},
        {"ruid": "../../../etc"},
        {"ruid": "0123456789abcdef\n"},
        {"distro": "a b"},
        {"network": "tap"},
        {"network": "User"},
        {"fs_type": "9p"},
        {"fs_type": None},
        {"arch": "x86 64"},
        {"pinning": None},
        {"pinning": {"mode": "auto", "cpus": [["0"]]}},
        {"pinning": {"mode": "numad", "cpus": [["0"]]}},
        {"pinning": {"mode": "map", "cpus": None}},
        {"pinning": {"mode": "Numad", "cpus": None}},
        {"pinning": {"mode": "map", "cpus": [[]]}},
        {"pinning": {"mode": "map", "cpus": ["0"]}},
        {"pinning": {"mode": "map", "cpus": [["a"]]}},
        {"pinning": {"mode": "map", "cpus": [["-1"]]}},
        {"pinning": {"mode": "map", "cpus": [["0,"]]}},
        {"pinning": {"mode": "map", "cpus": [["999999"]]}},
        {"pinning": {"mode": "off", "cpus": None, "more": 1}},
        {"disk": {"image": None, "size_mib": None}},
        {"disk": {"image": "/a", "size_mib": 1}},
        {"disk": {"image": "/a\0", "size_mib": None}},
        {"disk": {"image": "a", "size_mib": None}},
        {"disk": {"image": None, "size_mib": 0}},
        {"iocm": {"min_cores": 2, "max_cores": 1}},
        {"iocm": {"min_cores": -1, "max_cores": 1}},
        {"vrdma": "yes"},
        {"suspend": None},
        {"suspend": 1},
        {"unclot_mib": 0},
        {"metadata": []},
        {"metadata": {"Write": 1}},
        {"metadata": {"a b": 1}},
        {"metadata": {"a": {"b": float("inf")}}},
        {"interactive": None},
        {"script": None},
        {"array": ""},
        {"array": "1-"},
        {"array": "1,,2"},
        {"array": "a"},
        {"array": "1\n"},
        {"array": "3-1"},
        {"array": "0-9999999"},
        {"arguments": None},
        {"arguments": "a\nb"},
        {"arguments": "a\0"},
        {"arguments": "a\ud800b"},
        {"arguments": "a" * 5000},
        {"network": ["user"]},
        {"workdir": "relative"},
        {"workdir": "/a\0b"},
        {"shell": "sh"},
        {"script": "a" * 63},
        {"ssh_public_key": KEY + "\nmore"},
        {"ssh_public_key": 'command="x" ' + KEY},
        {"keep": 1},
        {"mounts": "home"},
    ],
)
def test_illegal_values(values: dict[str, Any]) -> None:
    with pytest.raises(VTorqueError) as caught:
        read(changed(**values))
    assert caught.value.code is Code.SPEC


def test_an_interactive_job_needs_no_script() -> None:
    assert read(changed(script=None, interactive=True)).script is None


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth else 1


def test_metadata_is_nested_so_far_and_no_further() -> None:
    assert read(changed(metadata=nested(MAX_METADATA_DEPTH))).metadata == nested(MAX_METADATA_DEPTH)
    with pytest.raises(VTorqueError):
        read(changed(metadata=nested(MAX_METADATA_DEPTH + 1)))


@pytest.mark.parametrize(
    ("array", "indexes"),
    [("0", {0}), ("0,3,7-9", {0, 3, 7, 8, 9}), ("5-5", {5}), ("1-3,2-4", {1, 2, 3, 4}), ("007", {7})],
)
def test_members_of_an_array(array: str, indexes: set[int]) -> None:
    assert members(array) == indexes


@pytest.mark.parametrize("array", ["3-1", f"0-{MAX_MEMBERS}", f"0-{MAX_MEMBERS // 2},{MAX_MEMBERS}-{MAX_MEMBERS * 2}"])
def test_arrays_without_an_end(array: str) -> None:
    with pytest.raises(ValueError):
        members(array)


def test_altered_and_large() -> None:
    data = dump_spec(SPEC)
    with pytest.raises(VTorqueError, match="altered"):
        parse_spec(data + b" ", sha256=spec_hash(data), source="spec")
    with pytest.raises(VTorqueError, match="larger"):
        read(b" " * (MAX_SPEC_BYTES + 1))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(VTorqueError) as caught:
        read(data)
    assert caught.value.code is Code.SPEC and str(caught.value).isprintable()


@given(st.sampled_from([*Spec._fields, "version", "other"]), json_values)
def test_any_json_in_any_key(key: str, value: Any) -> None:
    try:
        read(changed(**{key: value}))
    except VTorqueError as err:
        assert err.code is Code.SPEC and str(err).isprintable()


@given(json_values)
def test_any_json(value: Any) -> None:
    with pytest.raises(VTorqueError):
        read(json.dumps(value).encode())


def test_deep_json() -> None:
    with pytest.raises(VTorqueError):
        read(b"[" * 30_000)


HASH = "0" * 64


@pytest.mark.parametrize(
    ("path", "home"),
    [
        (f"/home/carol/.vtorque/abcdefgh/{HASH}", "/home/carol"),
        (f"/.vtorque/.vtorque/abcdefgh/{HASH}", "/.vtorque"),
        (f"/home/../.vtorque/abcdefgh/{HASH}", None),
        (f"/home/./x/.vtorque/abcdefgh/{HASH}", None),
        (f"/home/a,b/.vtorque/abcdefgh/{HASH}", None),
        (f"/home/a\nb/.vtorque/abcdefgh/{HASH}", None),
        (f"/home/a b/.vtorque/abcdefgh/{HASH}", None),
        (f"home/.vtorque/abcdefgh/{HASH}", None),
        (f"/.vtorque/abcdefgh/{HASH}", None),
        (f"/home/carol/.vtorque/abcdefgh/{HASH}/", None),
        (f"/home/carol/.vtorque/abcdefgh/{HASH}\n", None),
        (f"/home/carol/.vtorque/ABCDEFGH/{HASH}", None),
        ("/" + "a" * 1100 + f"/.vtorque/abcdefgh/{HASH}", None),
    ],
)
def test_job_directory(path: str, home: str | None) -> None:
    found = parse_job_directory(path)
    assert (found.home if found else None) == home
    if found is not None:
        assert found.directory == path
