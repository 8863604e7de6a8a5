"""The keys of -vm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgr.errors import Code, VTorqueError
from vmgr.request import KEYS, Asked, Request, Value, merge, parse_vm, show


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("img=a,vcpus=2,ram=1.5G,vm_prologue=/x=y", {"img": "a", "vcpus": 2, "ram": 1536, "vm_prologue": "/x=y"}),
        ("ram=2048", {"ram": 2048}),
        ("ram=2048M", {"ram": 2048}),
        ("ram=2097152k", {"ram": 2048}),
        ("ram=0.5T", {"ram": 524288}),
        ("ram=1GiB,unclot_shmem=64m", {"ram": 1024, "unclot_shmem": 64}),
        ("distro=SLG,arch=x86_64", {"distro": "SLG", "arch": "x86_64"}),
        ("vms_per_node=3", {"vms_per_node": 3}),
        ("vcpu_pinning=off,fs_type=ramdisk", {"vcpu_pinning": "off", "fs_type": "ramdisk"}),
        ("network=job", {"network": "job"}),
        ("vcpu_pinning=numad", {"vcpu_pinning": "numad"}),
        ("vcpu_pinning=maps/a.yaml", {"vcpu_pinning": "maps/a.yaml"}),
        ("disk=10G", {"disk": 10240}),
        ("disk=/data/a=b.img", {"disk": "/data/a=b.img"}),
        ("mounts=home+opt-hpc", {"mounts": ("home", "opt-hpc")}),
        ("mounts=none", {"mounts": ()}),
        ("metadata=a,vm_epilogue=b", {"metadata": "a", "vm_epilogue": "b"}),
        ("iocm=true,iocm_min_cores=0,iocm_max_cores=2", {"iocm": True, "iocm_min_cores": 0, "iocm_max_cores": 2}),
        ("iocm=YES,vrdma=On,unclot=Enabled", {"iocm": True, "vrdma": True, "unclot": True}),
        ("iocm=false,vrdma=no,unclot=OFF", {"iocm": False, "vrdma": False, "unclot": False}),
        ("iocm=disabled", {"iocm": False}),
        ("vcpus=2,vcpus=2", {"vcpus": 2}),
        ("ram=1G,ram=1024M", {"ram": 1024}),
    ],
)  # fmt: skip
def test_values_are_typed(text: str, values: dict[str, Value]) -> None:
    assert parse_vm(text, "here") == {key: Asked(value, "here") for key, value in values.items()}


def test_off_stands_alone() -> None:
    assert parse_vm("off", "here") is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", Code.KEY),
        ("img", Code.VALUE),
        ("img=a,", Code.KEY),
        (",img=a", Code.KEY),
        ("Img=a", Code.KEY),
        ("off,img=a", Code.KEY),
        ("img=a,img=b", Code.KEY),
        ("img=", Code.VALUE),
        ("vcpus=", Code.VALUE),
        ("vcpus=1.5", Code.VALUE),
        ("vcpus=-1", Code.VALUE),
        ("vcpus=٣", Code.VALUE),
        ("vcpus=1234567890", Code.VALUE),
        ("ram=lots", Code.VALUE),
        ("ram=1.3M", Code.VALUE),
        ("ram=1K", Code.VALUE),
        ("ram=-1", Code.VALUE),
        ("disk=0", Code.VALUE),
        ("disk=10X", Code.VALUE),
        ("mounts=home+", Code.VALUE),
        ("mounts=a+a", Code.VALUE),
        ("iocm=0", Code.VALUE),
        ("iocm=1", Code.VALUE),
        ("vrdma=2", Code.VALUE),
        ("unclot=maybe", Code.VALUE),
        ("OFF", Code.KEY),
        ("vcpus = 2", Code.KEY),
    ],
)
def test_refusals(text: str, code: Code) -> None:
    with pytest.raises(VTorqueError) as caught:
        parse_vm(text, "job.sh line 3")
    assert caught.value.code is code
    assert "job.sh line 3" in str(caught.value)


@pytest.mark.parametrize("value", ["0", "1"])
@pytest.mark.parametrize("key", ["iocm", "vrdma", "unclot"])
def test_numbers_are_no_switches(key: str, value: str) -> None:
    with pytest.raises(VTorqueError) as caught:
        parse_vm(f"{key}={value}", "here")
    assert str(caught.value) == (
        f"VT-VALUE: {key}={value} in here cannot be read; true, yes, on, enabled or false, no, off, disabled is "
        "needed; 0 and 1 are ambiguous: to the vTorque of 2018, 0 was enabled and 1 disabled"
    )


def test_merge_names_both_places() -> None:
    request: Request = {"ram": Asked(512, "a")}
    merge(request, {"ram": Asked(512, "b"), "vcpus": Asked(1, "b")})
    assert request["ram"].source == "a"
    with pytest.raises(VTorqueError, match=r"1 \(b\) and 2 \(c\)"):
        merge(request, {"vcpus": Asked(2, "c")})


@given(st.one_of(st.text(), st.lists(st.tuples(st.sampled_from([*KEYS]), st.text())).map(
    lambda items: ",".join(f"{key}={value}" for key, value in items)
)))  # fmt: skip
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse_vm(text, "here")
    except VTorqueError as err:
        assert str(err).isprintable()


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("ram", 1536, "1536M"),
        ("ram", 2048, "2G"),
        ("disk", 1024, "1G"),
        ("disk", "/a", "/a"),
        ("vcpus", 1024, "1024"),
        ("mounts", (), "none"),
        ("mounts", ("a", "b"), "a+b"),
        ("iocm", True, "true"),
        ("vrdma", False, "false"),
    ],
)
def test_shown_as_written(key: str, value: Value, text: str) -> None:
    assert show(key, value) == text
    assert parse_vm(f"{key}={text}", "here") == {key: Asked(value, "here")}
