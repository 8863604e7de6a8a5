"""The parameters of the bash vTorque of 2018, and what becomes of each.

Names and meanings are those of its `common/config.sh`, in all of its versions, and of its administrator's manual.
"""

from __future__ import annotations

import re
from typing import Any, Callable, NamedTuple, Optional

from vmgr.images.pool import NAME
from vmgr.migration.shellwords import Value
from vmgr.units import format_size_mib, parse_count, parse_size_mib

CONSTANTS = {"FILESYSTEM_TYPE_SFS": "sharedfs", "FILESYSTEM_TYPE_RD": "ramdisk"}
"""What its `common/const.sh` has set before the configuration is read."""

SHIPPED_PACKAGES = frozenset((
    "nfs-common", "libnfs1", "openmpi-bin", "libopenmpi-dev", "libmetis5", "libmetis-dev", "9mount", "nfs-utils",
    "openmpi", "openmpi-devel", "metis", "metis-devel", "nfs-ganesha-mount-9P",
))  # fmt: skip
"""The packages in its configuration as it was shipped, for guests that mount NFS themselves."""


class Dropped(Exception):
    """A value that is not carried over; the text says why."""


Read = Callable[[Value], Any]


class Parameter(NamedTuple):
    """What becomes of a parameter: `read` turns its value into that of `key`, or raises Dropped.

    Without a key it is dropped, for the `reason`. `note` is said with a value that is carried over.
    """

    key: Optional[str]
    read: Read
    reason: str = ""
    note: str = ""


def _text(value: Value) -> str:
    if not isinstance(value, str):
        raise Dropped("it is an array here, and must be one value")
    return value


def _set(value: Value) -> str:
    if not _text(value).strip():
        raise Dropped("it is empty")
    return _text(value).strip()


def _path(value: Value) -> str:
    path = _set(value)
    return path.rstrip("/") or "/" if path.startswith("/") else path


def _below(name: str) -> Read:
    return lambda value: f"{_path(value).rstrip('/')}/{name}"


def _count(value: Value) -> int:
    count = parse_count(_set(value))
    if count is None:
        raise Dropped(f"{_set(value)!r} is no whole number")
    return count


def _size(value: Value) -> str:
    size = parse_size_mib(_set(value))
    if size is None:
        raise Dropped(f"{_set(value)!r} is no whole number of MiB")
    return format_size_mib(size)


_YES = ("true", "enabled", "yes", "auto")
_NO = ("false", "disabled", "no")


def _flag(value: Value) -> bool:
    """A switch that the program ran as a command: `true` or `false`."""
    word = _set(value).lower()
    if word in ("0", "1"):
        raise Dropped(f"{word} is ambiguous: with -vm there 0 was enabled and 1 disabled; write true or false")
    if word not in (*_YES, *_NO):
        raise Dropped(f"{_set(value)!r} is neither true nor false")
    return word in _YES


def _default_flag(value: Value) -> bool:
    """A default for a switch of `-vm`, which took 0 for enabled and 1 for disabled."""
    word = _set(value)
    return word == "0" if word in ("0", "1") else _flag(value)


def _pinning(value: Value) -> str:
    return "auto" if _default_flag(value) else "off"


NUMBERED_SWITCHES = (_default_flag, _pinning)
"""Readers of values that may be 0 for enabled and 1 for disabled."""


def _exclusive(value: Value) -> Optional[str]:
    return "uniqueuser" if _flag(value) else None


def _debug(value: Value) -> str:
    if not _flag(value):
        raise Dropped("false is what holds anyway: logging.level: info")
    return "debug"


def _image(value: Value) -> str:
    name = re.sub(r"\.(?:img|qcow2)$", "", _set(value).rpartition("/")[2]).lower()
    if not re.fullmatch(NAME, name):
        raise Dropped(f"{name!r} cannot be the name of an image: {NAME}")
    return name


def _disk_kind(value: Value) -> str:
    if _set(value) not in CONSTANTS.values():
        raise Dropped(f"{_set(value)!r} is neither sharedfs nor ramdisk")
    return _set(value)


def _words(value: Value) -> list[str]:
    words = list(value) if isinstance(value, tuple) else re.split(r"[\s,]+", _set(value))
    return [word for word in words if word]


def _packages(value: Value) -> list[str]:
    words = [word for each in _words(value) for word in each.split()]
    own = [word for word in words if word not in SHIPPED_PACKAGES]
    if not own:
        raise Dropped("the packages that were shipped with it, for NFS mounts and MPI; images here have what they need")
    return own


