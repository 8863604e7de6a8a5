"""`vmgr config import`: each parameter of the bash vTorque becomes a key or is dropped for a reason; nothing is run."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, Optional

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nodesite import FUZZ
from test_vmgr_cli import Vmgr
from test_vmgr_cli import vmgr_run as vmgr_run  # the fixture

from vmgr.migration.convert import Converted, convert
from vmgr.migration.parameters import PARAMETERS, Dropped, host_patterns
from vmgr.schema import check_config

pytestmark = pytest.mark.script_launch_mode("inprocess")

OLD = """\
set -o nounset;
ABSOLUTE_PATH_CONFIG="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)";
DISABLED_HOSTS_LIST="frontend[0-9]";
REGEX_FE="^fe.*";
TORQUE_HOME="/var/spool/torque";
PBS_QSUB_ON_FE="/opt/torque/server/bin/qsub";
PBS_QSUB_ON_NODES="/opt/torque/client/bin/qsub";
VM_IMG_DIR="/images/pool/";
SUSPENDED_IMAGE_DIR="/images/suspended";
WS_DIR="/scratch/.vtorque";
RAMDISK_DIR="/ramdisk";
VM_NFS_HOME="nfs1:/nfs/home";
VM_NFS_WS="nfs1:/nfs/workspace";
VM_NFS_OPT="nfs1:/nfs/opt";
ARP_BIN="/usr/sbin/arp";
MAC_PREFIX="52:54:00"
HOST_OS_CORE_COUNT=2;
HOST_OS_RAM_MB=2048;
PBS_EXCLUSIVE_NODE_ALLOC=true;
KILL_USER_PROCESSES_AFTER_JOB=true;
MEASURE_TIME=false;
SSH_TIMEOUT=5;
TIMEOUT=120;
PROLOGUE_TIMEOUT=600;
NFS_TIMEOUT=3;
CUSTOM_IP_MAPPING=true;
IP_TO_MAC_SCRIPT="/opt/mac.sh";
NAME_SERVER="10.0.0.2";
DOMAIN="cluster.example";
SEARCH_DOMAIN="cluster.example example";
NTP_SERVER_1="ntp1.example";
NTP_SERVER_2="ntp2.example";
SW_PACKAGES_DEBIAN=('nfs-common' 'libnfs1' 'openmpi-bin' 'libopenmpi-dev' 'libmetis5' 'gdb');
SW_PACKAGES_REDHAT=('nfs-utils' 'openmpi');
FILESYSTEM_TYPE_DEFAULT="$FILESYSTEM_TYPE_SFS";
IMG_DEFAULT="ubuntu.x86_64.img";
DISTRO_DEFAULT="debian";
ARCH_DEFAULT="x86_64";
VCPUS_DEFAULT="96";
VCPU_PINNING_DEFAULT=true;
RAM_DEFAULT="24576";
VMS_PER_NODE_DEFAULT="1";
DISK_DEFAULT="";
VRDMA_ENABLED_DEFAULT=false;
UNCLOT_ENABLED_DEFAULT=0;
UNCLOT_SHMEM_DEFAULT="1024M";
IOCM_ENABLED_DEFAULT=1;
IOCM_MIN_CORES_DEFAULT=1;
IOCM_MAX_CORES_DEFAULT=4;
ENABLE_DEV_MODE=false;
PARALLEL=true;
ALLOW_USER_IMAGES=false;
DEBUG_DEFAULT=false;
TRACE_DEFAULT=true;
SHOW_LOG_DEFAULT=false;
PRINT_TO_STDOUT=false;
ABORT_ON_ERROR=true;
LOG_ROTATE=true;
LOG_FILE="$VM_JOB_DIR/debug.log";
IOCM_ENABLED=false;
IOCM_MIN_CORES=0;
IOCM_MAX_CORES=12;
IOCM_NODES="*";
VRDMA_ENABLED=false;
VRDMA_NODES="*";
UNCLOT_ENABLED=1;
SNAP_MONITORING_ENABLED=false;
SNAP_BIN_DIR="/usr/local/bin/";
SNAP_TAG_FORMAT="snapTask-[username]-[jobid]";
if [ -z ${KEEP_VM_ALIVE-} ]; then
  KEEP_VM_ALIVE=false;
