"""The configuration: read whole, checked whole, and what is wrong named by file, line and key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmgr.config import Bounds, Config, compile_config, load_config, read_tree
from vmgr.errors import Code, VTorqueError
from vmgr.paths import Installation
from vmgr.schema import SCHEMA, Items, Key


@pytest.fixture
def install(tmp_path: Path) -> Installation:
    install = Installation(tmp_path)
    install.config.parent.mkdir(parents=True)
    return install


def load(install: Installation, text: str) -> Config:
    install.config.write_text(text)
    return load_config(install)


def test_empty_file_is_all_defaults(install: Installation) -> None:
    config = load(install, "")
    assert config.engine == "torque"
    assert config.submit.without_vm == "guest"
    assert config.policy.img.default is None
    assert [mount.name for mount in config.mounts] == ["home", "opt-hpc"]
    assert config.origin("policy.ram.max") == "the built-in default"


def test_values_and_their_origin(install: Installation) -> None:
    config = load(install, "# site\npolicy:\n  ram: {min: 256, max: 1.5G, default: 512M}\n  img:\n    default: micro\n")
    assert config.policy.ram == Bounds(256, 1536, 512)
    assert config.policy.img.default == "micro"
    assert config.origin("policy.ram.max") == f"{install.config} line 3"
    assert config.origin("policy.img.default") == f"{install.config} line 5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine: slurm\n", "line 1: engine is 'slurm': one of torque, local is needed"),
        ("\nengin: local\n", "line 2: engin is 'local': unknown key; allowed here: engine, submit"),
        ("policy:\n  vcpus:\n    max: many\n", "line 3: policy.vcpus.max is 'many'"),
        ("policy:\n  vcpus:\n    max: true\n", "line 3: policy.vcpus.max is 'True'"),
        (
            "policy:\n  ram: {max: 1G, default: 2G}\n",
            "line 2: policy.ram: min 128M, default 2G, max 1G are not in this",
        ),
        ("policy: 3\n", "line 1: policy is '3': a mapping of img, vcpus"),
        ("engine: local\nengine: torque\n", "line 2: engine stands a second time"),
        ("a: [\n", "line 2: not YAML"),
        ("a: &x 1\nb: *x\n", "aliases"),
        ("\tengine: local\n", "line 1: not YAML"),
        ("engine: !!python/object/apply:os.system [true]\n", "line 1: not YAML"),
        ("mounts: [{name: a, source: /a}]\n", "line 1: mounts[0]: the key target is missing"),
        ("mounts: [{name: a, source: /a/../b, target: /b}]\n", "mounts[0].source"),
        (
            "mounts:\n- {name: a, source: /a, target: /a}\n- {name: a, source: /b, target: /b}\n",
            "line 2: mounts[0].name is 'a': a is used twice",
        ),
        ("policy: {img: {default: a, allowed: [b]}}\n", "a is not among the images allowed"),
        ("paths: {spool: relative}\n", "paths.spool is 'relative'"),
        ("a: \x01\n", "not YAML"),
    ],
)
def test_wrong_files(install: Installation, text: str, message: str) -> None:
    with pytest.raises(VTorqueError) as caught:
        load(install, text)
    assert caught.value.code is Code.CONFIG
    assert str(install.config) in str(caught.value) and message in str(caught.value)
    assert str(caught.value).isprintable()


def test_missing_file(install: Installation) -> None:
    with pytest.raises(VTorqueError, match="No such file"):
        load_config(install)


def test_compiled_copy(install: Installation) -> None:
    install.config.write_text("policy: {vcpus: {max: 7}}\n")
    compiled = compile_config(install)
    path = install.config.with_name("vtorque.yaml.compiled")
    assert path.stat().st_mode & 0o777 == 0o644
    assert load_config(install) == compiled
    data = json.loads(path.read_text())
    data["tree"]["policy"]["vcpus"]["max"] = 8
    path.write_text(json.dumps(data))
    assert load_config(install).policy.vcpus.max == 8  # shows that the copy is what is read
    path.chmod(0o664)
    assert load_config(install).policy.vcpus.max == 7
    path.chmod(0o644)
    install.config.write_text("policy: {vcpus: {max: 9}}\n")
    assert load_config(install).policy.vcpus.max == 9


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has files that others must not write")
def test_root_believes_only_root(install: Installation) -> None:
    install.config.write_text("")
    install.config.chmod(0o666)
    with pytest.raises(VTorqueError) as caught:
        load_config(install)
    assert caught.value.code is Code.TRUST
    install.config.chmod(0o644)
    os.chown(install.config.parent, 65534, 65534)
    with pytest.raises(VTorqueError) as caught:
        load_config(install)
    assert caught.value.code is Code.TRUST


def keys(section: dict[str, Any]) -> list[str]:
    """Every word that stands somewhere in the schema."""
    found = []
    for word, kind in section.items():
        found.append(word)
        if isinstance(kind, Items):
            found += keys(dict(kind.section))
        elif not isinstance(kind, Key):
            found += keys(kind)
    return found


scalars = st.none() | st.booleans() | st.integers(-5, 10**10) | st.floats() | st.text(max_size=12) | st.dates()
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(keys(SCHEMA)) | scalars, inner, max_size=4)
    ),
    max_leaves=10,
)
quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def read_or_refuse(install: Installation, data: bytes) -> None:
    install.config.write_bytes(data)
    try:
        read_tree(install.config)
        load_config(install)
    except VTorqueError as err:
        assert err.code is Code.CONFIG and str(err).isprintable()


@quick
@given(st.binary(max_size=120))
def test_any_bytes(install: Installation, data: bytes) -> None:
    read_or_refuse(install, data)


@quick
@given(trees)
def test_any_tree(install: Installation, tree: Any) -> None:
    read_or_refuse(install, yaml.safe_dump(tree).encode())


@quick
@given(st.text("ab:-[]{}&*!|>?'\"#%@ \n\t", max_size=60))
def test_any_yaml_like_text(install: Installation, text: str) -> None:
    read_or_refuse(install, text.encode())
