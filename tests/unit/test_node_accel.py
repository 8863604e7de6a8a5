"""What a node knows of KVM. Starting a kernel needs root: tests/node."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodesite import Node, make_node, short_folder

from vmgr.errors import Code, VTorqueError
from vmgr.node import accel, process
from vmgr.node.accel import Kvm, choose_accelerator, kvm_gid, probe, probe_beside


@pytest.fixture
def node() -> Iterator[Node]:
    with short_folder() as base:
        yield make_node(base)


def test_which_accelerator(node: Node) -> None:
    assert choose_accelerator(node.config, Kvm(True, "")) == "kvm"
    with pytest.raises(VTorqueError, match="there is no /dev/kvm") as caught:
        choose_accelerator(node.config, Kvm(False, "there is no /dev/kvm"))
    assert caught.value.code is Code.NODE and "hypervisor.allow_emulation" in str(caught.value)
    emulating = make_node(node.base / "other", hypervisor={"allow_emulation": True}).config
    assert choose_accelerator(emulating, Kvm(False, "x")) == "tcg"
    assert choose_accelerator(emulating, Kvm(True, "")) == "kvm"


def test_a_missing_device_is_remembered_until_the_next_boot(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "DEVICE", node.base / "no-kvm")
    reason = f"there is no {node.base / 'no-kvm'}"
    assert probe(node.config, Path("/vmlinuz")) == (False, reason)
    known = node.config.paths.run / "kvm.json"
    assert json.loads(known.read_text()) == {"boot": process.boot_id(), "works": False, "reason": reason}
    known.write_text(json.dumps({"boot": process.boot_id(), "works": True, "reason": "found before"}))
    assert probe(node.config, Path("/vmlinuz")) == (True, "found before")
    assert asyncio.run(probe_beside(node.config, Path("/vmlinuz"))) == (True, "found before")
    known.write_text(json.dumps({"boot": "an earlier boot", "works": True, "reason": "found before"}))
    assert asyncio.run(probe_beside(node.config, Path("/vmlinuz"))) == (False, reason)
    assert [path.name for path in node.config.paths.run.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"boot": 1}', '{"works": true}', "\xff"])
def test_a_memory_that_cannot_be_read_is_none(node: Node, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "DEVICE", node.base / "no-kvm")
    node.config.paths.run.mkdir()
    (node.config.paths.run / "kvm.json").write_text(text)
    assert not probe(node.config, Path("/vmlinuz")).works


def test_the_group_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "kvm"
    monkeypatch.setattr(accel, "DEVICE", device)
    assert kvm_gid() is None
    device.touch()
    gid = device.stat().st_gid
    for mode, found in ((0o660, gid or None), (0o666, gid or None), (0o600, None), (0o640, None)):
        device.chmod(mode)
        assert kvm_gid() == found
    if os.geteuid() == 0:
        os.chown(device, 0, 4711)
        device.chmod(0o660)
        assert kvm_gid() == 4711
