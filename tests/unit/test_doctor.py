"""What the doctor finds on nodes that are well and on those that are not, subject by subject."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ, TEMPLATES, Node, make_node, short_folder
from test_image_add import FACTS
from topologies import small

from vmgr.config import Bridge, Mount, Timeouts, load_config
from vmgr.deploy.alarm import Alarm, parse_alarm
from vmgr.doctor import (
    clock,
    hypervisor,
    images,
    kernel,
    kvm,
    leftovers,
    memory,
    mom,
    network,
    programs,
    rights,
    seeds,
    settings,
    shares,
    storage,
    suspension,
)
from vmgr.doctor import finding as findings
from vmgr.doctor.clock import Clocks
from vmgr.doctor.finding import Finding, Level, from_plain, worst
from vmgr.doctor.finding import Node as Patient
from vmgr.doctor.network import Tried
from vmgr.doctor.run import Ran, run
from vmgr.doctor.storage import Place, Room
from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Pool
from vmgr.node import accel
from vmgr.node.accel import Kvm
from vmgr.topology.model import Topology
from vmgr.topology.read import read_topology
from vmgr.topology.tree import Tree

OK, NOTE, WARNING, FAILURE = Level

Make = Callable[..., Patient]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes a node from sections of its configuration; the files of `tree` lie below its root."""
    with short_folder() as base:

        def build(tree: Optional[dict[str, str]] = None, **sections: Any) -> Patient:
            node: Node = make_node(base, **{key: value for key, value in sections.items() if isinstance(value, dict)})
            others = {key: value for key, value in sections.items() if not isinstance(value, dict)}
            if others:
                file = node.install.config
                file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **others}))
                node = node._replace(config=load_config(node.install))
            root = base / "root"
            for path, text in (tree or {}).items():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(text)
            return Patient(node.install, node.config, Tree(root))

        yield build


def levels(found: Iterable[Finding]) -> list[Level]:
    return [each.level for each in found]


def one(found: Iterable[Finding], level: Level, *words: str) -> Finding:
    """The only finding of this level, in which these words stand; what is not well has a remedy."""
    every = list(found)
    (each,) = (finding for finding in every if finding.level is level)
    text = f"{each.what} | {each.remedy}"
    assert all(word in text for word in words), text
    assert level < WARNING or each.remedy, "a warning has its remedy"
    return each


def well(found: Iterable[Finding]) -> None:
    every = list(found)
    assert every and set(levels(every)) == {OK}, every


# findings


def test_findings_as_plain_data() -> None:
    finding = Finding("KVM", FAILURE, "it does not work", "buy another")
    assert from_plain(json.loads(json.dumps(finding.as_plain()))) == finding
    assert worst([]) is OK and worst([finding, finding._replace(level=NOTE)]) is FAILURE


@pytest.mark.parametrize(
    "data", [None, 3, {}, {"subject": "x"}, {"subject": "x", "level": "bad", "what": "", "remedy": ""}]
)
def test_what_is_no_finding(data: Any) -> None:
    with pytest.raises(ValueError, match="no finding"):
        from_plain(data)


@FUZZ
@given(st.recursive(st.none() | st.text(), lambda inner: st.dictionaries(st.sampled_from(Finding._fields), inner)))
def test_another_nodes_words_move_no_cursor(data: Any) -> None:
    try:
        found = from_plain(data)
    except ValueError:
        return
    assert all(part.isprintable() for part in (found.subject, found.what, found.remedy or ""))


# configuration


def test_configuration(make: Make) -> None:
    patient = make(policy={"network": {"allowed": ["user", "bridge"], "enabled": True}})
    one(settings.check(patient), WARNING, "policy.network.allowed has bridge")
    one(settings.check(patient), NOTE, "no current compiled copy", "vmgr config compile")
    patient.install.config.write_text("engine: [\n")
    one(settings.check(patient), FAILURE, "not YAML")


# KVM


def test_kvm_that_works(make: Make) -> None:
    well(kvm.judge(Kvm(True, "x"), Kvm(True, "x"), make(), 0.4))


@pytest.mark.parametrize(
    ("reason", "device", "remedy"),
    [
        ("there is no /dev/kvm", False, "kvm_intel"),
        ("a kernel under /dev/kvm showed nothing within 10 s", True, "does not nest"),
        ("failed to initialize kvm: Permission denied", True, "0660"),
        ("something else", True, "dmesg"),
    ],
)
def test_kvm_that_does_not(make: Make, reason: str, device: bool, remedy: str) -> None:
    patient = make({"dev/kvm": ""} if device else {})
    one(kvm.judge(Kvm(False, reason), None, patient, 1), FAILURE, reason, "refused", remedy, "allow_emulation")
    allowed = make({"dev/kvm": ""} if device else {}, hypervisor={"allow_emulation": True})
    one(kvm.judge(Kvm(False, reason), None, allowed, 1), WARNING, reason, "emulated", remedy)


def test_kvm_that_is_remembered_otherwise(make: Make) -> None:
    patient = make()
    one(kvm.judge(Kvm(True, ""), Kvm(False, "slow"), patient, 1), WARNING, "does not work (slow)", "kvm.json")
    found = list(kvm.judge(Kvm(False, "x"), Kvm(True, ""), make(hypervisor={"allow_emulation": True}), 1))
    assert levels(found) == [WARNING, WARNING]


