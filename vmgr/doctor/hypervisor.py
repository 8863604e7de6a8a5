"""Whether QEMU is there and has what guests are made of: its version, devices, objects, sandbox; and virtiofsd."""

from __future__ import annotations

import asyncio
import json
import pwd
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from vmgr.config import Config, Mount
from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.doctor.run import Ran, run
from vmgr.errors import VTorqueError
from vmgr.node import virtiofsd
from vmgr.node.qemu import Descriptors, GuestPlan, command_line
from vmgr.topology.model import Layout

OLDEST = (6, 2)
"""The oldest QEMU whose options are known to be those that are used."""

_find = finder("hypervisor")


class Needed(NamedTuple):
    """What a site's guests need of QEMU: names of devices, objects, network back ends, accelerators."""

    devices: frozenset[str]
    objects: frozenset[str]
    netdevs: frozenset[str]
    accels: frozenset[str]


def check(node: Node) -> Iterator[Finding]:
    config, program = node.config, node.config.hypervisor.qemu
    told = run([program, "--version"])
    version = parse_version(told.out)
    if told.status or version is None:
        yield _find(
            Level.FAILURE, f"{program} (hypervisor.qemu) cannot be used: {told.reason}",
            "apt-get install qemu-system-x86, or set hypervisor.qemu",
        )  # fmt: skip
        return
    yield from judge_version(program, version)
    for name, wanted in needed(config)._asdict().items():
        yield from judge_features(program, name, wanted, run(_ask(program, name)))
    yield from judge_start(program, _try_sandbox(program))
    if any(mount.kind == "virtiofs" for mount in config.mounts):
        yield _virtiofsd(config)


def parse_version(text: str) -> Optional[tuple[int, int]]:
    """Version and release in what `--version` prints; None when it is none of QEMU's."""
    match = re.match(r"QEMU emulator version ([0-9]{1,4})\.([0-9]{1,4})", text)
    return (int(match[1]), int(match[2])) if match else None


def judge_version(program: str, version: tuple[int, int]) -> Iterator[Finding]:
    shown = ".".join(map(str, version))
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        yield _find(Level.WARNING, f"{program} is QEMU {shown}, older than {oldest}", "install a newer one")
    else:
        yield _find(Level.OK, f"{program} is QEMU {shown}")


def needed(config: Config) -> Needed:
    """What the guests of this site need, from the very command lines that start them."""
    plans = [_plan(config, accelerator) for accelerator in _accelerators(config)]
    fds = [_descriptors(plans[0].mounts, tap=tap) for tap in (None, 9)]
    lines = [command_line("qemu", plan, each) for plan in plans for each in fds]
    return Needed(
        devices=_named(lines, "-device"),
        objects=_named(lines, "-object"),
        netdevs=_named(lines, "-netdev"),
        accels=_named(lines, "-accel"),
    )


def _accelerators(config: Config) -> Sequence[str]:
    return ("kvm", "tcg") if config.hypervisor.allow_emulation else ("kvm",)


def _plan(config: Config, accelerator: str) -> GuestPlan:
    return GuestPlan(
        name="sample", layout=Layout.flat(1, 512), accelerator=accelerator, kernel=Path("/k"), initrd=Path("/i"),
        cmdline="", disk_format="qcow2", mac="02:00:00:00:00:01", mounts=config.mounts,
        hugepage_kib=config.hypervisor.hugepage_kib,
    )  # fmt: skip


def _descriptors(mounts: Sequence[Mount], tap: Optional[int]) -> Descriptors:
    return Descriptors(3, 4, 5, 6, 7, 8, tap=tap, data=10, shares=tuple(11 for _ in mounts))


def _named(lines: Iterable[Sequence[str]], option: str) -> frozenset[str]:
    """What stands first after an option, in any of the command lines."""
    pairs = (pair for line in lines for pair in zip(line, line[1:]))
    return frozenset(value.partition(",")[0] for word, value in pairs if word == option)


def _ask(program: str, feature: str) -> list[str]:
    option = {"devices": "-device", "objects": "-object", "netdevs": "-netdev", "accels": "-accel"}[feature]
    return [program, "-nodefaults", "-no-user-config", option, "help"]


def judge_features(program: str, what: str, wanted: Iterable[str], told: Ran) -> Iterator[Finding]:
    """Compare what is needed with what QEMU lists."""
    if told.status:
        yield _find(Level.FAILURE, f"{program} does not list its {what}: {told.reason}", "reinstall QEMU")
        return
    there = listed(told.out)
    missing = sorted(set(wanted) - there)
    if missing:
        yield _find(
            Level.FAILURE, f"{program} lacks these {what}: {', '.join(missing)}",
            "install a QEMU that has them; Debian's qemu-system-x86 has",
        )  # fmt: skip
    else:
        yield _find(Level.OK, f"it has the {what} that guests need")


def listed(text: str) -> set[str]:
    """The names in a list of QEMU's: `name "virtio-blk-pci", bus …`, or one a line."""
    names = set()
    for line in text.splitlines():
        match = re.match(r'name "([^"]+)"', line) or re.fullmatch(r"\s*([a-z0-9][a-z0-9-]*)", line)
        if match:
            names.add(match[1])
    return names


def _try_sandbox(program: str) -> Ran:
    """Start a machine as guests are started, as nobody, in the sandbox, stopped; ask for its state; end it."""
    nobody = pwd.getpwnam("nobody")
    words = ({"execute": "qmp_capabilities"}, {"execute": "query-status"}, {"execute": "quit"})
    return run(
        [
            program, "-nodefaults", "-no-user-config",
            "-display", "none",
            "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            "-machine", "q35,usb=off,vmport=off,dump-guest-core=off",
            "-accel", "tcg,thread=multi",
            "-m", "size=64M",
            "-S",
            "-chardev", "stdio,id=qmp,signal=off",
            "-mon", "chardev=qmp,mode=control",
        ],
        text="".join(json.dumps(word) + "\n" for word in words),
        uid=nobody.pw_uid,
        gid=nobody.pw_gid,
    )  # fmt: skip


def judge_start(program: str, told: Ran) -> Iterator[Finding]:
    """Whether a stopped machine answered over QMP."""
    if told.status == 0 and '"prelaunch"' in told.out:
        yield _find(Level.OK, "it starts as nobody, with the sandbox on, and answers over QMP")
        return
    remedy = "see what it says; QEMU must be built with seccomp, and the kernel have it"
    yield _find(Level.FAILURE, f"{program} does not start in its sandbox: {told.reason}", remedy)


def _virtiofsd(config: Config) -> Finding:
    path = config.hypervisor.virtiofsd
    try:
        found = asyncio.run(virtiofsd.examine(path))
    except VTorqueError as err:
        return _find(Level.FAILURE, err.message, err.hint)
    return _find(Level.OK, f"{path} is a virtiofsd in {found.language.value}")
