"""The keys of -vm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgr.errors import Code, VTorqueError
from vmgr.request import KEYS, Asked, Request, merge, parse_vm


def test_values_are_typed() -> None:
    assert parse_vm("img=a,vcpus=2,ram=1.5G,vm_prologue=/x=y", "here") == {
        "img": Asked("a", "here"),
        "vcpus": Asked(2, "here"),
        "ram": Asked(1536, "here"),
        "vm_prologue": Asked("/x=y", "here"),
    }
    assert parse_vm("off", "here") is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", Code.KEY),
        ("img", Code.KEY),
        ("img=a,", Code.KEY),
        (",img=a", Code.KEY),
        ("Img=a", Code.KEY),
        ("off,img=a", Code.KEY),
        ("img=a,img=b", Code.KEY),
        ("img=", Code.VALUE),
        ("vcpus=", Code.VALUE),
        ("vcpus=1.5", Code.VALUE),
        ("vcpus=-1", Code.VALUE),
        ("ram=lots", Code.VALUE),
    ],
)
def test_refusals(text: str, code: Code) -> None:
    with pytest.raises(VTorqueError) as caught:
        parse_vm(text, "job.sh line 3")
    assert caught.value.code is code
    assert "job.sh line 3" in str(caught.value)


def test_merge_names_both_places() -> None:
    request: Request = {"ram": Asked(512, "a")}
    merge(request, {"ram": Asked(512, "b"), "vcpus": Asked(1, "b")})
    assert request["ram"].source == "a"
    with pytest.raises(VTorqueError, match=r"1 \(b\) and 2 \(c\)"):
        merge(request, {"vcpus": Asked(2, "c")})


@given(st.one_of(st.text(), st.lists(st.tuples(st.sampled_from(KEYS), st.text())).map(
    lambda items: ",".join(f"{key}={value}" for key, value in items)
)))  # fmt: skip
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse_vm(text, "here")
    except VTorqueError as err:
        assert str(err).isprintable()