def test_kvm_is_tried_now(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = make()
    one(kvm.check(patient), WARNING, "no image in the pool has a kernel")
    an_image(patient)
    tried: list[Path] = []

    def find_out(config: object, path: Path) -> Kvm:
        tried.append(path)
        return Kvm(True, "")

    monkeypatch.setattr(accel, "find_out", find_out)
    well(kvm.check(patient))
    assert tried[0].name == "vmlinuz"


# the hypervisor


def test_versions_of_qemu() -> None:
    assert hypervisor.parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2)\n") == (7, 2)
    assert hypervisor.parse_version("QEMU emulator version 10.0") == (10, 0)
    assert hypervisor.parse_version("bash 5") is None
    well(hypervisor.judge_version("qemu", (6, 2)))
    one(hypervisor.judge_version("qemu", (5, 2)), WARNING, "QEMU 5.2", "newer")


def test_what_is_needed_of_qemu_follows_the_command_line(make: Make) -> None:
    found = hypervisor.needed(make().config)
    assert {"virtio-blk-pci", "virtserialport", "virtio-9p-pci", "virtio-net-pci"} <= found.devices
    assert found.netdevs == {"user", "tap"} and "iothread" in found.objects and found.accels == {"kvm"}
    shared = [{"name": "x", "kind": "virtiofs", "source": "/x", "target": "/x"}]
    found = hypervisor.needed(make(mounts=shared, hypervisor={"allow_emulation": True}).config)
    assert "vhost-user-fs-pci" in found.devices and "virtio-9p-pci" not in found.devices
    assert "memory-backend-memfd" in found.objects and found.accels == {"kvm", "tcg"}


LISTS = 'name "virtio-blk-pci", bus PCI, alias "virtio-blk"\n\nStorage:\nname "x", bus y\n'


def test_what_qemu_lists() -> None:
    assert hypervisor.listed(LISTS) == {"virtio-blk-pci", "x"}
    assert hypervisor.listed("List of user creatable objects:\n  iothread\n  rng-random\n") == {
        "iothread",
        "rng-random",
    }
    assert hypervisor.listed("Accelerators supported in QEMU binary:\ntcg\nkvm\n") == {"tcg", "kvm"}
    well(hypervisor.judge_features("q", "devices", {"x"}, Ran(0, LISTS, "")))
    one(hypervisor.judge_features("q", "devices", {"x", "y", "z"}, Ran(0, LISTS, "")), FAILURE, "y, z")
    one(hypervisor.judge_features("q", "devices", {"x"}, Ran(1, "", "a\nno such\n")), FAILURE, "no such")


def test_a_start_in_the_sandbox() -> None:
    well(hypervisor.judge_start("q", Ran(0, '{"return": {"status": "prelaunch"}}', "")))
    one(hypervisor.judge_start("q", Ran(1, "", "seccomp is off\n")), FAILURE, "seccomp is off")
    one(hypervisor.judge_start("q", Ran(0, "", "")), FAILURE, "ended with 0")


def test_no_hypervisor(make: Make) -> None:
    one(hypervisor.check(make(hypervisor={"qemu": "/nope/qemu"})), FAILURE, "/nope/qemu", "No such file", "apt-get")
    one(hypervisor.check(make(hypervisor={"qemu": "/bin/true"})), FAILURE, "/bin/true")


def test_no_virtiofsd(make: Make) -> None:
    mounts = [{"name": "x", "kind": "virtiofs", "source": "/x", "target": "/x"}]
    patient = make(mounts=mounts, hypervisor={"virtiofsd": "/nope/virtiofsd"})
    found = hypervisor._virtiofsd(patient.config)
    assert found.level is FAILURE and "/nope/virtiofsd" in found.what and found.remedy


# programs


def test_programs(make: Make) -> None:
    patient = make()
    names = {each.name for each in programs.wanted(patient.config)}
    assert {"qemu-img", "pycdlib", "libnftables.so.1", "pyroute2"} <= names and "/usr/sbin/mkfs.ext4" not in names
    with_disks = make(policy={"disk": {"enabled": True}, "network": {"allowed": ["user"], "several": None}})
    names = {each.name for each in programs.wanted(with_disks.config)}
    assert "/usr/sbin/mkfs.ext4" in names and "pyroute2" not in names


def test_what_is_missing_is_named(make: Make) -> None:
    patient = make()
    there = [
        programs.Wanted("program", "sh", "all", "dash"), programs.Wanted("module", "json", "all", ""),
        programs.Wanted("library", "libc.so.6", "all", "libc6"),
    ]  # fmt: skip
    well(programs.judge(there, patient))
    missing = [
        programs.Wanted("program", "no-such-program", "disks", "a-package"),
        programs.Wanted("library", "libnosuch.so.9", "networks", "b-package"),
        programs.Wanted("module", "no_such_module", "seeds", ""),
    ]
    found = list(programs.judge([*there, *missing], patient))
    assert levels(found) == [FAILURE] * 3
    assert [each.remedy for each in found[:2]] == ["apt-get install a-package", "apt-get install b-package"]
    assert "install vTorque anew" in (found[2].remedy or "")


# images


