"""The configuration's keys: what each may hold, what it is when nobody sets it, and the check of a whole tree."""

from __future__ import annotations

from typing import Any

from vmgr.fields import (
    REQUIRED,
    Items,
    Key,
    OneOf,
    Problem,
    check,
    choice,
    flag,
    job_type,
    mac_prefix,
    name,
    nullable,
    number,
    packages,
    path,
    pattern,
    patterns,
    positive_size,
    size,
    text,
)
from vmgr.netfields import (
    address_range,
    domain,
    domains,
    hosts,
    ipv4,
    ipv4s,
    link_name,
    peer,
    ports,
    subnets,
)
from vmgr.policyschema import POLICY, check_policy
from vmgr.sharefields import KINDS, SECURITY, check_share, with_workspace

MAX_RUN_PATH = 30
"""Longest `paths.run`: with the names below it the path of a socket stays within 107 bytes (unix(7))."""

MOUNTS: list[dict[str, Any]] = [
    {"name": "home", "source": "{home}", "target": "{home}"},
    {"name": "opt-hpc", "source": "/opt", "target": "/opt-hpc", "readonly": True},
]
"""The shares of a guest when the site names none: the user's home, and the cluster's `/opt` as `/opt-hpc`."""

SCHEMA: dict[str, Any] = {
    "engine": Key(choice("torque", "local", "slurm"), "torque", "the batch system that `vsub` submits to"),
    "submit": {
        "without_vm": Key(choice("guest", "qsub"), "guest", "what a submission without -vm is"),
        "qsub": OneOf(
            Key(path, "/usr/bin/qsub", "the batch system's own qsub (engine torque), or a path for each host pattern"),
            pattern,
        ),
        "qstat": OneOf(Key(path, "/usr/bin/qstat", "likewise its qstat"), pattern),
        "qhold": OneOf(Key(path, "/usr/bin/qhold", "likewise its qhold, of which `vmgr suspend` makes use"), pattern),
        "qrls": OneOf(Key(path, "/usr/bin/qrls", "likewise its qrls, of which `vmgr resume` makes use"), pattern),
        "qrerun": OneOf(
            Key(path, "/usr/bin/qrerun", "likewise its qrerun, by which nodes requeue jobs that are suspended"), pattern
        ),
        "pbsnodes": OneOf(Key(path, "/usr/bin/pbsnodes", "likewise its pbsnodes"), pattern),
        "disabled_hosts": Key(patterns, [], "hosts from which guest jobs may not be submitted"),
        "default_queue": Key(
            nullable(name), None, "the queue, on Slurm the partition, whose policy holds for a job that names none"
        ),
        "node_access": Key(
            nullable(choice("uniqueuser", "singlejob", "singleuser", "shared")),
            "uniqueuser",
            "`naccesspolicy` of guest jobs that ask for none, on Slurm what `--exclusive` says; null: none",
        ),
        "job_type": Key(
            nullable(job_type),
            None,
            "the type of guest jobs (`qsub -T`), where the nodes have vTorque's hooks for that type; null: none",
        ),
    },
    "local": {
        "spool": Key(path, "/var/spool/vtorque-local", "state of the embedded batch system"),
        "socket": Key(path, "/run/vtorque-local.sock", "where its clients reach it"),
        "nodes": Key(number(1, 16), 1, "nodes that it simulates on this machine; 1: the machine itself is the node"),
    },
    "torque": {
        "mom_priv": Key(
            path,
            "/var/spool/torque/mom_priv",
            "where a node's daemon has its hooks and settings; `vmgr doctor` looks there",
        ),
    },
    "slurm": {
        "bin": OneOf(
            Key(path, "/usr/bin", "the folder of Slurm's commands (engine slurm), or a folder for each host pattern"),
            pattern,
        ),
    },
    "paths": {
        "spool": Key(path, "/var/spool/vtorque", "records, seeds and host keys of running jobs, one folder a job"),
        "run": Key(path, "/run/vtorque", "agents' sockets and what is true until the next boot"),
    },
    "images": {
        "pool": Key(path, "/var/lib/vtorque/images", "the guest images"),
        "allow_user_images": Key(
            flag, False, "whether users may boot disks of their own, `-vm img=/path/of/disk.qcow2`"
        ),
        "max_virtual_size": Key(
            positive_size, 1024 * 1024, "most that the disk of an image may hold that somebody adds or brings along"
        ),
        "recipes": Key(nullable(path), None, "folder with image recipes of the site's own; null: none"),
        "overlays": Key(path, "/var/spool/vtorque/overlays", "node-local folder for the guests' disks"),
        "overlays_max": Key(size, 64 * 1024, "most that the overlays of a node may grow to, together"),
        "ramdisk_max": Key(size, 16 * 1024, "most that the ramdisks of a node may take of its memory, together"),
        "cache": {
            "folder": Key(nullable(path), None, "node-local folder for copies of the pool's images; null: none"),
            "max": Key(size, 32 * 1024, "most that these copies may take; the least recently used go"),
        },
    },
    "hypervisor": {
        "qemu": Key(path, "/usr/bin/qemu-system-x86_64", "the hypervisor"),
        "virtiofsd": Key(path, "/usr/lib/qemu/virtiofsd", "the file server of shares of kind virtiofs"),
        "allow_emulation": Key(flag, False, "run guests by emulation where KVM does not work"),
        "overcommit_cpus": Key(flag, False, "let guests share CPUs when a node has too few"),
        "hugepages": Key(
            nullable(choice("2M", "1G")), None, "huge pages for guests' RAM, which each node provides; null: none"
        ),
        "vhost": Key(flag, True, "let the kernel serve guests' taps, where it has `/dev/vhost-net`"),
        "probe_seconds": Key(number(1, 120), 10, "how long KVM may take to show a kernel's first line"),
    },
    "policy": POLICY,
    "resources": {
        "host_cores": Key(number(0, 1024), 0, "cores of each node of a guest job that stay with the node"),
        "host_memory": Key(size, 256, "memory of each node of a guest job beside the guests' RAM"),
        "slots_are_cpus": Key(
            flag, False, "the slots that the batch system gives to a job of several nodes are numbers of CPUs"
        ),
    },
    "components": {
        "iocm": Key(flag, False, "the nodes have the I/O core manager"),
        "vrdma": Key(flag, False, "the nodes have virtual RDMA devices"),
        "unclot": Key(flag, False, "the nodes have shared memory between guests"),
    },
    "mounts": Items(
        {
            "name": Key(name, REQUIRED, "the share's tag"),
            "kind": Key(choice(*KINDS), "9p", "how it is served; see [shares.md](shares.md)"),
            "source": Key(
                text,
                REQUIRED,
                "folder of the node, of kind nfs SERVER:/PATH; {home}, {user}, {job}, {workspace}: the job's",
            ),
            "target": Key(text, REQUIRED, "where the guest mounts it"),
            "readonly": Key(flag, False, "whether the guest may not write"),
            "security": Key(nullable(choice(*SECURITY)), None, "kind nfs: by what the server knows who asks"),
            "public": Key(flag, False, "kind nfs, security sys: everybody may read what is there"),
        },
        MOUNTS,
        "what guests see of the node's file systems, with the rights of the job's user",
    ),
    "workspace": {
        "folder": Key(
            nullable(text),
            None,
            "each job's folder on a file system that all nodes share, such as /scratch/{user}/{job}",
        ),
        "wipe": Key(flag, False, "whether it is wiped after the job"),
    },
    "suspended": {
        "folder": Key(
            nullable(path),
            None,
            "where suspended jobs are stored, on a file system that all nodes share; null: no job can be suspended",
        ),
    },
    "guest": {
        "vm_hooks": Key(nullable(path), None, "folder with the site's VM prologue and epilogue, run as root"),
        "kill_user_processes": Key(flag, False, "whether what a job leaves running on its nodes is ended"),
        "packages": Key(packages, [], "packages that guests with cloud-init install before they are ready"),
        "updates": Key(choice("off", "boot"), "off", "boot: such guests install the updates of their packages first"),
    },
    "network": {
        "mac_prefix": Key(mac_prefix, "02", "first one to three bytes of the guests' MAC addresses, such as 02:56"),
        "dns": Key(ipv4s, [], "the guests' name servers; none: those of DHCP, where there is DHCP"),
        "domain": Key(nullable(domain), None, "the guests' domain"),
        "search": Key(domains, [], "domains in which guests look up names without a dot"),
        "ntp": Key(hosts, [], "the guests' time servers"),
        "bridge": {
            "name": Key(nullable(link_name), None, "the site's bridge on each node, for network=bridge"),
            "addresses": Key(choice("dhcp", "command", "pool"), "dhcp", "where its guests have their addresses from"),
            "command": Key(
                nullable(path), None, "program that prints `address/prefix [gateway]`; see [networks.md](networks.md)"
            ),
            "pool": OneOf(
                Key(nullable(address_range), None, "addresses for the guests of a node, or a range for each pattern"),
                pattern,
            ),
            "gateway": Key(nullable(ipv4), None, "the guests' router, where addresses are not from DHCP"),
        },
        "job": {
            "subnets": Key(subnets, "10.128.0.0/9", "where the subnets of jobs' own networks are taken from"),
            "port": Key(number(1, 65535), 4789, "UDP port of the nodes for jobs' own networks (VXLAN)"),
            "peer": Key(peer, "{node}", "name by which the address of a node is looked up that carries them"),
            "nat": Key(flag, False, "whether guests in such a network reach out through their node"),
            "ssh_ports": Key(nullable(ports), None, "ports of the node that lead to SSH of such guests from outside"),
        },
    },
    "timeouts": {
        "user_file": Key(number(1, 120), 5, "seconds for reading a file of the user's"),
        "launch": Key(number(1, 600), 30, "seconds for the hypervisor to answer"),
        "boot": Key(number(5, 3600), 240, "seconds from start to ready, the VM prologue included"),
        "barrier": Key(number(5, 3600), 270, "seconds that the user prologue waits; less than $prologalarm"),
        "attach": Key(number(5, 3600), 600, "seconds that a ready guest waits for its job; then it is ended"),
        "vm_epilogue": Key(number(1, 3600), 60, "seconds for the VM epilogue"),
        "shutdown": Key(number(1, 600), 15, "seconds for a guest to power off"),
        "disk": Key(
            number(0, 240),
            20,
            "seconds that an epilogue lets a guest with a persistent disk shut down, before it ends it",
        ),
        "sisters": Key(
            number(0, 240),
            60,
            "seconds that an Epilog of Slurm, on another node of a job than its first, lets the job end there first",
        ),
        "wipe": Key(number(1, 3600), 120, "seconds for the wiping of a workspace at the end of its job"),
        "suspend": Key(number(1, 86400), 600, "seconds for a node to store its guests of a job, and to copy them back"),
        "reach": Key(number(1, 120), 10, "seconds that the batch system, or another node, may take to answer `vmgr`"),
    },
    "logging": {
        "level": Key(choice("debug", "info", "warning", "error"), "info", "least severe message that is kept"),
        "file": Key(nullable(path), "/var/log/vtorque/node.log", "the node's log; jobs' own logs lie beside it"),
        "rotate": {
            "size": Key(size, 16, "the node's log is rotated at this size"),
            "keep": Key(number(0, 1000), 4, "rotated logs that stay"),
            "jobs": Key(number(0, 1000000), 500, "jobs' logs that stay"),
        },
        "journal": Key(flag, False, "send messages to the system's journal too (/dev/log)"),
    },
}
"""Every key of `etc/vtorque/vtorque.yaml`."""


