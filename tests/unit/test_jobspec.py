"""The specification: written and read exactly, whatever stands in the file."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import (
    MAX_SPEC_BYTES,
    GuestGroup,
    Spec,
    dump_spec,
    parse_job_directory,
    parse_spec,
    spec_hash,
)

KEY = "ssh-ed25519 " + "A" * 68
SPEC = Spec(
    ruid="0123456789abcdef",
    groups=(GuestGroup("micro", 1, 2, 512),),
    asked=("vcpus",),
    distro=None,
    mounts=("home",),
    network="user",
    workdir="/home/carol",
    shell=None,
    script="a" * 64,
    vm_prologue=None,
    vm_epilogue=None,
    ssh_public_key=KEY,
    keep=False,
)

hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
paths = st.text(st.characters(blacklist_characters="\0"), max_size=40).map(lambda text: "/" + text)
words = st.from_regex(r"\A[A-Za-z0-9._-]{1,64}\Z")
counts = st.integers(1, 2**31)
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
    mounts=st.lists(words, max_size=5).map(tuple),
    network=st.just("user"),
    workdir=paths,
    shell=st.none() | paths,
    script=hashes,
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
        {"version": 2},
        {"version": True},
        {"more": 1},
        {"groups": []},
        {"groups": [{"image": "micro"}]},
        {"groups": [{"image": "../x", "per_node": 1, "vcpus": 1, "ram_mib": 1}]},
        {"groups": [{"image": "micro", "per_node": 1, "vcpus": True, "ram_mib": 1}]},
        {"groups": [{"image": "micro", "per_node": 1, "vcpus": 1.0, "ram_mib": 1}]},
        {"groups": [{"image": "micro", "per_node": 0, "vcpus": 1, "ram_mib": 1}]},
        {"ruid": "../../../etc"},
        {"ruid": "0123456789abcdef\n"},
        {"distro": "a b"},
        {"network": "bridge"},
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
