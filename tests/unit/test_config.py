"""The configuration: read whole, checked whole, and what is wrong named by file, line and key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Optional

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmgr.config import Config, Mount, compile_config, load_config, read_tree
from vmgr.errors import Code, VTorqueError
from vmgr.fields import Items, Key, Named, OneOf
from vmgr.paths import Installation
from vmgr.policy import Bounds, Policy, Subject
from vmgr.schema import SCHEMA


@pytest.fixture
def install(tmp_path: Path) -> Installation:
    install = Installation(tmp_path)
    install.config.parent.mkdir(parents=True)
    return install


def load(install: Installation, text: str) -> Config:
    install.config.write_text(text)
    return load_config(install)


def general(config: Config) -> Policy:
    """The policy of somebody for whom there is no override."""
    return config.policy_for(Subject("nobody", None, None))


def test_empty_file_is_all_defaults(install: Installation) -> None:
    config = load(install, "")
    assert config.engine == "torque"
    assert config.submit.without_vm == "guest"
    assert general(config).default("img") is None
    assert [mount.name for mount in config.mounts] == ["home", "opt-hpc"]
    assert config.origin("policy.ram.max") == "the built-in default"


def test_values_and_their_origin(install: Installation) -> None:
    config = load(install, "# site\npolicy:\n  ram: {min: 256, max: 1.5G, default: 512M}\n  img:\n    default: micro\n")
    assert general(config).bounds("ram") == Bounds(256, 1536, 512)
    assert general(config).default("img") == "micro"
    assert config.origin("policy.ram.max") == f"{install.config} line 3"
    assert config.origin("policy.img.default") == f"{install.config} line 5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine: lsf\n", "line 1: engine is 'lsf': one of torque, local, slurm is needed"),
        ("\nengin: local\n", "line 2: engin is 'local': unknown key; allowed here: engine, submit"),
        ("policy:\n  vcpus:\n    max: many\n", "line 3: policy.vcpus.max is 'many'"),
        ("policy:\n  vcpus:\n    max: true\n", "line 3: policy.vcpus.max is 'True'"),
        (
            "policy:\n  ram: {max: 1G, default: 2G}\n",
            "line 2: policy.ram: min 128M, default 2G, max 1G are not in this",
        ),
        ("policy: 3\n", "line 1: policy is '3': a mapping of nodes, img, distro"),
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
        (
            "policy: {img: {default: a, allowed: [b]}}\n",
            "line 1: policy.img.default is 'a': a is not among what is allowed: b",
        ),
        ("paths: {spool: relative}\n", "paths.spool is 'relative'"),
        (
            "policy: {user_vm_hooks: false}\n",
            "line 1: policy.user_vm_hooks is 'False': unknown key; allowed here: nodes,",
        ),
        ("policy: {nodes: {min: 3, max: 2}}\n", "line 1: policy.nodes: min 3 is above max 2"),
        ("policy: {mounts: {allowed: [home, scratch]}}\n", "scratch is none of the shares home, opt-hpc"),
        ("policy: {vcpu_pinning: {allowed: [auto], default: off}}\n", "off is not among what is allowed: auto"),
        (
            "policy: {vcpu_pinning: {default: file}}\n",
            "policy.vcpu_pinning.default is 'file': one of auto, off, numad is needed",
        ),
        ("policy: {users: 3}\n", "line 1: policy.users is '3': a mapping of names is needed"),
        (
            "policy:\n users:\n  carol: {cpus: {max: 1}}\n",
            "line 3: policy.users.carol.cpus: unknown key; allowed here: nodes",
        ),
        (
            "policy:\n queues:\n  long:\n   ram: {max: 64M}\n",
            "line 4: policy.queues.long.ram: min 128M is above max 64M",
        ),
        (
            "policy:\n groups:\n  users:\n   img: {allowed: [a], default: b}\n",
            "line 4: policy.groups.users.img.default is 'b': b is not among what is allowed: a",
        ),
        ("submit: {qsub: {'a b': /x}}\n", "line 1: submit.qsub.a b is '/x': a host name"),
        ("submit: {qsub: {login*: x}}\n", "line 1: submit.qsub.login* is 'x': an absolute path"),
        ("submit: {disabled_hosts: login}\n", "line 1: submit.disabled_hosts is 'login': a list of host names"),
        ("submit: {node_access: any}\n", "line 1: submit.node_access is 'any': one of uniqueuser, singlejob"),
        ("submit: {job_type: user}\n", "line 1: submit.job_type is 'user': a word of up to 32 letters"),
        ("submit: {job_type: user.x}\n", "line 1: submit.job_type is 'user.x': a word of up to 32 letters"),
        ("components: {iocm: 1}\n", "line 1: components.iocm is '1': true or false is needed"),
        ("resources: {host_cores: -1}\n", "line 1: resources.host_cores is '-1': a whole number from 0 to 1024"),
        ("policy: {raise_requests: 1}\n", "line 1: policy.raise_requests is '1': true or false is needed"),
        ("a: \x01\n", "not YAML"),
    ],
)
def test_wrong_files(install: Installation, text: str, message: str) -> None:
    with pytest.raises(VTorqueError) as caught:
        load(install, text)
    assert caught.value.code is Code.CONFIG
    assert str(install.config) in str(caught.value) and message in str(caught.value)
    assert str(caught.value).isprintable()


NFS = "mounts: [{{name: data, kind: nfs, source: 'nfs1:/export/data', target: /data{}}}]\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "mounts[0].kind is 'nfs': refused, because the user counts as root in a guest"),
        (", security: sys", "mounts[0].security is 'sys': refused"),
        (", security: sys, public: true", "mounts[0].security is 'sys': refused"),
        (", security: sys, readonly: true", "mounts[0].security is 'sys': refused"),
        (", public: true, readonly: true", "mounts[0].kind is 'nfs': refused"),
        (", security: krb5, public: true", "mounts[0].public is 'True': means nothing with Kerberos"),
        (", security: krb4", "mounts[0].security is 'krb4': one of krb5, krb5i, krb5p, sys is needed"),
        (", security: sys, public: true, readonly: true", None),
        (", security: krb5", None),
        (", security: krb5i, readonly: true", None),
        (", security: krb5p", None),
    ],
)
def test_nfs_needs_kerberos_or_public_data(install: Installation, more: str, message: Optional[str]) -> None:
    if message is None:
        assert load(install, NFS.format(more)).mounts[0].source == "nfs1:/export/data"
        return
    with pytest.raises(VTorqueError) as caught:
        load(install, NFS.format(more))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        (
            "nfs1:/export/data",
            "/export/data",
            "source is '/export/data': SERVER:/PATH is needed for kind nfs",
        ),
        ("nfs1:/export/data", "nfs1:export", "SERVER:/PATH"),
        ("nfs1:/export/data", "nfs1,proto=udp:/export", "SERVER:/PATH"),
        ("nfs1:/export/data", "nfs 1:/export", "SERVER:/PATH"),
        ("nfs1:/export/data", "-o:/export", "SERVER:/PATH"),
        ("nfs1:/export/data", "nfs1:/a b", "an absolute path without blanks"),
        ("nfs1:/export/data", "nfs1:/a/../b", "an absolute path without blanks and `..`"),
        ("kind: nfs", "kind: virtiofs", "mounts[0].security is 'krb5': means nothing for kind virtiofs"),
        ("kind: nfs", "kind: nfs4", "one of 9p, virtiofs, nfs is needed"),
        ("nfs1:/export/data", "10.1.2.3:/export{home}", None),
        ("nfs1:/export/data", "nfs.site.example:/export/data", None),
    ],
)
def test_sources_of_nfs(install: Installation, was: str, becomes: str, message: Optional[str]) -> None:
    text = NFS.format(", security: krb5")
    assert was in text
    text = text.replace(was, becomes)
    if message is None:
        load(install, text)
        return
    with pytest.raises(VTorqueError) as caught:
        load(install, text)
    assert message in str(caught.value)


def test_tags_have_the_length_that_qemu_takes(install: Installation) -> None:
    text = "mounts: [{name: %s, kind: %s, source: /a, target: /a}]\n"
    assert load(install, text % ("a" * 31, "virtiofs")).mounts[0].kind == "virtiofs"
    for kind in ("9p", "virtiofs"):
        with pytest.raises(VTorqueError, match=r"mounts\[0\].name is .*: at most 31 characters"):
            load(install, text % ("a" * 32, kind))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workspace: {wipe: true}", "line 1: workspace.wipe is 'True': means nothing without workspace.folder"),
        ("workspace: {folder: '/w/{user}', wipe: true}", "workspace.wipe is 'True': would wipe what is not this job's"),
        ("workspace: {folder: '/w/{job}/{user}', wipe: true}", "workspace.wipe"),
        ("workspace: {folder: '/w/{job}/../{job}', wipe: true}", "an absolute path without blanks and `..`"),
        ("workspace: {folder: 'w/{job}'}", "workspace.folder is 'w/{job}': an absolute path"),
        ("workspace: {folder: '/w/{jobid}'}", "{jobid} is none of the names {home}, {user}, {job}"),
        ("workspace: {folder: '/w/{workspace}'}", "{workspace} is none of the names"),
        ("workspace: {folder: '/w/{job'}", "{job is none of the names"),
        (
            "mounts: [{name: w, source: '{workspace}', target: /w}]",
            "mounts[0]: {workspace} means nothing without workspace.folder",
        ),
        ("mounts: [{name: w, source: /w, target: '{workspace}'}]", "without workspace.folder"),
        (
            "mounts: [{name: w, source: /w, target: /workspace}]\nworkspace: {folder: '/w/{job}'}",
            "workspace.folder is '/w/{job}': a share has the target /workspace already",
        ),
        (
            "mounts: [{name: workspace, source: /w, target: /w}]\nworkspace: {folder: '/w/{job}'}",
            "a share has the name workspace already; give a share the source {workspace}",
        ),
        ("workspace: {folder: '/w/{user}/{job}/', wipe: true}", None),
        ("workspace: {folder: '{home}/w-{job}-{user}', wipe: true}", None),
        ("workspace: {folder: '/w/{user}'}", None),
    ],
)
def test_workspaces(install: Installation, text: str, message: Optional[str]) -> None:
    if message is None:
        assert load(install, text).mounts[-1].source == "{workspace}"
        return
    with pytest.raises(VTorqueError) as caught:
        load(install, text)
    assert message in str(caught.value)


def test_the_share_of_the_workspace(install: Installation) -> None:
    config = load(install, "workspace: {folder: '/scratch/{user}/{job}'}\npolicy: {mounts: {default: [workspace]}}")
    assert config.mounts[-1] == Mount("workspace", "9p", "{workspace}", "/workspace", False)
    assert config.workspace == ("/scratch/{user}/{job}", False)
    own = "mounts: [{name: w, kind: virtiofs, source: '{workspace}/data', target: '{workspace}/data'}]\n"
    config = load(install, own + "workspace: {folder: '/scratch/{user}/{job}'}")
    assert [mount.name for mount in config.mounts] == ["w"]
    names = {"home": "/home/carol", "user": "carol", "job": "12.host", "workspace": "/scratch/carol/12.host"}
    filled = config.mounts[0].filled(names)
    assert filled.source == filled.target == "/scratch/carol/12.host/data" and filled.is_known
    assert not config.mounts[0].filled({"home": "/home/carol", "user": "carol", "job": None}).is_known


def test_missing_file(install: Installation) -> None:
    with pytest.raises(
        VTorqueError, match=r"cannot read the configuration .*: No such file .*; is vTorque installed here"
    ):
        load_config(install)


def test_compiled_copy(install: Installation) -> None:
    install.config.write_text("policy: {vcpus: {max: 7}}\n")
    compiled = compile_config(install)
    path = install.config.with_name("vtorque.yaml.compiled")
    assert path.stat().st_mode & 0o777 == 0o644
    assert vars(load_config(install)) == vars(compiled)
    data = json.loads(path.read_text())
    data["tree"]["policy"]["vcpus"]["max"] = 8
    path.write_text(json.dumps(data))
    assert general(load_config(install)).bounds("vcpus").max == 8  # shows that the copy is what is read
    path.chmod(0o664)
    assert general(load_config(install)).bounds("vcpus").max == 7
    path.chmod(0o644)
    install.config.write_text("policy: {vcpus: {max: 9}}\n")
    assert general(load_config(install)).bounds("vcpus").max == 9


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
        if isinstance(kind, (Items, Named)):
            found += keys(dict(kind.section))
        elif not isinstance(kind, (Key, OneOf)):
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
        read_tree(install.config_file)
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
