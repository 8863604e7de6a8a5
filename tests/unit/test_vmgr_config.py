"""`vmgr config check` and `show` for one user or queue: what holds, where it comes from, what contradicts itself."""

from __future__ import annotations

import grp
import json
import os
import pwd
from typing import Any

import pytest
from test_vmgr_cli import Vmgr
from test_vmgr_cli import vmgr_run as vmgr_run  # the fixture

from vmgr.consistency import MAX_COMBINATIONS, contradictions, examine
from vmgr.errors import Code, VTorqueError
from vmgr.origins import Source, flat, policy_sources, sources
from vmgr.policy import Subject, effective_policy
from vmgr.schema import check_config

pytestmark = pytest.mark.script_launch_mode("inprocess")

USER = pwd.getpwuid(os.geteuid()).pw_name
GROUP = grp.getgrgid(pwd.getpwnam(USER).pw_gid).gr_name
TEXT = f"""\
hypervisor: {{qemu: /opt/qemu}}
policy:
  vcpus: {{min: 1, max: 16, default: 8}}
  img: {{default: micro, allowed: [micro, big]}}
  queues:
    long:
      vcpus: {{max: 4}}
      img: {{allowed: [micro], default: micro}}
    many:
      vcpus: {{min: 6}}
  groups:
    {GROUP}: {{ram: {{max: 2G}}}}
  users:
    {USER}:
      vcpus: {{max: 5}}
      img: {{default: big}}
"""
LINES = {"policy.vcpus.max": 3, "policy.queues.long.vcpus.max": 7, "policy.users.carol.vcpus.max": 12}


def tree(**policy: Any) -> dict[str, Any]:
    return check_config({"policy": policy})


def policy_of(checked: dict[str, Any], subject: Subject) -> Any:
    return effective_policy(checked["policy"], subject, lambda key: key)


def written(vmgr_run: Vmgr, text: str = TEXT) -> Vmgr:
    config = vmgr_run.node.install.config
    config.write_text(text)
    return vmgr_run


def test_sources_of_plain_values() -> None:
    found = sources(check_config({"hypervisor": {"vhost": False}}), {"hypervisor.vhost": 4, "hypervisor": 4})
    assert found["hypervisor.vhost"] == [Source(False, "file", 4), Source(True, "default", None)]
    assert found["hypervisor.qemu"] == [Source("/usr/bin/qemu-system-x86_64", "default", None)]
    assert found["mounts[0].name"] == [Source("home", "default", None)]


def test_sources_of_what_has_no_default() -> None:
    mounts = [{"name": "home", "source": "{home}", "target": "{home}"}] + [
        {"name": f"m{number}", "source": f"/m{number}", "target": f"/m{number}"} for number in range(3)
    ]
    found = sources(check_config({"mounts": mounts}), {"mounts[3].name": 9})
    assert found["mounts[3].name"] == [Source("m2", "file", 9)] and found["mounts[3].kind"][0].layer == "default"


def test_sources_of_the_policy() -> None:
    checked = tree(
        vcpus={"max": 16}, queues={"long": {"vcpus": {"max": 4}}}, users={"carol": {"vcpus": {"max": 5}}},
    )  # fmt: skip
    found = policy_sources(checked, LINES, Subject("carol", "chem", "long"))["policy.vcpus.max"]
    assert found == [
        Source(5, "users.carol", 12), Source(4, "queues.long", 7), Source(16, "file", 3), Source(64, "default", None),
    ]  # fmt: skip
    assert [place.text for place in found] == ["line 12, users.carol", "line 7, queues.long", "line 3", "default"]
    found = policy_sources(checked, LINES, Subject("dave", None, None))["policy.vcpus.max"]
    assert [place.layer for place in found] == ["file", "default"]


def test_every_key_has_a_source() -> None:
    checked = tree()
    assert set(sources(checked, {})) == {key for key, _ in flat(checked)}


def test_a_default_that_an_override_has_moved() -> None:
    checked = tree(
        img={"default": "micro"}, vcpus={"default": 8, "max": 16}, queues={"long": {"vcpus": {"max": 4}}},
    )  # fmt: skip
    assert examine(policy_of(checked, Subject("", None, None))) == []
    (note,) = examine(policy_of(checked, Subject("", None, "long")))
    assert note.startswith("policy.vcpus.default is 8 (policy.vcpus.default)") and note.endswith("4 holds")


def test_an_image_that_is_nobodys_default() -> None:
    (note,) = examine(policy_of(tree(), Subject("", None, None)))
    assert "policy.img.default is not set" in note


