"""Cloud-config of the user's own: both it and the template's take effect, or it is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, TEMPLATES, a_user

from vmgr.config import Software
from vmgr.errors import Code, VTorqueError
from vmgr.node.cloudconfig import HEADER, KEYS, LISTS, MODULES, merge, with_software
from vmgr.node.network.plan import GuestNet
from vmgr.node.seed import SeedPlan, seed_files

TEMPLATE = b"""\
#cloud-config
# vtorque: guest program only
cloud_init_modules: [bootcmd]
cloud_config_modules: []
cloud_final_modules: []
growpart: {mode: "off"}
resize_rootfs: false
ssh_genkeytypes: []
bootcmd:
  - [sh, -c, "start it"]
"""
OURS = yaml.safe_load(TEMPLATE)


def merged(metadata: dict[str, Any]) -> dict[str, Any]:
    data = merge(TEMPLATE, metadata).user_data
    assert data.startswith(HEADER) and b"vtorque: guest program only" not in data
    tree: dict[str, Any] = yaml.safe_load(data)
    return tree


def test_a_key_runs_its_modules_at_the_end() -> None:
    files = [{"path": "/etc/motd", "content": "hello\n"}]
    tree = merged({"runcmd": [["true"]], "write_files": files, "packages": [], "timezone": "Europe/Berlin"})
    assert tree["cloud_init_modules"] == ["bootcmd"] and tree["cloud_config_modules"] == []
    assert tree["cloud_final_modules"] == [
        "write-files", "timezone", "runcmd", "package-update-upgrade-install", "write-files-deferred", "scripts-user",
    ]  # fmt: skip
    assert tree["write_files"] == files and tree["runcmd"] == [["true"]] and tree["packages"] == []
    assert {key: tree[key] for key in OURS if key != "cloud_final_modules"} == {
        key: value for key, value in OURS.items() if key != "cloud_final_modules"
    }


def test_commands_of_both_run_ours_first() -> None:
    tree = merged({"bootcmd": ["echo theirs"]})
    assert tree["bootcmd"] == [["sh", "-c", "start it"], "echo theirs"]
    assert merge(TEMPLATE, {"bootcmd": ["echo theirs"]}).stages == ()


def test_stages_that_have_something_to_do() -> None:
    assert merge(TEMPLATE, {"runcmd": []}).stages == ("final",)
    assert merge(TEMPLATE, {"cloud_config_modules": ["runcmd"], "runcmd": []}).stages == ("config", "final")
    assert merge(TEMPLATE, {"cloud_config_modules": ["timezone"]}).stages == ("config",)


@pytest.mark.parametrize("item", ["write_files", "write-files", ["write-files", "always"], {"name": "write-files"}])
def test_a_module_that_the_user_has_placed_is_not_placed_again(item: Any) -> None:
    tree = merged({"cloud_init_modules": [item], "write_files": []})
    assert tree["cloud_init_modules"] == ["bootcmd", item]
    assert tree["cloud_final_modules"] == ["write-files-deferred"]


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"hostname": "x"}, "hostname"), ({"users": []}, "users"), ({"power_state": {}}, "power_state"),
        ({"ssh_keys": {}}, "ssh_keys"), ({"datasource": {}}, "datasource"), ({"no_such_key": 1}, "no_such_key"),
        ({"resize_rootfs": True}, "resize_rootfs"), ({"resize_rootfs": 0}, "resize_rootfs"),
        ({"growpart": {"mode": "auto"}}, "growpart.mode"), ({"growpart": {"devices": ["/"]}}, "growpart"),
        ({"ssh_genkeytypes": ["rsa"]}, "ssh_genkeytypes"),
        ({"bootcmd": "echo"}, "bootcmd"), ({"cloud_init_modules": None}, "cloud_init_modules"),
        ({"cloud_final_modules": {"a": 1}}, "cloud_final_modules"),
    ],
)  # fmt: skip
def test_what_would_contradict_or_be_ignored_is_refused_by_name(metadata: dict[str, Any], named: str) -> None:
    with pytest.raises(VTorqueError, match=rf"metadata: .*\b{named}\b") as caught:
        merge(TEMPLATE, metadata)
    assert caught.value.code is Code.SPEC


def test_what_repeats_the_template_is_no_conflict() -> None:
    assert merged({"resize_rootfs": False, "growpart": {"mode": "off"}, "ssh_genkeytypes": []}) == OURS


def test_a_family_without_cloud_init() -> None:
    with pytest.raises(VTorqueError, match="takes no cloud-config") as caught:
        merge(b"#!/bin/sh\n", {"runcmd": []})
    assert caught.value.code is Code.SPEC


_TEXTS = st.text(st.characters(), max_size=20)
_ODD = st.sampled_from(["yes", "~", "=", "<<", "*a", "&a", "- x", "1e3", "\ud800"])
_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXTS | _ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(_PLAIN, st.sampled_from(sorted(KEYS - {"bootcmd", *LISTS})))
def test_any_value_says_exactly_itself(value: Any, key: str) -> None:
    tree = merged({key: value})
    assert tree[key] == value
    needed = [module for module, keys in MODULES.items() if key in keys]
    assert tree["cloud_final_modules"] == needed and (needed or key in ("bootcmd", *LISTS))


@FUZZ
@given(st.dictionaries(st.sampled_from([*sorted(KEYS), *OURS, "other"]), _PLAIN, max_size=4))
def test_anything_is_merged_or_refused(metadata: dict[str, Any]) -> None:
    try:
        tree = merged(metadata)
    except VTorqueError as err:
        assert err.code is Code.SPEC and str(err).isprintable()
        return
    for key, value in OURS.items():
        assert tree[key][: len(value)] == value if key in ("bootcmd", *LISTS) else tree[key] == value


def test_the_seed_of_a_guest_with_it() -> None:
    plan = SeedPlan(
        instance="12.host-1", hostname="vn1-1", family="debian", user=a_user(), ssh_public_key="ssh-ed25519 AAAA",
        host_key="key\n", host_key_pub="ssh-ed25519 BBBB", mounts=(),
        network=GuestNet("52:54:00:00:00:01"), hosts=(), slots=(("vn1-1", 1),), environment={},
        metadata={"runcmd": ["true"]},
    )  # fmt: skip
    files = seed_files(plan, TEMPLATES, {})
    ours = yaml.safe_load(seed_files(plan._replace(metadata=None), TEMPLATES, {})["user-data"])
    tree = yaml.safe_load(files["user-data"])
    assert files["vtorque/stages"] == b"final\n" and tree["runcmd"] == ["true"]
    assert tree["bootcmd"] == ours["bootcmd"] and tree["cloud_final_modules"] == ["runcmd", "scripts-user"]
    assert "vtorque/stages" not in seed_files(plan._replace(metadata={}), TEMPLATES, {})


def test_what_the_site_has_guests_install_comes_before_the_users_own() -> None:
    site = Software(("gcc", "make"), updates=True)
    both = with_software({"packages": ["make", "git"], "package_upgrade": False, "runcmd": ["true"]}, site)
    assert both == {
        "packages": ["gcc", "make", "git"], "package_update": True, "package_upgrade": True, "runcmd": ["true"],
    }  # fmt: skip
    assert with_software(None, Software()) == {}
    assert with_software(None, Software(updates=True)) == {"package_update": True, "package_upgrade": True}
    assert with_software({"packages": ["git"]}, Software()) == {"packages": ["git"]}
    with pytest.raises(VTorqueError, match="packages contradicts"):
        with_software({"packages": "git"}, site)


def test_the_seed_of_a_guest_that_installs() -> None:
    """The stage that installs is one that the guest program waits for, and the short way is not taken."""
    plan = SeedPlan(
        instance="12.host-1", hostname="vn1-1", family="debian", user=a_user(), ssh_public_key="ssh-ed25519 AAAA",
        host_key="key\n", host_key_pub="ssh-ed25519 BBBB", mounts=(),
        network=GuestNet("52:54:00:00:00:01"), hosts=(), slots=(("vn1-1", 1),), environment={},
        software=Software(("gcc",)),
    )  # fmt: skip
    files = seed_files(plan, TEMPLATES, {})
    tree = yaml.safe_load(files["user-data"])
    assert files["vtorque/stages"] == b"final\n" and b"guest program only" not in files["user-data"]
    assert (tree["packages"], tree["package_update"]) == (["gcc"], True) and "package_upgrade" not in tree
    assert tree["cloud_final_modules"] == ["package-update-upgrade-install"]
    plain = seed_files(plan._replace(software=Software()), TEMPLATES, {})["user-data"]
    assert b"package" not in plain and b"# vtorque: guest program only\n" in plain
