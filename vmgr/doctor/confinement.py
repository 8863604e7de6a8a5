"""Whether AppArmor or SELinux hold QEMU on this node, and whether they would keep it from what guests need."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Optional

from vmgr.config import Config, fill
from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.doctor.run import run

_find = finder("confinement")

PROFILES = ("vtorque-qemu", "vtorque-virtiofsd")
PROFILE_FILE = "etc/apparmor.d/vtorque"
PLACES_FILE = "etc/apparmor.d/tunables/vtorque"
ATTACHED = ("/usr/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm")
"""The programs that our profile for QEMU is attached to."""
PAGE = "docs/hardening.md"
_RELOAD = f"then apparmor_parser -r /{PROFILE_FILE}"
_LOADED = re.compile(r"(\S.*) \((enforce|complain|kill|unconfined|prompt)\)")
_VARIABLE = re.compile(r"^\s*@\{(VTORQUE_[A-Z]+)\}\s*(\+?)=\s*(.*?)\s*(?:#.*)?$", re.MULTILINE)


class Place(NamedTuple):
    """A folder that QEMU or virtiofsd must reach, the key that names it, and the variable of the profile for it."""

    path: str
    key: str
    variable: str


def check(node: Node) -> Iterator[Finding]:
    modules = (node.tree.text("sys/kernel/security/lsm") or "").split(",")
    armored = node.tree.text("sys/module/apparmor/parameters/enabled") == "Y"
    enforcing = node.tree.text("sys/fs/selinux/enforce")
    if armored:
        yield from judge_apparmor(
            profiles(node.tree.text("sys/kernel/security/apparmor/profiles")),
            node.tree.text(PLACES_FILE),
            places(node.config),
            node.config.hypervisor.qemu,
        )
    if enforcing is not None:
        listed = run(["semodule", "-l"])
        loaded = None if listed.status else "vtorque" in listed.out.split()
        no_execmem = (node.tree.text("sys/fs/selinux/booleans/deny_execmem") or "0")[:1] == "1"
        yield from judge_selinux(
            enforcing == "1", loaded, no_execmem=no_execmem and node.config.hypervisor.allow_emulation
        )
    if not armored and enforcing is None:
        others = ", ".join(name for name in modules if name in ("smack", "tomoyo", "landlock", "yama"))
        yield _find(
            Level.NOTE,
            "neither AppArmor nor SELinux is in force: QEMU is held by the rights of its user and its own sandbox"
            + (f" (the kernel has {others})" if others else ""),
            f"boot with apparmor=1 security=apparmor, or see {PAGE}",
        )
    yield from judge_tracing(node.tree.text("proc/sys/kernel/yama/ptrace_scope"))


def profiles(text: Optional[str]) -> Optional[dict[str, str]]:
    """The loaded profiles by name, each with its mode; None where they cannot be read."""
    if text is None:
        return None
    return {match[1]: match[2] for match in map(_LOADED.fullmatch, text.splitlines()) if match}


def places(config: Config) -> list[Place]:
    """The folders of a site's guests on the node. A share of a user's own is taken as a folder of its parent."""
    found = [
        Place(str(config.images.pool), "images.pool", "VTORQUE_IMAGES"),
        Place(str(config.paths.spool), "paths.spool", "VTORQUE_DISKS"),
        Place(str(config.images.overlays), "images.overlays", "VTORQUE_DISKS"),
    ]
    if config.images.cache.folder is not None:
        found.append(Place(str(config.images.cache.folder), "images.cache.folder", "VTORQUE_IMAGES"))
    if config.suspended.folder is not None:
        found.append(Place(config.suspended.folder, "suspended.folder", "VTORQUE_SHARES"))
    folder = config.workspace.folder
    if folder is not None:
        found.append(Place(_fixed(folder), "workspace.folder", "VTORQUE_SHARES"))
    for mount in config.mounts:
        if mount.kind != "nfs" and not mount.source.startswith("{workspace}"):
            found.append(Place(_fixed(mount.source), f"the share {mount.name}", "VTORQUE_SHARES"))
    return found


def _fixed(path: str) -> str:
    """What of a path is the same for all jobs: up to the part in which something of a job's stands."""
    path = fill(path, {"home": "/home/{user}"})
    return path if "{" not in path else path.partition("{")[0].rpartition("/")[0] or "/"