def check_config(tree: Any) -> dict[str, Any]:
    """A whole configuration, checked, with its defaults, and with the bounds of the policy in order."""
    checked = check(tree, SCHEMA)
    if len(checked["paths"]["run"]) > MAX_RUN_PATH:
        raise Problem(("paths", "run"), f"at most {MAX_RUN_PATH} characters, because sockets lie below it")
    checked["mounts"] = with_workspace(checked["workspace"], checked["mounts"])
    tags = [mount["name"] for mount in checked["mounts"]]
    targets = [mount["target"] for mount in checked["mounts"]]
    for index, mount in enumerate(checked["mounts"]):
        if tags.count(mount["name"]) > 1:
            raise Problem(("mounts", index, "name"), f"{mount['name']} is used twice")
        if targets.count(mount["target"]) > 1:
            raise Problem(("mounts", index, "target"), f"{mount['target']} is used twice")
        try:
            check_share(mount)
        except Problem as problem:
            raise Problem(("mounts", index, *problem.path), problem.text) from None
    _check_network(checked["network"])
    check_policy(checked["policy"], tags)
    return checked


def _check_network(network: dict[str, Any]) -> None:
    """Refuse a source of addresses that is not told."""
    source = network["bridge"]["addresses"]
    if source != "dhcp" and network["bridge"][source] is None:
        raise Problem(("network", "bridge", "addresses"), f"network.bridge.{source} must be set with this")
