"""The NoCloud seed of a guest: rendered from templates, packed as an ISO 9660 image that the guest can only read.

What the guests of one job have in common (names, addresses, vCPUs, keys) stands in the seed of each: in the files that
the guest, its ssh and every common `mpirun` look for.

Values enter a template in one way only: whatever an expression gives is written as JSON, which YAML reads as exactly
that value, or, in shell files, as one quoted word. So no value can end a string and start something else.
"""

from __future__ import annotations

import io
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import jinja2
import pycdlib

from vmgr.config import Mount, Software
from vmgr.errors import Code, VTorqueError
from vmgr.node.network.plan import GuestNet
from vmgr.node.user import User
from vmgr.trust import check_trusted

MAX_HOOK_BYTES = 1 << 20
FOLDER = "/run/vtorque"
"""Where a guest has the files of the seed's vtorque/ directory."""

LOCALHOST = (("127.0.0.1", "localhost"), ("::1", "localhost"))
SSH_CONFIG = """\
Host {names}
    IdentityFile {folder}/key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking yes
    BatchMode yes
    LogLevel ERROR
"""


class SeedPlan(NamedTuple):
    """What the seed of one guest says. Keys are texts in OpenSSH's formats; `environment` is what the job sees.

    `ssh_public_key` is the job's: the user logs in with it, and it has signed the guests' host keys (`host_cert`).
    `user_key` is its private half, with which the user gets from guest to guest; None leaves ssh as the image has it.
    `hosts` are address and name, `slots` name and vCPUs of every guest of the job, in the order of their ranks.
    `wait_hosts`: the addresses are not known yet; the guest tells its own (event `up`) and waits for the order `hosts`.
    `metadata` is cloud-config of the user's own, `software` what the site has guests with cloud-init install. `data`:
    the guest has the persistent disk.
    """

    instance: str
    hostname: str
    family: str
    user: User
    ssh_public_key: str
    host_key: str
    host_key_pub: str
    mounts: tuple[Mount, ...]
    network: GuestNet
    hosts: tuple[tuple[str, str], ...]
    slots: tuple[tuple[str, int], ...]
    environment: Mapping[str, str]
    metadata: Optional[Mapping[str, Any]] = None
    user_key: Optional[str] = None
    host_cert: Optional[str] = None
    wait_hosts: bool = False
    data: bool = False
    software: Software = Software()


def seed_files(plan: SeedPlan, templates: Path, hooks: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a seed by their path in it. `hooks` are the site's VM prologue and epilogue."""
    family = templates / "guest" / plan.family
    values = _values(plan)
    files = {name: _render(family / f"{name}.j2", values) for name in ("user-data", "meta-data", "network-config")}
    if plan.metadata or plan.software != Software():
        from vmgr.node.cloudconfig import merge, with_software  # loads PyYAML, which few guests need

        files["user-data"], stages = merge(files["user-data"], with_software(plan.metadata, plan.software))
        files["vtorque/stages"] = "".join(f"{stage}\n" for stage in stages).encode()
    common = templates / "guest" / "common"
    files.update({f"vtorque/{name}": (common / name).read_bytes() for name in ("guest", "run", "rsh")})
    files["vtorque/guest.env"] = os.fsencode(_guest_env(plan))
    files.update({f"vtorque/{name}": os.fsencode(text) for name, text in (_guests(plan) | _ssh(plan)).items()})
    files.update({f"vtorque/{name}": data for name, data in hooks.items()})
    return files


def site_hooks(folder: Path, rank: int) -> dict[str, bytes]:
    """The site's VM prologue and epilogue for the guest of that rank, those that are there, under these plain names.

    Guests other than that of rank 0 have `prologue.parallel` and `epilogue.parallel`, as TORQUE's sisters do. Raises
    VTorqueError when others could change them.
    """
    if not folder.is_dir():
        raise VTorqueError(f"the folder of VM hooks {folder} (guest.vm_hooks) is not there", code=Code.STAGE)
    hooks = {}
    for name in ("prologue", "epilogue"):
        path = folder / (f"{name}.parallel" if rank else name)
        if path.exists():
            check_trusted(path)
            hooks[name] = path.read_bytes()
            if len(hooks[name]) > MAX_HOOK_BYTES:
                raise VTorqueError(f"{path} is larger than {MAX_HOOK_BYTES} bytes", code=Code.STAGE)
    return hooks


def write_seed(files: Mapping[str, bytes], target: Path) -> None:
    """Write the seed with `files` to `target` (root, 0600)."""
    packed = pack_seed(files)
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as stream:
        stream.write(packed)


def pack_seed(files: Mapping[str, bytes]) -> memoryview:
    """An ISO 9660 image with `files` (label `cidata`, Rock Ridge and Joliet).

    In the guest the files are root's alone, too.
    """
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    iso.add_directory("/VTORQUE", rr_name="vtorque", joliet_path="/vtorque", file_mode=0o040500)
    for number, (name, data) in enumerate(sorted(files.items())):
        folder, _, base = name.rpartition("/")
        iso.add_fp(
            io.BytesIO(data),
            len(data),
            f"/{folder.upper() + '/' if folder else ''}F{number};1",
            rr_name=base,
            joliet_path=f"/{name}",
            file_mode=0o100400,
        )
    packed = io.BytesIO()
    iso.write_fp(packed)
    iso.close()
    return packed.getbuffer()


def _values(plan: SeedPlan) -> dict[str, Any]:
    user = plan.user
    return {
        "instance_id": plan.instance,
        "hostname": plan.hostname,
        "user": {
            "name": user.name,
            "uid": user.uid,
            "gid": user.gid,
            "group": user.group,
            "home": user.home,
            "shell": user.shell,
            "groups": [{"name": name, "gid": gid} for name, gid in user.groups],
        },
        "ssh_public_key": plan.ssh_public_key,
        "host_key": plan.host_key,
        "host_key_pub": plan.host_key_pub,
        "network": {**plan.network._asdict(), "search": _search(plan.network)},
        "mounts": [{"tag": m.name, "kind": m.kind, "target": m.target, "readonly": m.readonly} for m in plan.mounts],
    }


def _render(template: Path, values: Mapping[str, Any]) -> bytes:
    text = template.read_text()
    emit = _word if text.startswith("#!/bin/sh") else _scalar
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, finalize=emit, autoescape=False, keep_trailing_newline=True
    )
    return os.fsencode(environment.from_string(text).render(values))