def an_image(patient: Patient, name: str = "micro") -> Path:
    """An image in the node's pool; gives its folder."""
    pool = Pool(patient.config.pool)
    with pool.staging(name) as staging:
        (staging / "out").mkdir()
        for file in ("vmlinuz", "initrd", "disk.qcow2"):
            (staging / "out" / file).write_text("x")
        facts = {**FACTS, "kernel": "vmlinuz", "initrd": "initrd", "disk": "disk.qcow2", "virtual_size": 64 << 20}
        return pool.publish(staging / "out", name, facts).directory


def test_images(make: Make) -> None:
    patient = make(policy={"img": {"default": "micro"}})
    one(images.check(patient), FAILURE, "cannot be read: No such file", "vmgr image build")
    patient.config.images.pool.mkdir()
    one(images.check(patient), FAILURE, "holds no image")
    folder = an_image(patient)
    well(images.check(patient))
    (folder / "disk.qcow2").chmod(0o644)
    (folder / "disk.qcow2").write_text("longer")
    one(images.check(patient), FAILURE, "micro@1: disk.qcow2 has 6 bytes, not 1")
    (folder / "disk.qcow2").unlink()
    one(images.check(patient), FAILURE, "disk.qcow2: No such file")
    (folder / "image.yaml").unlink()
    one(images.check(patient), FAILURE, "image.yaml")


def test_the_default_image() -> None:
    one(images.judge_default(None, ["a", "b"], "line 1"), WARNING, "is not set", "a, b")
    one(images.judge_default("c", ["a", "b"], "line 1"), FAILURE, "c (line 1)", "a, b")
    assert list(images.judge_default("a", ["a", "b"], "line 1")) == []


# seeds


def test_seeds(make: Make, tmp_path: Path) -> None:
    patient = make(guest={"vm_hooks": str(tmp_path / "vm")})
    one(seeds.check(patient), FAILURE, "is not there", "guest.vm_hooks")
    (tmp_path / "vm").mkdir()
    one(seeds.check(patient), NOTE, "no image")
    folder = an_image(patient)
    family = json.loads((folder / "image.yaml").read_text())["family"]
    one(seeds.check(patient), FAILURE, f"family {family}", "No such file", str(patient.install.templates))
    patient.install.share.mkdir(parents=True)
    shutil.copytree(TEMPLATES, patient.install.templates)
    for name in ("prologue", "epilogue.parallel"):
        (tmp_path / "vm" / name).write_text("#!/bin/sh\n")
    found = list(seeds.check(patient))
    well(found)
    assert f"families {family}" in found[0].what and found[1].what.endswith("prologue, epilogue.parallel")
    (patient.install.templates / "guest" / family / "user-data.j2").write_text("{{ nonsense }}")
    one(seeds.check(patient), FAILURE, "StrictUndefined")


# memory


MEMINFO = "MemTotal:       {total} kB\nMemFree: 1 kB\nMemAvailable:   {available} kB\n"


def meminfo(total: int, available: int) -> str:
    return MEMINFO.format(total=total << 10, available=available << 10)


def test_memory(make: Make) -> None:
    config = make(policy={"ram": {"default": "1G"}}, resources={"host_memory": "256M"}).config
    well(memory.judge_memory(meminfo(4096, 2048), config))
    one(memory.judge_memory(meminfo(4096, 1024), config), WARNING, "1024 of 4096 MiB", "1280 MiB")
    one(memory.judge_memory(meminfo(1024, 1024), config), FAILURE, "1280 MiB")
    one(memory.judge_memory("", config), WARNING, "/proc/meminfo")


def machine(**hugepages: tuple[int, int]) -> Topology:
    return read_topology(small("two-nodes-smt"))._replace(
        nodes=(), hugepages={int(k[1:]): v for k, v in hugepages.items()}
    )


def test_cpus(make: Make) -> None:
    topology = machine()
    well(memory.judge_cpus(topology, make().config))
    many = {"vcpus": {"default": 999, "max": 999}}
    one(memory.judge_cpus(topology, make(policy=many).config), FAILURE, "999 vCPUs", "overcommit")
    well(memory.judge_cpus(topology, make(policy=many, hypervisor={"overcommit_cpus": True}).config))


def test_hugepages(make: Make) -> None:
    assert list(memory.judge_hugepages(machine(), make().config)) == [], "none are promised"
    config = make(hypervisor={"hugepages": "2M"}).config
    well(memory.judge_hugepages(machine(_2048=(512, 300)), config))
    one(memory.judge_hugepages(machine(_2048=(512, 100)), config), WARNING, "200 of 1024 MiB")
    one(memory.judge_hugepages(machine(_2048=(100, 100)), config), FAILURE, "200 MiB are set aside", "vm.nr_hugepages")
    one(memory.judge_hugepages(machine(_1048576=(4, 4)), config), FAILURE, "0 MiB")
    whole = make(hypervisor={"hugepages": "1G"}).config
    one(memory.judge_hugepages(machine(_1048576=(4, 4)), whole), FAILURE, "no whole number of pages", "1024 MiB")


def test_memory_of_a_small_machine(make: Make) -> None:
    patient = make()
    root = small("two-nodes-smt")
    found = list(memory.check(patient._replace(tree=Tree(root))))
    assert found[0].level is OK and "2 NUMA nodes" in found[0].what


# storage