def judge_apparmor(
    loaded: Optional[Mapping[str, str]], variables: Optional[str], needed: list[Place], qemu: str
) -> Iterator[Finding]:
    """Which profiles hold QEMU and virtiofsd, and whether ours let them at what they need."""
    if loaded is None:
        yield _find(Level.NOTE, "AppArmor is in force; which profiles are loaded only root can see", "run it as root")
        return
    for name in PROFILES:
        if name in loaded:
            how = "holds what it starts" if loaded[name] in ("enforce", "kill") else "only tells what it would refuse"
            yield _find(Level.OK, f"AppArmor's profile {name} is loaded ({loaded[name]}): it {how}")
        else:
            yield _find(
                Level.NOTE, f"AppArmor is in force, and its profile {name} is not loaded",
                f"copy contrib/apparmor to /etc/apparmor.d, {_RELOAD}; {PAGE}",
            )  # fmt: skip
    if PROFILES[0] in loaded and qemu not in ATTACHED:
        yield _find(
            Level.WARNING, f"AppArmor's profile {PROFILES[0]} is not attached to {qemu} (hypervisor.qemu)",
            f"put that path into the profile's first line and its rules, {_RELOAD}",
        )  # fmt: skip
    foreign = sorted(name for name in loaded if name in (qemu, Path(qemu).name) and name not in PROFILES)
    for name in foreign:
        level = Level.WARNING if loaded[name] in ("enforce", "kill") else Level.NOTE
        yield _find(
            level, f"AppArmor's profile {name} ({loaded[name]}) is not vTorque's, and holds {qemu}",
            f"aa-disable {name}, if guests are refused what they need; {PAGE}",
        )  # fmt: skip
    if any(name in loaded for name in PROFILES):
        yield from judge_places(read_variables(variables or ""), needed, enforced=_enforced(loaded))


def _enforced(loaded: Mapping[str, str]) -> bool:
    return any(loaded.get(name) in ("enforce", "kill") for name in PROFILES)


def read_variables(text: str) -> dict[str, list[str]]:
    """The values of the profile's variables: `@{NAME}=one two`, added to by `+=`."""
    found: dict[str, list[str]] = {}
    for name, more, values in _VARIABLE.findall(text):
        paths = [value.strip('"') for value in values.split()]
        found[name] = [*found.get(name, []), *paths] if more else paths
    return found


def judge_places(variables: Mapping[str, list[str]], needed: list[Place], *, enforced: bool) -> Iterator[Finding]:
    """Whether each place lies in one of its variable's folders."""
    lacking = [
        place for place in needed if not any(_within(place.path, top) for top in variables.get(place.variable, []))
    ]
    level = Level.FAILURE if enforced else Level.WARNING
    for place in dict.fromkeys(lacking):
        what = "keep" if enforced else "would keep"
        yield _find(
            level, f"AppArmor's profiles {what} guests from {place.path} ({place.key})",
            f"add it to @{{{place.variable}}} in /{PLACES_FILE}, {_RELOAD}",
        )  # fmt: skip
    if not lacking:
        yield _find(Level.OK, "AppArmor's profiles have every folder that guests need")


def _within(path: str, top: str) -> bool:
    return f"{path.rstrip('/')}/".startswith(f"{top.rstrip('/')}/")


def judge_selinux(enforcing: bool, loaded: Optional[bool], *, no_execmem: bool) -> Iterator[Finding]:
    """What SELinux does with guests. `loaded` tells of our module; None where that cannot be seen.

    `no_execmem`: guests are to be emulated, and memory may not be made executable.
    """
    mode = "enforcing" if enforcing else "permissive"
    if loaded:
        yield _find(Level.OK, f"SELinux is {mode}, and its module vtorque is loaded")
    elif loaded is None:
        yield _find(Level.NOTE, f"SELinux is {mode}; which modules are loaded only root can see", "run it as root")
    else:
        yield _find(
            Level.NOTE, f"SELinux is {mode}, and its module vtorque is not loaded: QEMU runs in the domain of the mom",
            f"semodule -i vtorque.pp, made from contrib/selinux; {PAGE}",
        )  # fmt: skip
    if no_execmem:
        yield _find(
            Level.FAILURE if enforcing else Level.WARNING,
            "SELinux's deny_execmem is on: guests that are emulated do not start",
            "setsebool -P deny_execmem off, or let no guest be emulated (hypervisor.allow_emulation)",
        )  # fmt: skip


def judge_tracing(scope: Optional[str]) -> Iterator[Finding]:
    """Who may look into a QEMU: it holds what the guest holds in memory."""
    if scope == "0":
        yield _find(
            Level.NOTE, "any process of a user's may look into the guests of that user (kernel.yama.ptrace_scope 0)",
            "sysctl kernel.yama.ptrace_scope=1, where users do not debug processes that they find running",
        )  # fmt: skip