def host_patterns(value: Value) -> list[str]:
    """Patterns for the hosts that an extended regular expression finds, where there are such patterns.

    Raises Dropped.
    """
    text = _set(value)
    patterns = []
    for branch in text.split("|"):
        start, end = branch.startswith("^"), branch.endswith("$")
        inner = branch[start : len(branch) - end]
        parts = re.findall(r"\[[A-Za-z0-9-]+\]|\.\*|\\?\.|[A-Za-z0-9_-]+|.", inner)
        if not inner or any(not re.fullmatch(r"\[[A-Za-z0-9-]+\]|\.\*|\\?\.|[A-Za-z0-9_-]+", part) for part in parts):
            raise Dropped(f"the regular expression {text!r} has no counterpart as host patterns with *, ? and […]")
        shown = "".join({".*": "*", ".": "?", "\\.": "."}.get(part, part) for part in parts)
        patterns.append(re.sub(r"\*+", "*", f"{'' if start else '*'}{shown}{'' if end else '*'}"))
    return patterns


def _nothing(value: Value) -> Any:
    return value


def _to(key: str, read: Read, note: str = "") -> Parameter:
    return Parameter(key, read, note=note)


def _drop(reason: str) -> Parameter:
    return Parameter(None, _nothing, reason)


_NODES = "components hold for all nodes here"
_MOUNT = "guests mount no NFS with the uid of a guest, who may claim any: shares.md"
_SHOWN = "`vmgr logs --follow` and `vsub --wait` show what a job does"
_SNAP = "Snap is no more; `vmgr metrics` serves Prometheus"
_SUSPENDED_NOTE = (
    "it must be root's, mode 1777, on a file system that all nodes share; what lies there is not taken over"
)
_POOL_NOTE = "its files are no images yet: `vmgr image add` takes each in"

_SET_BY_ITSELF = (
    "ABSOLUTE_PATH_CONFIG", "CANCEL_FLAG_FILE", "DEBUG", "FLAG_FILE_CONTINUE", "LIB_LOG4BSH", "PBS_QSUB", "RAMDISK",
    "REAL_QSUB", "SCP_OPTS", "SHARED_FS_JOB_DIR", "SSH_OPTS", "TRACE", "VIRSH_OPTS",
)  # fmt: skip