def test_rooms() -> None:
    place, room = Place("images.overlays", Path("/o"), 512, 4096), Room(8192, 8000, 10**6, False)
    well(storage.judge(place, room))
    one(storage.judge(place, room._replace(free=100)), FAILURE, "100 of 8192", "512 MiB are needed")
    one(storage.judge(place, room._replace(read_only=True)), FAILURE, "read-only")
    one(storage.judge(place, room._replace(files=3)), FAILURE, "3 more files", "inodes")
    one(storage.judge(place, room._replace(total=2048, free=2000)), WARNING, "4096 MiB are promised")
    one(storage.judge(place, room._replace(free=3000)), NOTE, "3000 of 8192")
    well(storage.judge(place, room._replace(files=None)))


def test_where_a_node_writes(make: Make) -> None:
    patient = make(images={"cache": {"folder": "/var/cache/vt"}}, policy={"img": {"default": "micro"}})
    an_image(patient)
    found = {place.key: place for place in storage.places(patient)}
    assert set(found) == {"images.overlays", "paths.spool", "paths.run", "images.cache.folder", "logging.file"}
    assert found["images.overlays"].least == 64, "as large as the image's disk"
    assert storage.nearest(Path("/nope/x/y")) == Path("/") and storage.measure(Path("/")).total > 0
    assert {each.subject for each in storage.check(patient)} == {"storage"}


# shares


def a_mount(**fields: Any) -> Mount:
    return Mount(**{"name": "data", "kind": "9p", "source": "/data", "target": "/data", "readonly": False, **fields})


