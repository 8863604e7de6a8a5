"""Whether the node has the programs, libraries and Python modules of which guests are made ready."""

from __future__ import annotations

import ctypes
import importlib
import shutil
from collections.abc import Iterator
from typing import NamedTuple

from vmgr.config import Config
from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.node.datadisk import MKFS
from vmgr.node.network.nft import LIBRARY as NFTABLES
from vmgr.topology import numad

_find = finder("programs")


class Wanted(NamedTuple):
    """Something that has to be there: a program, a library or a Python module; what for; its Debian package."""

    kind: str
    name: str
    purpose: str
    package: str


SEED = "the NoCloud seeds of guests"


def wanted(config: Config) -> list[Wanted]:
    """What this site's guests take."""
    policy = config.policy
    found = [
        Wanted("program", "qemu-img", "guests' disks", "qemu-utils"),
        Wanted("program", "ssh", "the way of a job into its guest", "openssh-client"),
        Wanted("program", "ssh-keygen", "the host keys of guests", "openssh-client"),
        Wanted("module", "pycdlib", SEED, ""),
        Wanted("module", "jinja2", SEED, ""),
        Wanted("module", "yaml", SEED, ""),
        Wanted("module", "cryptography", "the certificates of guests", ""),
        Wanted("module", "qemu.qmp", "the control of QEMU", ""),
        Wanted("module", "psutil", "the cleaning up after jobs", ""),
    ]
    if policy["disk"]["enabled"]:
        found.append(Wanted("program", MKFS, "new persistent disks", "e2fsprogs"))
    if set(policy["network"]["allowed"]) & {"job", "bridge"}:
        found.append(Wanted("library", NFTABLES, "networks of guests other than user", "libnftables1"))
        found.append(Wanted("module", "pyroute2", "networks of guests other than user", ""))
    return found


def is_there(each: Wanted) -> bool:
    """Whether it can be found, and for a library and a module loaded."""
    try:
        if each.kind == "program":
            return shutil.which(each.name, path="/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin") is not None
        if each.kind == "library":
            ctypes.CDLL(each.name)
        else:
            importlib.import_module(each.name)
    except (OSError, ImportError):
        return False
    return True


def check(node: Node) -> Iterator[Finding]:
    yield from judge(wanted(node.config), node)
    if "numad" in node.config.policy["vcpu_pinning"]["allowed"] and not numad.is_installed():
        yield _find(
            Level.NOTE, "numad is not installed: guests with vcpu_pinning=numad are placed without its advice",
            "apt-get install numad, or leave numad out of policy.vcpu_pinning.allowed",
        )  # fmt: skip


def judge(needed: list[Wanted], node: Node) -> Iterator[Finding]:
    """A failure for each that is missing."""
    missing = [each for each in needed if not is_there(each)]
    for each in missing:
        remedy = f"apt-get install {each.package}" if each.package else f"install vTorque anew at {node.install.prefix}"
        name = f"the Python module {each.name}" if each.kind == "module" else each.name
        yield _find(Level.FAILURE, f"{name} is missing, which {each.purpose} need", remedy)
    if not missing:
        yield _find(Level.OK, f"{', '.join(each.name for each in needed)} are there")