fi
export DEBUG=$(if ${DEBUG-false}; then echo 'true'; else echo 'false'; fi);
"""
"""Every parameter of the last version of the old file, with values of a site's."""
NEW: dict[str, Any] = {
    "submit": {
        "disabled_hosts": ["*frontend[0-9]*"],
        "node_access": "uniqueuser",
        "qsub": {"fe*": "/opt/torque/server/bin/qsub", "*": "/opt/torque/client/bin/qsub"},
    },
    "torque": {"mom_priv": "/var/spool/torque/mom_priv"},
    "images": {"pool": "/images/pool", "allow_user_images": False},
    "suspended": {"folder": "/images/suspended"},
    "workspace": {"folder": "/scratch/.vtorque/{job}"},
    "network": {
        "mac_prefix": "52:54:00",
        "dns": ["10.0.0.2"],
        "domain": "cluster.example",
        "search": ["cluster.example", "example"],
        "ntp": ["ntp1.example", "ntp2.example"],
    },
    "resources": {"host_cores": 2, "host_memory": "2G"},
    "guest": {"kill_user_processes": True, "packages": ["gdb"]},
    "timeouts": {"reach": 5, "boot": 120, "barrier": 600, "user_file": 3},
    "policy": {
        "fs_type": {"default": "sharedfs", "allowed": ["overlay", "sharedfs"]},
        "img": {"default": "ubuntu.x86_64"},
        "vcpus": {"default": 96, "max": 96},
        "vcpu_pinning": {"default": "auto"},
        "ram": {"default": "24G"},
        "vms_per_node": {"default": 1},
        "vrdma": {"default": False},
        "unclot": {"default": True},
        "unclot_shmem": {"default": "1G"},
        "iocm": {"default": False},
        "iocm_min_cores": {"default": 1, "min": 0},
        "iocm_max_cores": {"default": 4, "max": 12},
    },
    "logging": {"level": "debug"},
    "components": {"iocm": False, "vrdma": False},
}
DROPPED = {
    "ABSOLUTE_PATH_CONFIG", "RAMDISK_DIR", "VM_NFS_HOME", "VM_NFS_WS", "VM_NFS_OPT", "ARP_BIN", "MEASURE_TIME",
    "CUSTOM_IP_MAPPING", "IP_TO_MAC_SCRIPT", "SW_PACKAGES_REDHAT", "DISTRO_DEFAULT", "ARCH_DEFAULT", "DISK_DEFAULT",
    "ENABLE_DEV_MODE", "PARALLEL", "DEBUG_DEFAULT", "SHOW_LOG_DEFAULT", "PRINT_TO_STDOUT", "ABORT_ON_ERROR",
    "LOG_ROTATE", "LOG_FILE", "IOCM_NODES", "VRDMA_NODES", "UNCLOT_ENABLED", "SNAP_MONITORING_ENABLED", "SNAP_BIN_DIR",
    "SNAP_TAG_FORMAT", "KEEP_VM_ALIVE", "DEBUG",
}  # fmt: skip


def dropped(converted: Converted) -> dict[str, str]:
    return {item.parameter: item.reason for item in converted.dropped}


def why(text: str, name: str) -> str:
    return dropped(convert(text))[name]


def leaf(tree: dict[str, Any], key: str) -> Any:
    for word in key.split("."):
        tree = tree[word]
    return tree


def test_a_whole_file() -> None:
    converted = convert(OLD)
    assert converted.tree == NEW
    check_config(converted.tree)
    assert set(dropped(converted)) == DROPPED and all(dropped(converted).values())
    assert {item.parameter for item in converted.carried} | DROPPED == {
        name for name in PARAMETERS if f"\n{name}=" in OLD or f" {name}=" in OLD
    }
    assert [part.reason for part in converted.unread] == ["the command set"]
    lines = {item.parameter: item.line for item in (*converted.carried, *converted.dropped)}
    assert all(f"{name}=" in OLD.splitlines()[line - 1] for name, line in lines.items() if name != "KEEP_VM_ALIVE")