def test_folders(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    well(shares.judge_folder(a_mount(source=str(tmp_path))))
    well(shares.judge_folder(a_mount(source=f"{tmp_path}/{{user}}/x")))
    one(shares.judge_folder(a_mount(source=f"{tmp_path}/nope")), FAILURE, "nope: No such file", "take data away")
    (tmp_path / "file").touch()
    one(shares.judge_folder(a_mount(source=f"{tmp_path}/file")), FAILURE, "no folder")
    tmp_path.chmod(0o700)
    one(shares.judge_folder(a_mount(source=str(tmp_path))), WARNING, "mode 0700")
    for source in ("{home}", "{home}/x", "{workspace}"):
        assert list(shares.judge_folder(a_mount(source=source))) == []


def test_nfs() -> None:
    nfs = a_mount(kind="nfs", source="localhost:/x", security="krb5")
    well(shares._nfs(nfs))
    one(shares._nfs(nfs._replace(source="no-such.invalid:/x")), FAILURE, "no-such.invalid")


def test_drivers_of_the_default_image(make: Make) -> None:
    mounts = [{"name": "x", "kind": "virtiofs", "source": "/", "target": "/x"}]
    patient = make(mounts=mounts, policy={"img": {"default": "micro"}})
    an_image(patient)
    one(shares.check(patient), WARNING, "micro has no driver", "virtiofs")
    one(shares.check(make(mounts=[])), NOTE, "mounts is empty")


MOUNTS = ["/dev/a / ext4 rw 0 0", "fs1:/scratch /scratch nfs4 rw 0 0", "x /scratch/a\\040b tmpfs rw 0 0", "broken"]


def test_the_file_system_of_a_folder() -> None:
    for path, kind in (("/home", "ext4"), ("/scratch/u", "nfs4"), ("/scratch/a b/c", "tmpfs"), ("/scratched", "ext4")):
        assert shares.file_system_of(path, MOUNTS) == kind
    assert shares.file_system_of("/", []) is None
    assert shares.file_system_of("/x", [MOUNTS[0], "y / xfs rw 0 0"]) == "xfs", "the later one hides the earlier"


def test_workspaces(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    mounts = [f"fs:/ {tmp_path} lustre rw 0 0"]
    well(shares.judge_workspace(f"{tmp_path}/{{user}}/{{job}}", mounts))
    well(shares.judge_workspace(f"{tmp_path}/{{job}}", mounts))
    one(shares.judge_workspace(f"{tmp_path}/{{job}}", ["/dev/a / xfs rw 0 0"]), NOTE, "xfs", "several nodes")
    one(shares.judge_workspace(f"{tmp_path}/nope/{{job}}", mounts), FAILURE, "nope")
    tmp_path.chmod(0o755)
    one(shares.judge_workspace(f"{tmp_path}/{{job}}", mounts), WARNING, "1777")
    assert list(shares.judge_workspace("{home}/x", mounts)) == []


@pytest.mark.parametrize(
    ("path", "fixed"),
    [("/a/b", "/a/b"), ("/a/{user}/b", "/a"), ("/{user}", "/"), ("/a/x{job}", "/a"), ("/a/b/{user}{job}", "/a/b")],
)
def test_the_fixed_part_of_a_path(path: str, fixed: str) -> None:
    assert shares.fixed_part(path) == fixed


# suspension


def test_where_no_job_is_suspended(make: Make) -> None:
    one(suspension.check(make()), OK, "suspended.folder is not set")
    one(suspension.check(make(suspended={"folder": "/no/such"})), WARNING, "suspended.folder: /no/such: No such file")
    folder = f"{make().config.paths.spool}/suspended"
    one(suspension.check(make(suspended={"folder": folder})), WARNING, "lies in paths.spool", "all nodes share")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
def test_the_folder_of_suspended_jobs() -> None:
    """Root's and everybody's, like /tmp, and on a file system of all nodes."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        base, shared = Path(name), [f"fs:/ {name} nfs4 rw 0 0"]
        base.chmod(0o755)
        folder = base / "suspended"

        def judge(path: Path = folder, mounts: list[str] = shared, *, alone: bool = False) -> list[Finding]:
            return list(suspension.judge_folder(str(path), mounts, alone=alone))

        one(judge(), WARNING, "No such file", "install -d -o root -g root -m 1777")
        folder.mkdir()
        folder.chmod(0o1777)
        well(judge())
        one(judge(mounts=["/dev/a / xfs rw 0 0"]), WARNING, "xfs", "all nodes share")
        well(judge(mounts=["/dev/a / xfs rw 0 0"], alone=True))
        assert list(folder.iterdir()) == []
        for mode in (0o777, 0o1755, 0o755):
            folder.chmod(mode)
            one(judge(), FAILURE, f"has mode {mode:04o}")
        folder.chmod(0o1777)
        os.chown(folder, 65534, 65534)
        one(judge(), FAILURE, "belongs to uid 65534")
        os.chown(folder, 0, 0)
        folder.chmod(0o1777)
        (base / "link").symlink_to(folder)
        one(judge(base / "link"), WARNING, "no folder")
        base.chmod(0o700)
        one(judge(), WARNING, "users cannot make folders in it", "Permission denied")
        base.chmod(0o777)
        one(judge(), FAILURE, "others could put another one in its place")


def test_the_right_to_requeue(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config, asked = make().config, []
    failure: Optional[VTorqueError] = None

    def ask(config: object, *words: str) -> object:
        asked.append(words)
        if failure is not None:
            raise failure
        return {}

    monkeypatch.setattr(suspension.batch, "ask", ask)
    well(suspension.judge_requeue(config))
    failure = VTorqueError("root@n1 is neither operator nor manager", code=Code.ACCESS, hint="make it one")
    one(suspension.judge_requeue(config), WARNING, "this node may not requeue", "neither operator", "make it one")
    failure = VTorqueError("qmgr ended with status 3", code=Code.ENGINE)
    one(suspension.judge_requeue(config), WARNING, "may not be able", "status 3", "see the reason")
    assert asked == [("check-requeue",)] * 3


@pytest.mark.parametrize(("engine", "mom", "uid", "asked"), [
    ("torque", True, 0, True), ("torque", False, 0, False), ("slurm", False, 0, True), ("slurm", True, 1000, False),
])  # fmt: skip
def test_whose_right_to_requeue_is_looked_at(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, mom: bool, uid: int, asked: bool
) -> None:
    """That of nodes: on TORQUE of those with a mom; Slurm lets root requeue jobs wherever it is, and nobody else."""
    if mom:
        (tmp_path / "mom_priv").mkdir()
    patient = make(engine=engine, torque={"mom_priv": str(tmp_path / "mom_priv")}, suspended={"folder": str(tmp_path)})
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(suspension, "judge_folder", lambda *_, **__: iter(()))
    monkeypatch.setattr(suspension.batch, "ask", lambda *_: {})
    found = list(suspension.check(patient))
    assert [each.what for each in found] == (["the batch system lets this node's root requeue jobs"] if asked else [])


# network


def a_bridge(**files: str) -> dict[str, str]:
    place = "sys/class/net/br0"
    usual = {"flags": "0x1003", "mtu": "1500", "bridge/bridge_id": "8000", "brif/eth0/port_no": "1"}
    return {f"{place}/{name}": text for name, text in {**usual, **files}.items()}


BRIDGE = Bridge("br0", "dhcp", None, None, None)


def test_a_bridge(make: Make) -> None:
    well(network.judge_bridge(BRIDGE, make(a_bridge()).tree))
    one(network.judge_bridge(BRIDGE._replace(name="br1"), make().tree), FAILURE, "no network interface br1")


def test_a_bridge_that_is_down(make: Make) -> None:
    one(network.judge_bridge(BRIDGE, make(a_bridge(flags="0x1002")).tree), FAILURE, "is down", "ip link set br0 up")


def test_what_is_no_bridge(make: Make) -> None:
    tree = make({"sys/class/net/br0/flags": "0x1003"}).tree
    one(network.judge_bridge(BRIDGE, tree), FAILURE, "is no bridge")


def test_a_bridge_without_ports(make: Make) -> None:
    tree = make({path: text for path, text in a_bridge().items() if "brif" not in path}).tree
    one(network.judge_bridge(BRIDGE, tree), WARNING, "has no port")


def test_the_sites_program_for_addresses(make: Make, tmp_path: Path) -> None:
    tree = make(a_bridge()).tree
    command = BRIDGE._replace(addresses="command", command=str(tmp_path / "nope"))
    if os.geteuid() == 0:
        one(network.judge_bridge(command, tree), FAILURE, "network.bridge.command", "nope")
    plain = tmp_path / "plain"
    plain.touch(0o644)
    found = list(network.judge_bridge(command._replace(command=str(plain)), tree))
    assert found[-1].level is FAILURE
    assert len(list(network.judge_bridge(command._replace(command="/bin/true"), tree))) == 1


def test_what_was_tried() -> None:
    well(network.judge_tried([Tried("tap", None), Tried("bridge", None)]))
    found = list(network.judge_tried([Tried("tap", "No such device"), Tried("bridge", None)]))
    assert levels(found) == [FAILURE, OK] and found[0].remedy == "modprobe tun" and "No such device" in found[0].what


def test_the_nodes_own_name() -> None:
    well(network.judge_peer("n1", ["10.0.0.1"], {"10.0.0.1": 2}))
    one(network.judge_peer("n1", [], {}), WARNING, "is not known")
    one(network.judge_peer("n1", ["127.0.1.1"], {"127.0.0.1": 1}), WARNING, "n1 (network.job.peer) is 127.0.1.1")
    one(network.judge_peer("n1", ["10.0.0.9"], {"10.0.0.1": 2}), WARNING, "no address of this node")
    well(network.judge_peer("n1", ["127.0.1.1", "10.0.0.1"], {"10.0.0.1": 2}))


def test_forwarding() -> None:
    assert list(network.judge_forwarding("1")) == []
    for text in ("0", None):
        one(network.judge_forwarding(text), FAILURE, "ip_forward=1")


def test_a_network_that_needs_nothing(make: Make) -> None:
    well(network.check(make(policy={"network": {"allowed": ["user"], "several": None}})))


# rights


@pytest.mark.parametrize(
    ("mode", "uid", "wrong"),
    [
        (stat.S_IFREG | 0o644, 0, None), (stat.S_IFREG | 0o664, 0, "writable"), (stat.S_IFREG | 0o646, 0, "mode 0646"),
        (stat.S_IFREG | 0o644, 7, "uid 7"), (stat.S_IFLNK | 0o777, 0, None), (stat.S_IFDIR | 0o1777, 0, None),
        (stat.S_IFDIR | 0o777, 0, "mode 0777"), (stat.S_IFLNK | 0o777, 7, "uid 7"),
    ],
)  # fmt: skip
def test_who_could_change_a_file(mode: int, uid: int, wrong: Optional[str]) -> None:
    found = rights.wrong_with(mode, uid)
    assert found is None if wrong is None else wrong in (found or "")


def test_what_root_uses(make: Make) -> None:
    mounts = [{"name": "x", "kind": "virtiofs", "source": "/x", "target": "/x"}]
    patient = make(
        mounts=mounts, guest={"vm_hooks": "/hooks"}, images={"cache": {"folder": "/cache"}},
        network={"bridge": {"command": "/bin/addresses"}},
    )  # fmt: skip
    names = {place.name for place in rights.places(patient)}
    assert {"installation", "images.pool", "hypervisor.virtiofsd", "guest.vm_hooks", "images.cache.folder"} <= names
    assert "network.bridge.command" in names and "paths.spool" in names


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of others")
def test_files_of_others(make: Make) -> None:
    patient = make()
    root = patient.install.root
    for path in root.rglob("*"):
        path.chmod(path.stat().st_mode & ~0o022)
    place = rights.Place("installation", root, deep=True)
    assert list(rights.judge(place)) == []
    (root / "libexec" / "a").touch()
    os.chown(root / "libexec" / "a", 7, 7)
    one(rights.judge(place), FAILURE, "libexec/a belongs to uid 7")
    for number in range(20):
        (root / "libexec" / f"b{number}").touch()
        (root / "libexec" / f"b{number}").chmod(0o666)
    found = list(rights.judge(place))
    assert len(found) == rights.MAX_NAMED + 1 and "more such files" in found[-1].what
    (root / "libexec").chmod(0o777)
    assert "libexec is writable by others" in next(rights.judge(place)).what
    root.chmod(0o777)
    one(rights.judge(place), FAILURE, str(root), "chmod go-w")
    root.chmod(0o755)
    one(rights.judge(rights.Place("guest.vm_hooks", root / "nope")), WARNING, "nope", "make it")


# the batch system


TIMEOUTS = Timeouts(5, 30, 240, 270, 600, 60, 15, 20, 5, 120, 600, 10)


@pytest.mark.parametrize(
    ("text", "seconds", "line"),
    [
        (None, 300, None), ("", 300, None), ("$logevent 255\n$prologalarm 400\n", 400, 2), ("$prologalarm 60 #", 60, 1),
        ("# $prologalarm 60", 300, None), ("$prologalarm 60\n$prologalarm 90", 90, 2), ("  $prologalarm\t60", 60, 1),
        ("$prologalarms 60", 300, None), ("$prologalarm 300s", 300, 1),
    ],
)  # fmt: skip
def test_the_alarm(text: Optional[str], seconds: int, line: Optional[int]) -> None:
    assert parse_alarm(text) == (Alarm(seconds, line), None)


@pytest.mark.parametrize("text", ["$prologalarm", "$prologalarm x", "$prologalarm 0", "$prologalarm -3"])
def test_an_alarm_that_is_none(text: str) -> None:
    alarm, problem = parse_alarm(f"$prologalarm 60\n{text}")
    assert alarm.seconds == 60 and problem and problem.startswith("line 2")


@FUZZ
@given(st.text())
def test_no_configuration_breaks_the_reader(text: str) -> None:
    assert parse_alarm(text)[0].seconds > 0


def test_timeouts_against_the_alarm() -> None:
    config = Path("/mom_priv/config")
    well(mom.judge_alarm(config, None, TIMEOUTS))
    one(
        mom.judge_alarm(config, "$prologalarm 280", TIMEOUTS),
        FAILURE,
        "timeouts.barrier is 270 s",
        "line 1",
        "below 270",
    )
    well(mom.judge_alarm(config, "$prologalarm 281", TIMEOUTS))
    found = mom.judge_alarm(config, "$prologalarm 30", TIMEOUTS._replace(barrier=10, boot=5))
    one(found, FAILURE, "timeouts.disk is 20 s", "above 30")
    one(mom.judge_alarm(config, "$prologalarm 8", TIMEOUTS._replace(barrier=9, disk=1, boot=5)), FAILURE, "after 8 s")
    one(mom.judge_alarm(config, None, TIMEOUTS._replace(boot=280)), NOTE, "counts towards its walltime")
    one(mom.judge_alarm(config, "$prologalarm x", TIMEOUTS), WARNING, "is no number")


def hooks(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("prologue", "prologue.parallel", "epilogue", "epilogue.parallel", "epilogue.precancel"):
        hook(folder / name, text)


def hook(path: Path, text: str = "#!/bin/sh\n", mode: int = 0o755) -> None:
    path.write_text(text)
    path.chmod(mode)


def test_hooks_and_alarm_of_a_mom(make: Make, tmp_path: Path) -> None:
    patient = make(torque={"mom_priv": str(tmp_path / "mom_priv")})
    one(mom.check(patient), NOTE, "there is no", "torque.mom_priv")
    folder = tmp_path / "mom_priv"
    hooks(folder, f'#!/bin/sh\n"{patient.install.program("vtorque-hook")}" prologue "$@"\n')
    well(mom.check(patient))
    (folder / "config").write_text("$prologalarm 100\n")
    one(mom.check(patient), FAILURE, "timeouts.barrier")
    (folder / "config").unlink()
    (folder / "prologue").write_text("#!/bin/sh\nexit 0\n")
    one(mom.check(patient), FAILURE, "prologue does not call")
    (folder / "prologue").write_text('/opt/vtorque/share/vtorque/mom_priv_hooks/prologue "$@"\n')
    well(mom.check(patient))
    (folder / "epilogue").chmod(0o644)
    one(mom.check(patient), FAILURE, "cannot be run")
    (folder / "epilogue").unlink()
    one(mom.check(patient), FAILURE, "epilogue", "mom_priv_hooks")
    hooks(folder, patient.install.program("vtorque-hook"))
    (folder / "epilogue.precancel").unlink()
    assert set(levels(mom.check(patient))) == {OK, NOTE}
    if os.geteuid() == 0:
        (folder / "config").write_text("$prologalarm 1000\n")
        (folder / "config").chmod(0o666)
        one(mom.check(patient), FAILURE, "passes over its configuration", "chmod")


def test_hooks_of_a_site(make: Make, tmp_path: Path) -> None:
    patient = make(torque={"mom_priv": str(tmp_path / "mom_priv")})
    folder, program = tmp_path / "mom_priv", patient.install.program("vtorque-hook")
    site = folder / "vtorque-site"
    hooks(folder, f"#!/bin/sh\n# vTorque: all of them\n{program}\n")
    site.mkdir()
    hooks(site, "#!/bin/sh\n")
    well(mom.check(patient))
    shutil.copy(folder / "prologue", folder / "prologue.user")
    well(mom.check(patient))
    hook(folder / "prologue.user")
    one(mom.check(patient), WARNING, "prologue.user runs as root", "qsub -T user`", "install.sh")
    (folder / "prologue.user").rename(site / "prologue.user")
    (site / "epilogue").chmod(0o644)
    one(mom.check(patient), FAILURE, "vtorque-site/epilogue cannot be run")
    if os.geteuid() == 0:
        (site / "epilogue").chmod(0o775)
        one(mom.check(patient), FAILURE, "vtorque-site/epilogue is not run", "writable", "chmod go-w")
    (site / "epilogue").unlink()
    hook(folder / "prologue.orig")
    one(mom.check(patient), WARNING, "prologue.orig", "qsub -T orig`", "move it out")


def test_hooks_for_jobs_of_a_type(make: Make, tmp_path: Path) -> None:
    patient = make(torque={"mom_priv": str(tmp_path / "mom_priv")}, submit={"job_type": "vtorque"})
    folder, text = tmp_path / "mom_priv", f"#!/bin/sh\n{patient.install.program('vtorque-hook')}\n"
    hooks(folder, "#!/bin/sh\n# the site's\n")
    missing = [found.what for found in mom.check(patient) if found.level is FAILURE]
    assert [what.split()[2].rpartition("/")[2].rstrip(":") for what in missing] == [
        "prologue.vtorque", "prologue.parallel.vtorque", "epilogue.vtorque", "epilogue.parallel.vtorque",
    ]  # fmt: skip
    for name in ("prologue", "prologue.parallel", "epilogue", "epilogue.parallel"):
        hook(folder / f"{name}.vtorque", text)
    well(mom.check(patient))
    (folder / "epilogue.parallel").chmod(0o600)
    one(mom.check(patient), FAILURE, "the site's hook", "epilogue.parallel cannot be run")
    (folder / "epilogue.parallel").unlink()
    (folder / "vtorque-site").mkdir()
    one(mom.check(patient), WARNING, "vtorque-site do not run", "submit.job_type")
    (folder / "vtorque-site").rmdir()
    hook(folder / "epilogue.other")
    one(mom.check(patient), WARNING, "qsub -T other`")


def test_hooks_of_the_embedded_batch_system(make: Make, tmp_path: Path) -> None:
    patient = make(engine="local", local={"spool": str(tmp_path)})
    hooks(tmp_path / "mom_priv", patient.install.program("vtorque-hook"))
    assert mom.place(patient) == tmp_path / "mom_priv"
    one(mom.check(patient), NOTE, "prologalarm_s")


# kernel, clock, leftovers


@pytest.mark.parametrize(
    ("release", "level"),
    [("5.3.0", OK), ("6.18.44-x", OK), ("10.0", OK), ("5.2.9", FAILURE), ("4.18", FAILURE), ("?", FAILURE)],
)
def test_kernels(release: str, level: Level) -> None:
    assert levels(kernel.judge_version(release)) == [level]


def test_what_a_kernel_must_have() -> None:
    assert list(kernel.judge_machine("x86_64")) == [] == list(kernel.judge_seccomp("kill_process kill_thread"))
    one(kernel.judge_machine("aarch64"), FAILURE, "aarch64")
    for actions in (None, "", "kill_thread"):
        one(kernel.judge_seccomp(actions), FAILURE, "seccomp")
    assert list(kernel.judge_namespaces(True)) == []
    one(kernel.judge_namespaces(False), WARNING, "network=user")
    one(kernel.judge_groups(["cgroup2 /sys/fs/cgroup cgroup2 rw 0 0"]), OK, "cgroup2")
    one(kernel.judge_groups(["proc /proc proc rw 0 0", ""]), NOTE, "no control groups")
    assert list(kernel.judge_boot("06521dfb-1111-2222-3333-444455556666")) == []
    one(kernel.judge_boot(None), FAILURE, "boot_id")


def test_this_kernel(make: Make) -> None:
    found = list(kernel.check(make()._replace(tree=Tree(Path("/")))))
    assert FAILURE not in levels(found)


CLOCKS = Clocks(1_800_000_000, 1000.0, 1000.0, 1_799_999_000, True)


def test_clocks(make: Make) -> None:
    well(clock.judge(CLOCKS))
    one(clock.judge(CLOCKS._replace(date=3600)), FAILURE, "1970-01-01", "NTP")
    one(clock.judge(CLOCKS._replace(synchronised=False)), NOTE, "NTP")
    well(clock.judge(CLOCKS._replace(synchronised=None, booted=None)))
    one(clock.judge(CLOCKS._replace(awake=100.0)), NOTE, "slept for 900 s")
    one(clock.judge(CLOCKS._replace(booted=1_700_000_000)), NOTE, "was set while")
    assert levels(clock.check(make()._replace(tree=Tree(Path("/")))))[-1] is OK


def test_leftovers(make: Make) -> None:
    well(leftovers.judge([], []))
    one(leftovers.judge(["overlay", "attempt", "overlay"], []), WARNING, "1 attempt, 2 overlay", "vmgr node reap")
    one(leftovers.judge(["mark", "folder"], []), NOTE, "1 mark, 1 folder")
    one(leftovers.judge([], ["left: x"]), WARNING, "left: x")
    patient = make()
    well(leftovers.check(patient))
    patient.config.images.overlays.mkdir()
    (patient.config.images.overlays / "stray.qcow2").touch()
    one(leftovers.check(patient), WARNING, "1 overlay")
    assert (patient.config.images.overlays / "stray.qcow2").exists(), "a look changes nothing"


def test_the_janitors_timer(make: Make, tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    one(leftovers.judge_timer(tree), NOTE, "systemd does not run", "every five minutes")
    (tmp_path / "run" / "systemd" / "system").mkdir(parents=True)
    one(leftovers.judge_timer(tree), WARNING, "vtorque-reap.timer is not enabled", "systemctl enable")
    wants = tmp_path / "etc" / "systemd" / "system" / "timers.target.wants"
    wants.mkdir(parents=True)
    (wants / "vtorque-reap.timer").symlink_to("/etc/systemd/system/vtorque-reap.timer")
    well(leftovers.judge_timer(tree))
    patient = make(torque={"mom_priv": str(tmp_path)})._replace(tree=tree)
    assert "enabled" in list(leftovers.check(patient))[-1].what  # on a node; a front end needs none
    well(leftovers.check(make()))


# running programs


def test_programs_are_bounded() -> None:
    assert run(["/bin/cat"], text="hello").out == "hello"
    assert "did not end within 0.2 s" in run(["/bin/sleep", "9"], timeout_s=0.2).reason
    assert run(["/nope"]).reason == "/nope: No such file or directory"
    assert run(["/bin/sh", "-c", "echo first >&2; echo last >&2; exit 3"]).reason == "last"
    assert run(["/bin/sh", "-c", "exit 3"]).reason == "it ended with 3"


def test_levels_are_in_order() -> None:
    assert sorted(Level) == [OK, NOTE, WARNING, FAILURE] and findings.Level["FAILURE"].text == "failure"