PARAMETERS: dict[str, Parameter] = {
    # cluster
    "DISABLED_HOSTS_LIST": _to("submit.disabled_hosts", host_patterns),
    "REGEX_FE": _to("submit.qsub", host_patterns),
    "SERVER_HOSTNAME": _to("submit.qsub", _words),
    "PBS_QSUB_ON_FE": _to("submit.qsub", _path),
    "PBS_QSUB_ON_NODES": _to("submit.qsub", _path),
    "REAL_QSUB_ON_SERVER": _to("submit.qsub", _path),
    "REAL_QSUB_ON_NODES": _to("submit.qsub", _path),
    "TORQUE_HOME": _to("torque.mom_priv", _below("mom_priv")),
    "VM_IMG_DIR": _to("images.pool", _path, _POOL_NOTE),
    "GLOBAL_IMG_DIR": _to("images.pool", _path, _POOL_NOTE),
    "SUSPENDED_IMAGE_DIR": _to("suspended.folder", _path, _SUSPENDED_NOTE),
    "WS_DIR": _to("workspace.folder", _below("{job}"), "jobs' owners must be able to make folders there, mode 1777"),
    "SHARED_FS_ROOT_DIR": _to(
        "workspace.folder", _below("{job}"), "jobs' owners must be able to make folders there, mode 1777"
    ),
    "RAMDISK_DIR": _drop("the agent makes and mounts each job's ramdisk itself; images.ramdisk_max bounds them"),
    "RAMDISK_DIR_PREFIX": _drop("the agent makes and mounts each job's ramdisk itself; images.ramdisk_max bounds them"),
    "VM_NFS_HOME": _drop(f"{_MOUNT}; the share home shows the node's own {{home}}"),
    "VM_NFS_OPT": _drop(f"{_MOUNT}; the share opt-hpc shows the node's own /opt"),
    "VM_NFS_WS": _drop(f"{_MOUNT}; guests see workspace.folder of their node as /workspace"),
    "ARP_BIN": _drop("guests tell their addresses themselves; no arp"),
    "MAC_PREFIX": _to("network.mac_prefix", _set),
    "HOST_OS_CORE_COUNT": _to("resources.host_cores", _count),
    "HOST_OS_RAM_MB": _to("resources.host_memory", _size),
    "PBS_EXCLUSIVE_NODE_ALLOC": _to("submit.node_access", _exclusive),
    "KILL_USER_PROCESSES_AFTER_JOB": _to("guest.kill_user_processes", _flag),
    "MEASURE_TIME": _drop("times are always kept; `vmgr report` shows them"),
    "DISABLE_MIKELANGELO_HPCSTACK": _drop("`vsub -vm off` for a job; submit.without_vm for all that do not ask"),
    # timeouts
    "SSH_TIMEOUT": _to("timeouts.reach", _count),
    "TIMEOUT": _to("timeouts.boot", _count),
    "PROLOGUE_TIMEOUT": _to("timeouts.barrier", _count, "it must be less than $prologalarm of the moms"),
    "ROOT_PROLOGUE_TIMEOUT": _to("timeouts.barrier", _count, "it must be less than $prologalarm of the moms"),
    "NFS_TIMEOUT": _to("timeouts.user_file", _count),
    # what guests are told of the network
    "CUSTOM_IP_MAPPING": _drop("the program is another one: network.bridge.addresses: command"),
    "STATIC_IP_MAPPING": _drop("the program is another one: network.bridge.addresses: command"),
    "IP_TO_MAC_SCRIPT": _drop("it printed a MAC address; network.bridge.command prints `address/prefix [gateway]`"),
    "NAME_SERVER": _to("network.dns", _words),
    "DOMAIN": _to("network.domain", _set),
    "SEARCH_DOMAIN": _to("network.search", _words),
    "NTP_SERVER_1": _to("network.ntp", _words),
    "NTP_SERVER_2": _to("network.ntp", _words),
    # what guests install
    "SW_PACKAGES_DEBIAN": _to("guest.packages", _packages, "each boot takes longer by them; better build an image"),
    "SW_PACKAGES_REDHAT": _to("guest.packages", _packages, "each boot takes longer by them; better build an image"),
    # defaults of -vm
    "FILESYSTEM_TYPE_DEFAULT": _to("policy.fs_type.default", _disk_kind),
    "IMG_DEFAULT": _to("policy.img.default", _image, "an image of this name must be in the pool: `vmgr image add`"),
    "DISTRO_DEFAULT": _drop("an image says itself what it holds"),
    "ARCH_DEFAULT": _drop("an image says itself what it is for"),
    "VCPUS_DEFAULT": _to("policy.vcpus.default", _count),
    "VCPU_PINNING_DEFAULT": _to("policy.vcpu_pinning.default", _pinning),
    "RAM_DEFAULT": _to("policy.ram.default", _size),
    "VMS_PER_NODE_DEFAULT": _to("policy.vms_per_node.default", _count),
    "DISK_DEFAULT": _drop("a persistent disk is its user's own: policy.disk.enabled, then `-vm disk=`"),
    "HYPERVISOR_DEFAULT": _drop("QEMU with KVM is the only one; hypervisor.qemu is its path"),
    "VRDMA_ENABLED_DEFAULT": _to("policy.vrdma.default", _default_flag),
    "UNCLOT_ENABLED_DEFAULT": _to("policy.unclot.default", _default_flag),
    "UNCLOT_SHMEM_DEFAULT": _to("policy.unclot_shmem.default", _size),
    "UNCLOT_SHMEM": _to("policy.unclot_shmem.default", _size),
    "IOCM_ENABLED_DEFAULT": _to("policy.iocm.default", _default_flag),
    "IOCM_MIN_CORES_DEFAULT": _to("policy.iocm_min_cores.default", _count),
    "IOCM_MAX_CORES_DEFAULT": _to("policy.iocm_max_cores.default", _count),
    # debugging
    "ENABLE_DEV_MODE": _drop("no user may set a configuration that root reads"),
    "PARALLEL": _drop("nodes always work in parallel"),
    "ALLOW_USER_IMAGES": _to("images.allow_user_images", _flag),
    "KEEP_VM_ALIVE": _drop("no guest outlives its job; `vmgr report` keeps what is known of it"),
    "KEEP_VM_ALIVE_DEFAULT": _drop("no guest outlives its job; `vmgr report` keeps what is known of it"),
    "ABORT_ON_ERROR": _drop("an error always ends the job, with a code that names it"),
    # logs
    "DEBUG_DEFAULT": _to("logging.level", _debug),
    "TRACE_DEFAULT": _to("logging.level", _debug),
    "SHOW_LOG_DEFAULT": _drop(_SHOWN),
    "PRINT_TO_STDOUT": _drop(_SHOWN),
    "DEBUG_TO_STDOUT": _drop(_SHOWN),
    "LOG_ROTATE": _drop("logs are always rotated: logging.rotate"),
    "LOG_FILE": _drop("a job's log lies beside the node's, logging.file; `vmgr logs` shows it"),
    # components
    "IOCM_ENABLED": _to("components.iocm", _flag),
    "IOCM_MIN_CORES": _to("policy.iocm_min_cores.min", _count),
    "IOCM_MAX_CORES": _to("policy.iocm_max_cores.max", _count),
    "IOCM_NODES": _drop(_NODES),
    "VRDMA_ENABLED": _to("components.vrdma", _flag),
    "VRDMA_NODES": _drop(_NODES),
    "UNCLOT_ENABLED": _to("components.unclot", _flag),
    "SNAP_MONITORING_ENABLED": _drop(_SNAP),
    "SNAP_BIN_DIR": _drop(_SNAP),
    "SNAP_TAG_FORMAT": _drop(_SNAP),
    # what its files set for themselves
    **dict.fromkeys(_SET_BY_ITSELF, _drop("the old programs set it for themselves")),
    "VTORQUE_DIR": _drop("the folder is the option --prefix of install.sh"),
    "PATH": _drop("install.sh puts `vsub` and `vmgr` into the path"),
}
"""Every parameter, in the order of the old configuration file."""
