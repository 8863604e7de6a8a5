"""The policy that holds for one submission: the user's override, the group's, the queue's, the general value."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmgr.config import Config, load_config
from vmgr.errors import Code, VTorqueError
from vmgr.paths import Installation
from vmgr.policy import Bounds, Policy, Subject

TEXT = """\
policy:
  vcpus: {max: 8, default: 2}
  ram: {max: 4G}
  img: {default: micro}
  raise_requests: false
  queues:
    long:
      vcpus: {max: 16, default: 4}
      ram: {min: 1G}
      raise_requests: true
    a.b-c_d: {nodes: {max: 4}}
  groups:
    chem:
      vcpus: {max: 32}
      img: {allowed: [micro, debian-12]}
  users:
    carol:
      vcpus: {min: 3}
      ram: {max: 768M}
    erin:
      vcpus: {max: 1}
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    install = Installation(tmp_path)
    install.config.parent.mkdir(parents=True)
    install.config.write_text(TEXT)
    return load_config(install)


def policy(config: Config, user: str = "dave", group: str | None = "users", queue: str | None = None) -> Policy:
    return config.policy_for(Subject(user, group, queue))


@pytest.mark.parametrize(
    ("subject", "vcpus", "ram", "raised"),
    [
        (("dave", "users", None), (1, 8, 2), (128, 4096, 512), False),
        (("dave", None, "short"), (1, 8, 2), (128, 4096, 512), False),
        (("dave", "users", "long"), (1, 16, 4), (1024, 4096, 1024), True),
        (("dave", "chem", None), (1, 32, 2), (128, 4096, 512), False),
        (("dave", "chem", "long"), (1, 32, 4), (1024, 4096, 1024), True),
        (("carol", "chem", None), (3, 32, 3), (128, 768, 512), False),
        (("erin", "users", None), (1, 1, 1), (128, 4096, 512), False),
        (("erin", "chem", "long"), (1, 1, 1), (1024, 4096, 1024), True),
    ],
)
def test_the_most_specific_wins_leaf_by_leaf(
    config: Config,
    subject: tuple[str, str | None, str | None],
    vcpus: tuple[int, ...],
    ram: tuple[int, ...],
    raised: bool,
) -> None:
    found = policy(config, *subject)
    assert found.bounds("vcpus") == Bounds(*vcpus)
    assert found.bounds("ram") == Bounds(*ram)
    assert found.flag("raise_requests") is raised


def test_two_overrides_that_leave_nothing(config: Config) -> None:
    with pytest.raises(VTorqueError) as caught:
        policy(config, "carol", "users", "long").bounds("ram")
    assert caught.value.code is Code.CONFIG
    assert str(caught.value) == (
        f"VT-CONFIG: policy.ram: min 1G ({config.source} line 9, policy.queues.long.ram.min) is above "
        f"max 768M ({config.source} line 19, policy.users.carol.ram.max); two overrides exclude each other"
    )


@pytest.mark.parametrize(
    ("subject", "key", "leaf", "origin"),
    [
        (("dave", "users", None), "vcpus", "max", "{config} line 2"),
        (("dave", "users", None), "vcpus", "min", "the built-in default"),
        (("dave", "users", "long"), "vcpus", "max", "{config} line 8, policy.queues.long.vcpus.max"),
        (("dave", "chem", "long"), "vcpus", "max", "{config} line 14, policy.groups.chem.vcpus.max"),
        (("dave", "chem", "long"), "vcpus", "default", "{config} line 8, policy.queues.long.vcpus.default"),
        (("carol", "chem", "long"), "vcpus", "min", "{config} line 18, policy.users.carol.vcpus.min"),
        (("dave", "users", "long"), "raise_requests", None, "{config} line 10, policy.queues.long.raise_requests"),
        (("dave", "users", "a.b-c_d"), "nodes", "max", "{config} line 11, policy.queues.a.b-c_d.nodes.max"),
    ],
)
def test_origin(
    config: Config, subject: tuple[str, str | None, str | None], key: str, leaf: str | None, origin: str
) -> None:
    assert policy(config, *subject).origin(key, leaf) == origin.format(config=config.source)


def test_other_leaves(config: Config) -> None:
    general, chem = policy(config), policy(config, group="chem")
    assert (general.default("img"), general.allowed("img")) == ("micro", None)
    assert (chem.default("img"), chem.allowed("img")) == ("micro", ("micro", "debian-12"))
    assert general.enabled("disk") is False and general.enabled("vm_prologue") is True
    assert general.leaf("disk", "max") == 102400
    assert policy(config, queue="a.b-c_d").bounds("nodes") == Bounds(1, 4, 1)


def test_an_override_changes_nothing_for_others(config: Config) -> None:
    before = policy(config).rows()
    policy(config, "carol", "chem", "long").rows()
    assert policy(config).rows() == before


def test_rows(config: Config) -> None:
    rows = {key: (value, origin) for key, value, origin in policy(config, "carol", "chem", "long").rows()}
    assert rows["policy.ram.max"] == ("768M", f"{config.source} line 19, policy.users.carol.ram.max")
    assert rows["policy.vcpus.default"] == (4, f"{config.source} line 8, policy.queues.long.vcpus.default")
    assert rows["policy.disk.max"] == ("100G", "the built-in default")
    assert rows["policy.grow_defaults"] == (True, "the built-in default")
    assert not any(key.startswith(("policy.users", "policy.groups", "policy.queues")) for key in rows)
