"""What nodes cannot do yet: refused by name on the node, and named to administrators."""

from __future__ import annotations

from typing import Any, Optional

import pytest
from nodesite import a_spec

from vmgr.errors import Code, VTorqueError
from vmgr.jobspec import Disk, GuestGroup, Iocm
from vmgr.node.abilities import beyond_nodes, check
from vmgr.schema import check_config


def test_a_plain_job_is_possible() -> None:
    check(a_spec())
    check(a_spec(groups=(GuestGroup("micro", 3, 1, 512),)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"fs_type": "ramdisk"}, "fs_type=ramdisk"),
        ({"fs_type": "sharedfs"}, "fs_type=sharedfs"),
        ({"disk": Disk(None, 1024)}, "disk"),
        ({"disk": Disk("data.qcow2", None)}, "disk"),
        ({"iocm": Iocm(0, 0)}, "iocm"),
        ({"vrdma": True}, "vrdma"),
        ({"unclot_mib": 64}, "unclot"),
    ],
)
def test_what_is_not_possible_yet_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(VTorqueError, match=said) as caught:
        check(a_spec(**fields))
    assert caught.value.code is Code.NODE and "possible now: " in str(caught.value)


def notes(policy: dict[str, Any], bridge: Optional[str] = None, **components: bool) -> list[str]:
    tree = check_config({"policy": policy, "components": components})
    return beyond_nodes(tree["policy"], tree["components"], bridge)


def test_nodes_can_do_what_is_built_in() -> None:
    assert notes({}) == []
    assert notes({"nodes": {"max": 1024}, "vms_per_node": {"max": 16}}) == []


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"fs_type": {"allowed": ["overlay", "ramdisk"]}}, "policy.fs_type.allowed has ramdisk: "),
        ({"fs_type": {"allowed": ["ramdisk"], "default": "ramdisk", "enabled": False}}, "policy.fs_type.default is "),
        ({"metadata": {"allowed": ["runcmd", "users", "hostname"]}}, "policy.metadata.allowed has users, hostname: "),
        ({"disk": {"enabled": True}}, "policy.disk.enabled is true: "),
        ({"queues": {"io": {"disk": {"enabled": True}}}}, "policy.queues.io.disk.enabled is true: "),
        ({"groups": {"chem": {"disk": {"enabled": True}}}}, "policy.groups.chem.disk.enabled is true: "),
        (
            {"users": {"carol": {"fs_type": {"allowed": ["overlay", "ramdisk"]}}}},
            "policy.users.carol.fs_type.allowed has ",
        ),
    ],
)
def test_what_a_configuration_allows_beyond_that(policy: dict[str, Any], said: str) -> None:
    (line,) = notes(policy)
    assert line.startswith(said)


def test_a_bridge_that_the_site_has_not() -> None:
    policy = {"network": {"allowed": ["user", "bridge", "job"]}}
    (line,) = notes(policy)
    assert line == "policy.network.allowed has bridge: nodes refuse it as long as network.bridge.name is not set"
    assert notes(policy, bridge="br0") == []
    assert notes({"network": {**policy["network"], "enabled": False}}) == []
    assert len(notes({"network": {**policy["network"], "enabled": False, "several": "bridge"}})) == 1


def test_what_nobody_may_ask_for_is_no_news() -> None:
    assert notes({"fs_type": {"allowed": ["overlay", "ramdisk"], "enabled": False}}) == []
    assert notes({"metadata": {"allowed": ["users"], "enabled": False}}) == []
    assert notes({"metadata": {"allowed": ["runcmd", "write_files"]}}) == []


def test_an_override_says_only_what_is_its_own() -> None:
    some, more = ({"fs_type": {"allowed": ["overlay", *words]}} for words in (["ramdisk"], ["ramdisk", "sharedfs"]))
    overrides = {"fast": {"vcpus": {"max": 2}}, "big": more, "same": some}
    lines = notes({**some, "queues": overrides})
    assert [line.partition(" ")[0] for line in lines] == ["policy.fs_type.allowed", "policy.queues.big.fs_type.allowed"]


def test_components_count_where_the_site_has_them() -> None:
    assert notes({"iocm": {"default": True}, "unclot": {"default": True}}) == []
    lines = notes({"vrdma": {"enabled": False}, "unclot": {"default": True}}, iocm=True, vrdma=True, unclot=True)
    assert [line.partition(" ")[0] for line in lines] == ["policy.iocm.enabled", "policy.unclot.default"]
    (line,) = notes({"iocm": {"enabled": False}, "users": {"carol": {"iocm": {"enabled": True}}}}, iocm=True)
    assert line.startswith("policy.users.carol.iocm.enabled is true")
