"""What a QEMU says of itself when its guest is stored: it is the user's, and may say anything."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ

from vmgr.errors import VTorqueError
from vmgr.node.suspending import describe, unbound
from vmgr.topology.model import Cell, Layout

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["qemu", "package", "enabled"]), inner),
)
NUMBERS = st.fixed_dictionaries({part: ANYTHING | st.integers(0, 99) for part in ("major", "minor", "micro")})


def described(kvm: Any, version: Any) -> Any:
    async def execute(command: str) -> Any:
        return {"query-kvm": kvm, "query-version": version}[command]

    monitor: Any = SimpleNamespace(execute=execute)
    return asyncio.run(describe(monitor, 1, "ssh-ed25519 x", ()))


@FUZZ
@given(ANYTHING, ANYTHING | st.fixed_dictionaries({"qemu": NUMBERS | ANYTHING}, optional={"package": ANYTHING}))
def test_whatever_it_says(kvm: Any, version: Any) -> None:
    try:
        part = described(kvm, version)
    except VTorqueError as err:
        assert str(err) == "VT-GUEST: QEMU does not say what it is"
    else:
        assert part.accelerator in ("kvm", "tcg") and part.qemu.isprintable()


def test_what_it_should_say() -> None:
    version = {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "Debian 1:7.2+dfsg-7"}
    part = described({"enabled": True, "present": True}, version)
    assert (part.node, part.accelerator, part.qemu) == (1, "kvm", "7.2.22 (Debian 1:7.2+dfsg-7)")
    assert described({"enabled": False}, {**version, "package": ""})[2:4] == ("tcg", "7.2.22")


def test_a_layout_is_bound_to_no_node_of_a_host() -> None:
    layout = Layout(1, 2, 1, (Cell((0,), 256, 1), Cell((1,), 256, 0)), ((10, 20), (20, 10)))
    assert [cell.host_node for cell in unbound(layout).cells] == [None, None]
    assert unbound(layout).distances == layout.distances and unbound(unbound(layout)) == unbound(layout)