def test_every_parameter_has_a_key_or_a_reason() -> None:
    checked = check_config({})
    for name, parameter in PARAMETERS.items():
        assert (parameter.key is None) == bool(parameter.reason), name
        if parameter.key:
            leaf(checked, parameter.key)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("GLOBAL_IMG_DIR=/pool", "images.pool", "/pool"),
        ("SHARED_FS_ROOT_DIR=/scratch/.vtorque", "workspace.folder", "/scratch/.vtorque/{job}"),
        ("ROOT_PROLOGUE_TIMEOUT=300", "timeouts.barrier", 300),
        ("PBS_EXCLUSIVE_NODE_ALLOC=false", "submit.node_access", None),
        ("VCPU_PINNING_DEFAULT=false", "policy.vcpu_pinning.default", "off"),
        ("VCPU_PINNING_DEFAULT=0", "policy.vcpu_pinning.default", "auto"),
        ("VCPU_PINNING_DEFAULT=1", "policy.vcpu_pinning.default", "off"),
        ("VRDMA_ENABLED_DEFAULT=0", "policy.vrdma.default", True),
        ("VRDMA_ENABLED_DEFAULT=Enabled", "policy.vrdma.default", True),
        ("RAM_DEFAULT=2T", "policy.ram.max", "2T"),
        ("RAM_DEFAULT=64", "policy.ram.min", "64M"),
        ("IOCM_MIN_CORES=2", "policy.iocm_min_cores.default", 2),
        ("VCPUS_DEFAULT=$N", "policy.vcpus.default", 8),
        ("IMG_DEFAULT=/pool/Ubuntu.qcow2", "policy.img.default", "ubuntu"),
        ('FILESYSTEM_TYPE_DEFAULT="ramdisk"', "policy.fs_type.allowed", ["overlay", "ramdisk"]),
        ("DISTRO_DEFAULT=CentOS SW_PACKAGES_REDHAT=(gdb) SW_PACKAGES_DEBIAN=(x)", "guest.packages", ["gdb"]),
        ("NTP_SERVER_1=a NTP_SERVER_2=a", "network.ntp", ["a"]),
        ("PBS_QSUB_ON_FE=/a PBS_QSUB_ON_NODES=/a REGEX_FE='x'", "submit.qsub", "/a"),
        ("PBS_QSUB_ON_NODES=/a", "submit.qsub", "/a"),
        ("PBS_QSUB_ON_FE=/a PBS_QSUB_ON_NODES=/b REGEX_FE='*'", "submit.qsub", "/a"),
        ("PBS_QSUB_ON_FE=/a PBS_QSUB_ON_NODES=/b REGEX_FE='(x)'", "submit.qsub", "/a"),
        ("REAL_QSUB_ON_SERVER=/a REAL_QSUB_ON_NODES=/b SERVER_HOSTNAME=fe", "submit.qsub", {"fe": "/a", "*": "/b"}),
    ],
)
def test_single_parameters(text: str, key: str, value: object) -> None:
    converted = convert(f"N=8\n{text}\n")
    assert leaf(converted.tree, key) == value
    check_config(converted.tree)


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        ("VCPUS_DEFAULT=$(nproc)", "VCPUS_DEFAULT", "not read, because in line 1 stands the value of VCPUS_DEFAULT is"),
        ("if x; then\nRAM_DEFAULT=2\nfi", "RAM_DEFAULT", "not read, because in lines 1 to 3 stands set only as `if`"),
        ("VCPUS_DEFAULT=many", "VCPUS_DEFAULT", "'many' is no whole number"),
        ("VCPUS_DEFAULT=0", "VCPUS_DEFAULT", "policy.vcpus.default cannot be '0': a whole number from 1 to 4096 is"),
        ("VCPUS_DEFAULT=(1 2)", "VCPUS_DEFAULT", "it is an array here"),
        ("IOCM_ENABLED=0", "IOCM_ENABLED", "0 is ambiguous: with -vm there 0 was enabled and 1 disabled"),
        ("IOCM_ENABLED=perhaps", "IOCM_ENABLED", "'perhaps' is neither true nor false"),
        ("MAC_PREFIX=53:54", "MAC_PREFIX", "network.mac_prefix cannot be '53:54'"),
        ("NAME_SERVER=dns.example", "NAME_SERVER", "network.dns cannot be 'dns.example': a list of IPv4 addresses"),
        ("WS_DIR=scratch", "WS_DIR", "workspace.folder cannot be 'scratch/{job}'"),
        ("VM_IMG_DIR=/a GLOBAL_IMG_DIR=/b", "GLOBAL_IMG_DIR", "images.pool is '/a' already, by VM_IMG_DIR in line 1"),
        ("PBS_QSUB_ON_FE=/a REAL_QSUB_ON_SERVER=/b", "REAL_QSUB_ON_SERVER", "a newer parameter"),
        ("PBS_QSUB_ON_FE=qsub", "PBS_QSUB_ON_FE", "submit.qsub cannot be 'qsub'"),
        ("DISABLED_HOSTS_LIST='*'", "DISABLED_HOSTS_LIST", "the regular expression '*' has no counterpart"),
        ("FILESYSTEM_TYPE_DEFAULT=nfs", "FILESYSTEM_TYPE_DEFAULT", "'nfs' is neither sharedfs nor ramdisk"),
        ("SW_PACKAGES_DEBIAN=(9mount)", "SW_PACKAGES_DEBIAN", "the packages that were shipped with it"),
        ("IMG_DEFAULT='a b.img'", "IMG_DEFAULT", "'a b' cannot be the name of an image"),
        ("SITE_OWN=1", "SITE_OWN", "no parameter of the vTorque of 2018"),
        ("IOCM_MAX_CORES=2 IOCM_MAX_CORES_DEFAULT=4", "IOCM_MAX_CORES", "policy.iocm_max_cores"),
    ],
)
def test_what_is_dropped_says_why(text: str, name: str, reason: str) -> None:
    assert reason in why(text, name)