def _word(value: Any) -> str:
    return shlex.quote(str(value))


def _scalar(value: Any) -> str:
    """JSON that is YAML too: YAML does not put the two halves together that JSON writes a character above U+FFFF as."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if " " <= c <= "~" else f"\\u{ord(c):04x}" if c <= "\uffff" else f"\\U{ord(c):08x}" for c in text)


def _guests(plan: SeedPlan) -> dict[str, str]:
    """The files that name the job's guests: for the resolver, for the job, for Open MPI and for MPICH."""
    files = {
        "hosts": "".join(f"{address} {name}\n" for address, name in (*LOCALHOST, *plan.hosts)),
        "nodefile": "".join(f"{name}\n" * vcpus for name, vcpus in plan.slots),
    }
    if plan.user_key is not None or len(plan.slots) == 1:  # else none reaches another, and mpirun stays where it is
        files["hostfile"] = "".join(f"{name} slots={vcpus}\n" for name, vcpus in plan.slots)
        files["machinefile"] = "".join(f"{name}:{vcpus}\n" for name, vcpus in plan.slots)
    return files


def _ssh(plan: SeedPlan) -> dict[str, str]:
    """The guest's host key, and what the user's ssh from guest to guest needs."""
    files = {"ssh_host_ed25519_key": plan.host_key, "ssh_host_ed25519_key.pub": plan.host_key_pub}
    if plan.host_cert is not None:
        files["ssh_host_ed25519_key-cert.pub"] = plan.host_cert
    if plan.user_key is not None:
        names = [name for name, _ in plan.slots]
        files["key"] = plan.user_key
        files["known_hosts"] = f"@cert-authority {','.join(names)} {plan.ssh_public_key}\n"
        files["ssh_config"] = SSH_CONFIG.format(names=" ".join(names), folder=FOLDER)
    return files


def _search(network: GuestNet) -> list[str]:
    """The domains that a resolver tries, each once."""
    return list(dict.fromkeys([*([network.domain] if network.domain else []), *network.search]))


def _mount_line(mount: Mount) -> str:
    """A share as six words: name, kind, target, mode, security and source; the last two are those of NFS, else `-`."""
    source = mount.source if mount.kind == "nfs" else "-"
    words = (
        mount.name, mount.kind, mount.target, "ro" if mount.readonly else "rw", mount.security or "-", source
    )  # fmt: skip
    return " ".join(word.translate(_NO_BLANKS) for word in words)


_NO_BLANKS = {ord(char): f"\\{ord(char):03o}" for char in " \t\n\\"}
"""As in /proc/mounts (proc(5))."""


def _guest_env(plan: SeedPlan) -> str:
    """Shell assignments for the guest program."""
    user, network = plan.user, plan.network
    values = {
        "VT_USER": user.name,
        "VT_UID": str(user.uid),
        "VT_GID": str(user.gid),
        "VT_GROUP": user.group,
        "VT_HOME": user.home,
        "VT_SHELL": user.shell,
        "VT_GROUPS": " ".join(f"{name}:{gid}" for name, gid in user.groups),
        "VT_HOSTNAME": plan.hostname,
        "VT_PUBKEY": plan.ssh_public_key,
        "VT_MAC": network.mac,
        "VT_ADDRESS": network.address or "",
        "VT_GATEWAY": network.gateway or "",
        "VT_MTU": str(network.mtu or ""),
        "VT_DNS": " ".join(network.dns),
        "VT_SEARCH": " ".join(_search(network)),
        "VT_NTP": " ".join(network.ntp),
        "VT_WAIT_HOSTS": "1" if plan.wait_hosts else "",
        "VT_MOUNTS": "\n".join(map(_mount_line, plan.mounts)),
        "VT_DATA": "1" if plan.data else "",
        "VT_ENV": "\n".join(f"{name}={value}" for name, value in plan.environment.items()),
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())
