"""Cloud-config of the user's own and of the site's choice, merged as data into a guest family's user-data.

Cloud-init acts on a key only where the key's module is in one of its lists, and the template's lists name no more
than the guest program needs. So the modules of the user's keys are added, in the order of Debian's cloud.cfg (22.4),
to the list of the last stage, which the guest program runs itself once the network is up and before the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

import yaml

from vmgr.config import Software
from vmgr.errors import Code, VTorqueError

HEADER = b"#cloud-config\n"
STAGES = {"cloud_config_modules": "config", "cloud_final_modules": "final"}
"""The lists of modules that the guest program runs, in this order, and cloud-init's name for each."""

LISTS = ("cloud_init_modules", *STAGES)

MODULES: dict[str, tuple[str, ...]] = {
    "seed_random": ("random_seed",),
    "write-files": ("write_files",),
    "disk_setup": ("disk_setup", "fs_setup"),
    "mounts": ("mounts", "mount_default_fields", "swap"),
    "ca-certs": ("ca_certs", "ca-certs"),
    "rsyslog": ("rsyslog",),
    "resolv_conf": ("manage_resolv_conf", "resolv_conf"),
    "wireguard": ("wireguard",),
    "snap": ("snap",),
    "keyboard": ("keyboard",),
    "locale": ("locale", "locale_configfile"),
    "apt-configure": ("apt",),
    "yum-add-repo": ("yum_repos", "yum_repo_dir"),
    "zypper-add-repo": ("zypper",),
    "ntp": ("ntp",),
    "timezone": ("timezone",),
    "runcmd": ("runcmd",),
    "package-update-upgrade-install": ("packages", "package_update", "package_upgrade"),
    "write-files-deferred": ("write_files",),
    "puppet": ("puppet",),
    "chef": ("chef",),
    "ansible": ("ansible",),
    "mcollective": ("mcollective",),
    "salt-minion": ("salt_minion",),
    "scripts-user": ("runcmd",),
}
"""The modules that are run for the user's keys, in their order. What is not here would change the job's account, the
guest's name, its way in or its life, or needs nothing but a place in cloud-init's own configuration."""

KEYS = frozenset(("bootcmd", *LISTS, *(key for keys in MODULES.values() for key in keys)))
"""The keys that a user's cloud-config may have on nodes of this version, beside those that repeat the template."""


def with_software(metadata: Optional[Mapping[str, Any]], software: Software) -> dict[str, Any]:
    """The user's cloud-config, if there is any, and what the site has guests install; the user may ask for more.

    Raises VTorqueError (VT-SPEC) for a list of packages that is none.
    """
    both = dict(metadata or {})
    if software.packages:
        more = both.get("packages") or []
        if not isinstance(more, list):
            raise _conflict("packages")
        both["packages"] = [*software.packages, *(each for each in more if each not in software.packages)]
        both["package_update"] = True
    if software.updates:
        both["package_update"] = both["package_upgrade"] = True
    return both


class Merged(NamedTuple):
    """The user-data, and the stages of cloud-init (`config`, `final`) that the guest program has to run."""

    user_data: bytes
    stages: tuple[str, ...]


def merge(user_data: bytes, metadata: Mapping[str, Any]) -> Merged:
    """`metadata` merged key by key into the rendered `user_data`.

    Lists are joined, the template's first. Raises VTorqueError (VT-SPEC) naming a key that contradicts the template,
    that nodes do not know, or that this family cannot have.
    """
    if not user_data.startswith(HEADER):
        raise VTorqueError("the guest's family takes no cloud-config (metadata)", code=Code.SPEC)
    ours = yaml.safe_load(user_data)
    merged = dict(ours)
    for key, value in metadata.items():
        if key not in KEYS and key not in ours:
            raise VTorqueError(
                f"metadata: nodes do not take the key {key}",
                code=Code.SPEC,
                hint=f"they take {', '.join(sorted(KEYS))}",
            )
        merged[key] = _merged(ours[key], value, key) if key in ours else value
        if key not in KEYS and merged[key] != ours[key]:
            raise _conflict(key)
    named = {_name(item) for name in LISTS for item in merged.get(name) or ()}
    needed = [module for module, keys in MODULES.items() if metadata.keys() & set(keys)]
    merged["cloud_final_modules"] = [
        *(merged.get("cloud_final_modules") or ()), *(module for module in needed if _name(module) not in named)
    ]  # fmt: skip
    stages = tuple(stage for name, stage in STAGES.items() if merged.get(name))
    text = yaml.dump(merged, Dumper=_Dumper, sort_keys=False, default_flow_style=False)
    return Merged(HEADER + text.encode("ascii"), stages)


def _merged(ours: Any, theirs: Any, where: str) -> Any:
    if isinstance(ours, list) and isinstance(theirs, list):
        return [*ours, *theirs]
    if isinstance(ours, dict) and isinstance(theirs, dict):
        both = {key: _merged(ours[key], value, f"{where}.{key}") for key, value in theirs.items() if key in ours}
        return {**ours, **theirs, **both}
    if type(ours) is type(theirs) and ours == theirs:
        return ours
    raise _conflict(where)


def _conflict(where: str) -> VTorqueError:
    return VTorqueError(f"metadata: {where} contradicts what the guest needs", code=Code.SPEC, hint="leave the key out")


def _name(item: Any) -> str:
    """The module that an item of a list names, in cloud-init's own spelling; its items may have several forms."""
    if isinstance(item, list) and item:
        item = item[0]
    if isinstance(item, dict):
        item = item.get("name")
    return str(item).strip().replace("-", "_")


class _Dumper(yaml.SafeDumper):
    """Plain data without references from one place to another."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
