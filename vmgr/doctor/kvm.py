"""Whether KVM boots a guest here: tried now, whatever the node remembers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.errors import VTorqueError
from vmgr.images.pool import Pool
from vmgr.node import accel
from vmgr.node.accel import Kvm

_find = finder("KVM")


def check(node: Node) -> Iterator[Finding]:
    kernel = _kernel(node)
    if kernel is None:
        yield _find(Level.WARNING, "KVM cannot be tried: no image in the pool has a kernel", "vmgr image build micro")
        return
    begun = time.monotonic()
    found = accel.find_out(node.config, kernel)
    yield from judge(found, accel.remembered(node.config), node, time.monotonic() - begun)


def _kernel(node: Node) -> Optional[Path]:
    """A kernel to try: that of the site's default image, else of any."""
    pool = Pool(node.config.pool)
    default = node.config.policy["img"]["default"]
    for name in sorted(pool.names(), key=lambda name: (name != default, name)):
        try:
            return pool.get(name).path("kernel")
        except VTorqueError:
            continue
    return None


def judge(found: Kvm, known: Optional[Kvm], node: Node, seconds: float) -> Iterator[Finding]:
    """What was found just now, and what is remembered since the boot."""
    config, device = node.config, node.tree.at("dev/kvm")
    if found.works:
        yield _find(Level.OK, f"a guest's kernel started under {device} ({seconds:.1f} s)")
    else:
        allowed = config.hypervisor.allow_emulation
        then = "guests are emulated, some ten times slower" if allowed else "jobs with guests are refused here"
        origin = config.origin("hypervisor.allow_emulation")
        remedy = _remedy(found.reason, device.exists(), config.hypervisor.probe_seconds)
        if not allowed:
            remedy += f"; or, to try things out, hypervisor.allow_emulation: true ({origin})"
        yield _find(Level.WARNING if allowed else Level.FAILURE, f"KVM does not work: {found.reason}: {then}", remedy)
    if known is not None and known.works != found.works:
        file = config.paths.run / "kvm.json"
        was = "that it works" if known.works else f"that it does not work ({known.reason})"
        yield _find(Level.WARNING, f"the node remembers {was}", f"rm {file}: the next guest tries again")


def _remedy(reason: str, has_device: bool, limit_s: int) -> str:
    if not has_device:
        return (
            "load kvm_intel or kvm_amd; if it cannot be loaded, switch virtualization on in the firmware, on a virtual "
            "machine nested virtualization in its hypervisor"
        )
    if "showed nothing" in reason:
        return (
            f"the node's own hypervisor does not nest guests; on a slow node raise hypervisor.probe_seconds ({limit_s})"
        )
    if "ermission" in reason:
        return "give /dev/kvm to the group kvm, mode 0660, or everybody 0666: QEMU runs as the job's user"
    return "see dmesg for what the kernel says of kvm"
