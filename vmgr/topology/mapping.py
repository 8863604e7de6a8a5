"""A mapping of the user's own: which CPUs each vCPU of each guest may run on, held against what the job may use."""

from __future__ import annotations

from collections.abc import Mapping

from vmgr.errors import Code, VTorqueError
from vmgr.topology.cpulist import show_cpus

Mapped = tuple[tuple[frozenset[int], ...], ...]
"""For each guest, for each of its vCPUs, the CPUs that it may run on."""


def check_mapping(mapped: Mapped, usable: frozenset[int], busy: Mapping[int, int], *, overcommit: bool) -> None:
    """Refuse CPUs that are not `usable`, or that vCPUs of another guest have, be it of this job or another.

    The vCPUs of one guest may share CPUs; guests may where the site allows `overcommit`. Raises VTorqueError (VT-NODE)
    naming vCPU and CPUs.
    """
    used = {cpu for cpu, count in busy.items() if count}
    for guest in mapped:
        for vcpu, cpus in enumerate(guest):
            text = show_cpus(cpus)
            strange = cpus - usable
            if strange or not cpus:
                raise _refused(
                    vcpu, text, usable, f", of which {show_cpus(strange)} may not be" if strange != cpus else ""
                )
            if cpus & used and not overcommit:
                raise VTorqueError(
                    f"vCPU {vcpu} cannot be bound to the CPUs {text}: {show_cpus(cpus & used)} in use by another guest",
                    code=Code.NODE,
                    hint="bind it to others, or the site sets hypervisor.overcommit_cpus",
                )
        used |= frozenset().union(*guest)


def _refused(vcpu: int, text: str, usable: frozenset[int], which: str = "") -> VTorqueError:
    return VTorqueError(
        f"vCPU {vcpu} cannot be bound to the CPUs {text}{which}",
        code=Code.NODE,
        hint=f"guests may use {show_cpus(usable)} of this node",
    )
