"""Whether the kernel has what the node side uses: processes by descriptor, name spaces, seccomp, control groups."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Optional

from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.node.jobgroup import KINDS

OLDEST = (5, 3)
"""pidfd_open(2), by which processes are ended, is of Linux 5.3; fsopen(2), for ramdisks, of 5.2."""

_find = finder("kernel")


def check(node: Node) -> Iterator[Finding]:
    yield from judge_version(node.tree.text("proc/sys/kernel/osrelease") or os.uname().release)
    yield from judge_machine(os.uname().machine)
    yield from judge_seccomp(node.tree.text("proc/sys/kernel/seccomp/actions_avail"))
    yield from judge_namespaces(node.tree.at("proc/self/ns/net").exists())
    yield from judge_groups((node.tree.text("proc/self/mounts") or "").splitlines())
    yield from judge_boot(node.tree.text("proc/sys/kernel/random/boot_id"))


def judge_version(release: str) -> Iterator[Finding]:
    match = re.match(r"([0-9]{1,3})\.([0-9]{1,4})", release)
    if match is None or (int(match[1]), int(match[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        yield _find(Level.FAILURE, f"Linux {release} is older than {oldest}", "the node needs a newer kernel")
    else:
        yield _find(Level.OK, f"Linux {release}")


def judge_machine(machine: str) -> Iterator[Finding]:
    if machine != "x86_64":
        yield _find(Level.FAILURE, f"this is {machine}: guests are for x86_64", "take the node out of their queues")


def judge_seccomp(actions: Optional[str]) -> Iterator[Finding]:
    if not actions or "kill_process" not in actions.split():
        yield _find(
            Level.FAILURE, "the kernel has no seccomp, without which QEMU's sandbox does not start",
            "a kernel with CONFIG_SECCOMP_FILTER",
        )  # fmt: skip


def judge_namespaces(net: bool) -> Iterator[Finding]:
    if not net:
        yield _find(
            Level.WARNING, "the kernel has no network namespaces: guests have network=user only",
            "a kernel with CONFIG_NET_NS",
        )  # fmt: skip


def judge_groups(mounts: Sequence[str]) -> Iterator[Finding]:
    """Which hierarchies a batch system can have a job's control groups in."""
    fields = [line.split(" ") for line in mounts]
    kinds = sorted({field[2] for field in fields if len(field) > 2 and field[2] in KINDS})
    if kinds:
        yield _find(Level.OK, f"control groups: {', '.join(kinds)}")
    else:
        yield _find(
            Level.NOTE, "no control groups are mounted: nothing but the batch system's own bounds holds a job's guests",
            "mount /sys/fs/cgroup where the batch system is to use them",
        )  # fmt: skip


def judge_boot(boot_id: Optional[str]) -> Iterator[Finding]:
    if not boot_id or not re.fullmatch(r"[0-9a-f]{8}-[0-9a-f-]{27}", boot_id):
        yield _find(
            Level.FAILURE, "/proc/sys/kernel/random/boot_id holds no id of this boot, which every record names",
            "mount /proc",
        )  # fmt: skip
