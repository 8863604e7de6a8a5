"""The seed of each of a node's guests, from the job and what was made for its guests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Optional

from vmgr.config import Network, Software
from vmgr.node.guestjob import Job
from vmgr.node.keys import HostKey, certify
from vmgr.node.members import Member
from vmgr.node.network.plan import guest_net
from vmgr.node.network.wires import Wires
from vmgr.node.workspace import seen_at

if TYPE_CHECKING:
    from vmgr.node.seed import SeedPlan

MAX_VARIABLE_BYTES = 100_000
"""Linux starts no program with a variable of more than 128 KiB (execve(2), MAX_ARG_STRLEN)."""


class Common(NamedTuple):
    """What the seeds of a node's guests have in common."""

    host_key: HostKey
    certificate: Optional[str]
    wires: Wires
    network: Network
    software: Software


def certificate(job: Job, host_key: HostKey) -> Optional[str]:
    if job.key is None:
        return None
    return certify(host_key, [member.name for member in job.own], job.key, job.spec.ssh_public_key)


def write_seed_of(job: Job, member: Member, common: Common, templates: Path, vm_hooks: Optional[Path]) -> Path:
    from vmgr.node.seed import seed_files, site_hooks, write_seed

    hooks = site_hooks(vm_hooks, member.rank) if vm_hooks else {}
    seed = job.place.folder / f"seed.{member.number}.iso"
    write_seed(seed_files(_seed_plan(job, member, common), templates, hooks), seed)
    return seed


def _seed_plan(job: Job, member: Member, common: Common) -> SeedPlan:
    from vmgr.node.seed import SeedPlan

    group, wires, kind, names = job.group, common.wires, job.network.kind, " ".join(job.names)
    workspace = seen_at(job.mounts, job.stands_for)
    known = {"user": [member], "job": job.network.members, "bridge": []}[kind]
    return SeedPlan(
        instance=f"{job.job_id}-{job.place.attempt}-{member.number}",
        hostname=member.name,
        family=job.image.family,
        user=job.user,
        ssh_public_key=job.spec.ssh_public_key,
        host_key=common.host_key.private,
        host_key_pub=common.host_key.public,
        host_cert=common.certificate,
        user_key=None if job.key is None else job.key.decode("ascii", "replace"),
        mounts=job.mounts,
        network=guest_net(
            job.network,
            member,
            common.network,
            address=wires.addresses[member.number - 1],
            gateway=wires.gateways[member.number - 1],
            mtu=wires.mtu,
        ),
        hosts=tuple((each.address, each.name) for each in known if each.address is not None),
        wait_hosts=kind == "bridge",
        slots=tuple((name, group.vcpus) for name in job.names),
        environment={
            "DISTRO": job.image.distro,
            "VTORQUE_DISTRO": job.image.family,
            "VTORQUE_IMAGE": job.image.name,
            "VTORQUE_JOBID": job.job_id,
            "VTORQUE_NODE": job.allocation.name,
            "VTORQUE_RANK": str(member.rank),
            **({"VTORQUE_WORKSPACE": workspace} if workspace is not None else {}),
            **({"VTORQUE_GUESTS": names} if len(names) <= MAX_VARIABLE_BYTES else {}),
            "VTORQUE_VCPUS": str(group.vcpus),
            "VTORQUE_RAM_MIB": str(group.ram_mib),
        },
        metadata=job.spec.metadata,
        software=common.software if "cloud-init" in job.image.features else Software(),
        data=job.spec.disk is not None and member.rank == 0,
    )