def test_overrides_that_exclude_each_other() -> None:
    checked = tree(
        queues={"many": {"vcpus": {"min": 6}}, "long": {}},
        users={"carol": {"vcpus": {"max": 5, "default": 1}}, "dave": {}},
        groups={"chem": {"ram": {"max": 256}}},
    )  # fmt: skip
    with pytest.raises(VTorqueError, match=r"min 6 .* is above max 5") as raised:
        examine(policy_of(checked, Subject("carol", None, "many")))
    assert raised.value.code is Code.CONFIG
    (line,) = contradictions(checked["policy"], lambda subject: policy_of(checked, subject), lambda user: None)
    assert "min 6" in line and "max 5" in line
    examine(policy_of(checked, Subject("dave", "chem", "many")))


def test_a_group_and_a_queue_that_exclude_each_other() -> None:
    checked = tree(queues={"big": {"ram": {"min": 1024}}}, groups={"chem": {"ram": {"max": 512}}}, users={"carol": {}})
    found = contradictions(checked["policy"], lambda subject: policy_of(checked, subject), lambda user: "chem")
    assert len(found) == 1 and "min 1G" in found[0], "told once, though it holds for the user too"


def test_very_many_overrides_are_looked_at_for_a_while_only() -> None:
    names = [f"n{number}" for number in range(200)]
    policy: dict[str, Any] = {layer: {name: {} for name in names} for layer in ("queues", "groups", "users")}
    asked = []

    def policy_for(subject: Subject) -> Any:
        asked.append(subject)
        raise VTorqueError("no", code=Code.CONFIG)

    assert contradictions(policy, policy_for, lambda user: None) == ["no"] and len(asked) == MAX_COMBINATIONS


# the commands


def test_check_for_a_user_and_a_queue(vmgr_run: Vmgr) -> None:
    config = written(vmgr_run).node.install.config
    status, out, err = vmgr_run("config", "check")
    assert (status, err) == (0, "") and out.endswith(f"{config}: ok\n") and "note: policy.vcpus: min 6" in out
    status, out, err = vmgr_run("config", "check", "--queue", "long", "--user", USER)
    assert (status, err) == (0, "") and "policy.vcpus.default is 8" in out and "5 holds" in out
    assert f"policy.img.default is big ({config} line 16, policy.users.{USER}.img.default)" in out
    line = vmgr_run.refuses("config", "check", "--queue", "many", "--user", USER)
    assert line.startswith("VT-CONFIG: policy.vcpus: min 6") and "line 10" in line and "line 15" in line
    assert vmgr_run.refuses("config", "check", "--user", "no-such").startswith("VT-VALUE: --user no-such")


def test_check_for_programs(vmgr_run: Vmgr) -> None:
    config = written(vmgr_run).node.install.config
    found = json.loads(vmgr_run("config", "check", "--json").stdout)
    assert (found["ok"], found["error"], found["file"]) == (True, None, str(config)) and len(found["notes"]) == 1
    status, out, err = vmgr_run("config", "check", "--json", "--queue", "many", "--user", USER)
    found = json.loads(out)
    assert (status, err, found["ok"], found["error"]["code"]) == (2, "", False, "VT-CONFIG")
    written(vmgr_run, "engine: nonsense\n")
    status, out, err = vmgr_run("config", "check", "--json")
    assert (status, err) == (2, "") and "line 1: engine" in json.loads(out)["error"]["text"]


def test_show_with_origins(vmgr_run: Vmgr) -> None:
    written(vmgr_run)
    rows = {row["key"]: row for row in json.loads(vmgr_run("config", "show", "--origin", "--json").stdout)}
    assert rows["hypervisor.qemu"] == {
        "key": "hypervisor.qemu", "value": "/opt/qemu", "layer": "file", "line": 1,
        "overrides": [{"value": "/usr/bin/qemu-system-x86_64", "layer": "default", "line": None}],
    }  # fmt: skip
    assert (rows["timeouts.boot"]["layer"], rows["timeouts.boot"]["line"]) == ("default", None)
    (row,) = json.loads(
        vmgr_run("config", "show", "--origin", "--json", "--user", USER, "--queue", "long", "--value",
                 "policy.vcpus.max").stdout
    )  # fmt: skip
    assert (row["value"], row["layer"], row["line"]) == (5, f"users.{USER}", 15)
    assert [over["layer"] for over in row["overrides"]] == ["queues.long", "file", "default"]
    out = vmgr_run("config", "show", "--origin", "--queue", "long").stdout
    (line,) = (line for line in out.splitlines() if line.startswith("policy.vcpus.max "))
    assert line.split(None, 4) == ["policy.vcpus.max", "4", "queues.long", "7", "16 (line 3), 64 (default)"]
    assert f"groups.{GROUP}" in vmgr_run("config", "show", "--origin", "--user", USER).stdout
    assert vmgr_run.refuses("config", "show", "--origin", "--value", "nope").startswith("VT-KEY")


def test_show_without_origins_is_as_ever(vmgr_run: Vmgr) -> None:
    written(vmgr_run)
    out = vmgr_run("config", "show", "--queue", "long").stdout
    assert out.splitlines()[0].split() == ["KEY", "VALUE", "ORIGIN"] and "policy.queues.long.vcpus.max" in out