def test_zero_that_was_enabled_is_told() -> None:
    converted = convert("VRDMA_ENABLED_DEFAULT=0\nVCPU_PINNING_DEFAULT=1\nHOST_OS_CORE_COUNT=1\n")
    assert converted.notes == [
        "policy.vrdma.default: VRDMA_ENABLED_DEFAULT is 0, which was enabled there",
        "policy.vcpu_pinning.default: VCPU_PINNING_DEFAULT is 1, which was disabled there",
    ]


@pytest.mark.parametrize(
    ("regex", "patterns"),
    [
        ("fe1", ["*fe1*"]),
        ("^fe1$", ["fe1"]),
        ("^fe[0-9]$|^login", ["fe[0-9]", "login*"]),
        ("^n.1", ["n?1*"]),
        (r"^a\.b$", ["a.b"]),
        ("^x.*y$", ["x*y"]),
        ("a+", None),
        ("(a|b)", None),
        ("a{2}", None),
        ("[^a]", None),
        ("a||b", None),
        ("", None),
    ],
)
def test_regular_expressions_become_patterns(regex: str, patterns: Optional[list[str]]) -> None:
    if patterns is None:
        with pytest.raises(Dropped):
            host_patterns(regex)
    else:
        assert host_patterns(regex) == patterns


@FUZZ
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(PARAMETERS)),
            st.sampled_from(
                ["0", "1", "true", "no", "/a", "'/a b'", "x", "4096", "99999999", "2G", "1T", "''", "(a b)",
                 "$RAM_DEFAULT", "'a|b'", "10.0.0.1", "'-1'", "é", "02", "'#'", "'a: b'", "'{home}'", "'[x'",
                 "ramdisk", "$(x)"]
            ),
        ),
        max_size=12,
    )
)  # fmt: skip
def test_whatever_comes_in_what_comes_out_is_legal(settings: list[tuple[str, str]]) -> None:
    text = "".join(f"{name}={value}\n" for name, value in settings)
    converted = convert(text)
    check_config(yaml.safe_load(yaml.safe_dump(converted.tree)))
    told = {item.parameter for item in (*converted.carried, *converted.dropped)}
    named = {name for part in converted.unread for name in part.names}
    assert told | named >= {name for name, _ in settings}


