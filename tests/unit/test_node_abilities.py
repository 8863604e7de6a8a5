"""What nodes cannot do yet: refused by name on the node, and named to administrators."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import pytest
from nodesite import a_spec
from test_image_add import FACTS, a_pool

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Pool
from vmgr.jobspec import Disk, GuestGroup, Iocm
from vmgr.node.abilities import Provided, beyond_nodes, check, without_software
from vmgr.schema import check_config


def test_a_plain_job_is_possible() -> None:
    check(a_spec())
    check(a_spec(fs_type="ramdisk", disk=Disk(None, 1024)))
    check(a_spec(groups=(GuestGroup("micro", 3, 1, 512),)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"iocm": Iocm(0, 0)}, "iocm"),
        ({"vrdma": True}, "vrdma"),
        ({"unclot_mib": 64}, "unclot"),
    ],
)
def test_what_is_not_possible_yet_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(VTorqueError, match=said) as caught:
        check(a_spec(**fields))
    assert caught.value.code is Code.NODE and "possible now: " in str(caught.value)


def notes(
    policy: dict[str, Any],
    bridge: Optional[str] = None,
    workspace: Optional[str] = None,
    suspended: Optional[str] = None,
    **components: bool,
) -> list[str]:
    tree = check_config({"policy": policy, "components": components})
    return beyond_nodes(tree["policy"], tree["components"], Provided(bridge, workspace, suspended))


def test_nodes_can_do_what_is_built_in() -> None:
    assert notes({}) == []
    assert notes({"nodes": {"max": 1024}, "vms_per_node": {"max": 16}}) == []


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"fs_type": {"allowed": ["overlay", "sharedfs"]}}, "policy.fs_type.allowed has sharedfs: "),
        (
            {"fs_type": {"allowed": ["sharedfs"], "default": "sharedfs", "enabled": False}},
            "policy.fs_type.allowed has ",
        ),
        ({"metadata": {"allowed": ["runcmd", "users", "hostname"]}}, "policy.metadata.allowed has users, hostname: "),
        *(
            (
                {layer: {"one": {"fs_type": {"allowed": ["overlay", "sharedfs"]}}}},
                f"policy.{layer}.one.fs_type.allowed ",
            )
            for layer in ("queues", "groups", "users")
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
    assert notes({"fs_type": {"allowed": ["overlay", "sharedfs"], "enabled": False}}) == []
    assert notes({"fs_type": {"allowed": ["overlay", "sharedfs"]}}, workspace="/scratch/{job}") == []
    assert notes({"metadata": {"allowed": ["users"], "enabled": False}}) == []
    assert notes({"metadata": {"allowed": ["runcmd", "write_files"]}}) == []


def test_an_override_says_only_what_is_its_own() -> None:
    some, more = ({"metadata": {"allowed": words}} for words in (["users"], ["users", "hostname"]))
    overrides = {"fast": {"vcpus": {"max": 2}}, "big": more, "same": some}
    lines = notes({**some, "queues": overrides})
    words = [line.partition(" ")[0] for line in lines]
    assert words == ["policy.metadata.allowed", "policy.queues.big.metadata.allowed"]


def test_a_suspension_that_has_no_folder_is_told_of_where_it_is_the_default() -> None:
    assert notes({}) == notes({"suspend": {"enabled": True}}) == []
    assert notes({"suspend": {"default": True}}, suspended="/scratch/suspended") == []
    (line,) = notes({"suspend": {"default": True}})
    assert line == "policy.suspend.default is true: no job can be suspended as long as suspended.folder is not set"


def test_components_count_where_the_site_has_them() -> None:
    assert notes({"iocm": {"default": True}, "unclot": {"default": True}}) == []
    lines = notes({"vrdma": {"enabled": False}, "unclot": {"default": True}}, iocm=True, vrdma=True, unclot=True)
    assert [line.partition(" ")[0] for line in lines] == ["policy.iocm.enabled", "policy.unclot.default"]
    (line,) = notes({"iocm": {"enabled": False}, "users": {"carol": {"iocm": {"enabled": True}}}}, iocm=True)
    assert line.startswith("policy.users.carol.iocm.enabled is true")


def test_images_that_install_nothing_are_named(tmp_path: Path) -> None:
    pool = a_pool(tmp_path)
    with pool.staging("other") as work:
        (work / "out").mkdir()
        pool.publish(work / "out", "other", {**FACTS, "features": ["cloud-init"], "kernel": None, "initrd": None})

    def said(**guest: Any) -> list[str]:
        return without_software(check_config({"guest": guest})["guest"], pool)

    assert said() == [] == said(packages=[], updates=False)
    (line,) = said(packages=["gcc"])
    assert line.startswith("guest.packages: guests of debian-12 install nothing")
    assert said(packages=["gcc"], updates="boot")[0].startswith(
        "guest.packages and guest.updates: guests of debian-12 "
    )
    assert without_software(check_config({"guest": {"updates": "boot"}})["guest"], Pool(tmp_path / "none")) == []
