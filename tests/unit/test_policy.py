"""The site's policy, as vsub applies it and as root applies it again to a specification."""

from __future__ import annotations

from typing import Any

import pytest
from test_jobspec import SPEC
from vsubsite import Site

from vmgr.config import Config, Mount, load_config
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Pool
from vmgr.jobspec import GuestGroup
from vmgr.policy import check_group, check_spec, choose_image, guest_group, visible_in_guest
from vmgr.request import Request, parse_vm


@pytest.fixture
def config(site: Site) -> Config:
    return load_config(site.install)


def request(text: str) -> Request:
    found = parse_vm(text, "here")
    assert found is not None
    return found


def test_defaults(config: Config) -> None:
    assert guest_group({}, config) == GuestGroup("micro", 1, 1, 512)
    assert guest_group(request("img=debian-12,vcpus=8,ram=4G"), config) == GuestGroup("debian-12", 1, 8, 4096)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"vcpus": 9}, "vcpus=9 (here) is above the maximum 8; 1 to 8 is allowed"),
        ({"vcpus": 0}, "vcpus=0 (here) is below the minimum 1"),
        ({"ram_mib": 127}, "ram=127M (here) is below the minimum 128M"),
        ({"ram_mib": 4097}, "ram=4097M (here) is above the maximum 4G"),
        ({"per_node": 2}, "vms_per_node=2 (here) is above the maximum 1"),
        ({"image": "suse"}, "img=suse (here): unknown image"),
    ],
)
def test_root_refuses_the_same_in_a_specification(config: Config, fields: dict[str, Any], text: str) -> None:
    group = GuestGroup("micro", 1, 2, 512)._replace(**fields)
    with pytest.raises(VTorqueError) as caught:
        check_spec(SPEC._replace(groups=(group,)), config, "here")
    assert text in str(caught.value)


def test_specification(config: Config) -> None:
    assert check_spec(SPEC, config, "here").name == "micro"
    for wrong, code in (
        (SPEC._replace(groups=SPEC.groups * 2), Code.POLICY),
        (SPEC._replace(mounts=("home", "secret")), Code.POLICY),
        (SPEC._replace(distro="redhat"), Code.IMAGE),
    ):
        with pytest.raises(VTorqueError) as caught:
            check_spec(wrong, config, "here")
        assert caught.value.code is code


def test_user_hooks_in_a_specification(site: Site) -> None:
    site.configure("policy: {user_vm_hooks: false}\n")
    with pytest.raises(VTorqueError, match="user_vm_hooks"):
        check_spec(SPEC._replace(vm_epilogue="0" * 64), load_config(site.install), "here")


def test_allowed_images(site: Site) -> None:
    site.configure("policy: {img: {default: micro, allowed: [micro]}}\n")
    with pytest.raises(VTorqueError, match=r"img=debian-12 is not allowed; allowed: micro \(.* line 3\)"):
        check_group(GuestGroup("debian-12", 1, 1, 512), load_config(site.install), {})


@pytest.mark.parametrize("distro", [None, "SLG", "slg", "micro", "MICRO"])
def test_distro_asserts(config: Config, distro: str | None) -> None:
    pool = Pool(config.images.pool)
    assert choose_image(GuestGroup("micro", 1, 1, 512), distro, pool, config, {}).name == "micro"


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("/home/carol", True),
        ("/home/carol/x", True),
        ("/home/carolyn", False),
        ("/home", False),
        ("/", False),
        ("/opt", False),
        ("/opt-hpc", False),
        ("/data/a", True),
    ],
)
def test_visible_in_guest(path: str, seen: bool) -> None:
    mounts = (
        Mount("home", "9p", "{home}", "{home}", False).for_home("/home/carol"),
        Mount("opt", "9p", "/opt", "/opt-hpc", True),
        Mount("data", "9p", "/data/", "/data/", False),
    )
    assert visible_in_guest(path, mounts) is seen