def test_the_command_prints_a_configuration(vmgr_run: Vmgr, tmp_path: Path) -> None:
    file = tmp_path / "config.sh"
    file.write_text(OLD)
    status, out, err = vmgr_run("config", "import", str(file))
    assert (status, err) == (0, "") and yaml.safe_load(out) == NEW
    assert "\n# dropped: ARP_BIN (line 15): guests tell their addresses themselves; no arp\n" in out
    assert out.endswith("# not read: line 1: the command set\n")
    vmgr_run.node.install.config.write_text(out)
    assert vmgr_run("config", "check")[0] == 0


def test_the_command_for_programs(vmgr_run: Vmgr, tmp_path: Path) -> None:
    file = tmp_path / "config.sh"
    file.write_text("VCPUS_DEFAULT=7\nARP_BIN=/x\nset -x\n")
    told = json.loads(vmgr_run("config", "import", str(file), "--json").stdout)
    assert told["configuration"] == {"policy": {"vcpus": {"default": 7}}}
    assert told["carried"] == [{"parameter": "VCPUS_DEFAULT", "line": 1, "key": "policy.vcpus.default", "value": 7}]
    assert told["dropped"][0]["parameter"] == "ARP_BIN" and told["unread"][0]["first"] == 3


def test_the_command_writes_a_new_file_only(vmgr_run: Vmgr, tmp_path: Path) -> None:
    file, new = tmp_path / "config.sh", tmp_path / "new.yaml"
    file.write_text(OLD)
    before = os.umask(0o022)
    try:
        status, out, _ = vmgr_run("config", "import", str(file), "-o", str(new))
    finally:
        os.umask(before)
    assert status == 0 and out.endswith(f"{new}: written, 41 parameters carried over, {len(DROPPED)} dropped\n")
    assert "dropped: ARP_BIN" in out and yaml.safe_load(new.read_text()) == NEW
    assert stat.S_IMODE(new.stat().st_mode) == 0o644
    text = new.read_text()
    assert vmgr_run.refuses("config", "import", str(file), "-o", str(new)).endswith(
        "nothing was written; name a new file"
    )
    (tmp_path / "link").symlink_to("nowhere")
    vmgr_run.refuses("config", "import", str(file), "-o", str(tmp_path / "link"))
    assert "cannot write" in vmgr_run.refuses("config", "import", str(file), "-o", str(tmp_path / "none" / "x"))
    assert new.read_text() == text and not list(tmp_path.glob(".*"))


def test_a_file_that_sets_nothing(vmgr_run: Vmgr, tmp_path: Path) -> None:
    file = tmp_path / "config.sh"
    file.write_text("# nothing\n")
    out = vmgr_run("config", "import", str(file)).stdout
    assert yaml.safe_load(out) == {}


def test_what_cannot_be_such_a_file_is_refused(vmgr_run: Vmgr, tmp_path: Path) -> None:
    for name, data, says in (
        ("nul", b"A=1\nB=\0\n", "nul line 2: a NUL character"),
        ("dos", b"A=1\r\n", "dos line 1: a carriage return, which bash would not take"),
        ("latin", b"A=1\nB=\xe9\n", "latin line 2: not UTF-8"),
        ("big", b"#" * (1 << 20) + b"#", "big is larger than 1048576 bytes"),
    ):
        (tmp_path / name).write_bytes(data)
        assert says in vmgr_run.refuses("config", "import", str(tmp_path / name))
    os.mkfifo(tmp_path / "fifo")
    assert "is no regular file" in vmgr_run.refuses("config", "import", str(tmp_path / "fifo"))
    assert "No such file" in vmgr_run.refuses("config", "import", str(tmp_path / "none"))
    assert "Is a directory" in vmgr_run.refuses("config", "import", str(tmp_path))


def test_what_the_file_says_cannot_break_out_of_a_comment(vmgr_run: Vmgr, tmp_path: Path) -> None:
    file = tmp_path / "config.sh"
    file.write_text("VCPUS_DEFAULT='x\npolicy: {}\n\x1b[2J'\nDOMAIN='a\nb: c'\n")
    out = vmgr_run("config", "import", str(file)).stdout
    assert yaml.safe_load(out) == {} and "\x1b" not in out
