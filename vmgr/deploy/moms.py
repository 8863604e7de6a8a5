"""What is wanted in a mom's `mom_priv`: our hooks, the site's own aside, and time enough for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple, Optional

from vmgr.deploy import alarm, slurmfiles
from vmgr.deploy.files import look
from vmgr.deploy.hookfiles import (
    HOOK_MODE,
    SITE_FOLDER,
    SITE_FOLDER_MODE,
    WRAP,
    fill,
    hook_files,
    is_open_to_users,
    is_ours,
    site_hooks,
)
from vmgr.deploy.manifest import Manifest
from vmgr.deploy.wants import FILE, FOLDER, Want

MAX_BYTES = 1 << 20
BACKUP = "vtorque-config.before"
"""In `mom_priv` itself, which may be a file system of its own: a file gets a second name only within one."""


class Hooks(NamedTuple):
    """How hooks are to be: their mode, the type of guest jobs, what is filled into them, and their sources by name."""

    mode: str
    job_type: str
    prefix: str
    spool: str
    sources: Mapping[str, str]

    def text(self, source: str) -> bytes:
        """The hook that is installed from a source."""
        return fill(self.sources[source], prefix=self.prefix, spool=self.spool).encode()


def content(path: str) -> bytes:
    """The beginning of a file, following links, without waiting for anything; nothing where it cannot be read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            return stream.read(MAX_BYTES)
    except OSError:
        return b""


def hook_wants(mom_priv: str, hooks: Hooks) -> list[Want]:
    """Our hooks in `mom_priv`, and in the mode `wrap` the folder for those of the site."""
    movable = set(site_hooks(hooks.mode))
    site = f"{mom_priv}/{SITE_FOLDER}"
    wants = [Want(site, FOLDER, SITE_FOLDER_MODE)] if hooks.mode == WRAP else []
    for hook in hook_files(hooks.mode, hooks.job_type):
        path, aside = f"{mom_priv}/{hook.target}", f"{site}/{hook.target}" if hook.target in movable else None
        ours = is_ours(content(path))
        has_own = (look(path).kind and not ours) or (aside is not None and look(aside).kind)
        if hook.always or has_own:
            wants.append(Want(path, FILE, hook.mode, hooks.text(hook.source), aside=aside, over=ours, hook=True))
    return wants


def samples(folder: str, hooks: Hooks) -> list[Want]:
    """The hooks as they lie in the installation: Slurm's, which slurm.conf names there, and those for `mom_priv`, for
    those who put them there by themselves.
    """
    wants = [Want(folder, FOLDER, 0o755)]
    for hook in hook_files(WRAP):
        if hook.always:
            wants.append(Want(f"{folder}/{hook.target}", FILE, HOOK_MODE, hooks.text(hook.source)))
    wants.append(Want(f"{folder}/slurm", FOLDER, 0o755))
    wants += [Want(f"{folder}/slurm/{name}", FILE, HOOK_MODE, hooks.text(f"slurm/{name}")) for name in slurmfiles.HOOKS]
    return wants


def alarm_want(mom_priv: str, seconds: int, manifest: Optional[Manifest]) -> Optional[Want]:
    """The mom's configuration with time enough for hooks; None where it has that. What was there becomes BACKUP.

    Raises OSError for a configuration that cannot be read.
    """
    path = f"{mom_priv}/config"
    entry = manifest.entries.get(path) if manifest else None
    aside = (entry.aside if entry else None) or f"{mom_priv}/{BACKUP}"
    base = aside if entry is not None and look(aside).kind else path
    seen = look(base)
    text = content(base).decode("utf-8", "surrogateescape") if seen.kind else None
    if entry is not None and not entry.pending and look(aside).kind == "" and look(path).digest in entry.ours:
        text = None  # there was none, and it is all ours
    new = alarm.raised(text, seconds)
    if new is None:
        return None
    mode, owner = (seen.mode, (seen.uid, seen.gid)) if seen.kind == "file" else (0o644, (0, 0))
    return Want(path, FILE, mode, new.encode("utf-8", "surrogateescape"), aside=aside, owner=owner)


def alarm_problem(mom_priv: str, seconds: int) -> Optional[str]:
    """What is wrong with the time that hooks have on this node, None for nothing."""
    found, problem = alarm.parse_alarm(content(f"{mom_priv}/config").decode("utf-8", "replace"))
    if problem is not None:
        return f"{mom_priv}/config {problem}"
    if found.seconds < seconds:
        return f"$prologalarm is {found.seconds} s in {mom_priv}/config, and {seconds} s are needed"
    return None


def choosable(mom_priv: str, mode: str, job_type: str) -> list[str]:
    """Files in `mom_priv` that are neither the site's hooks nor ours, and that users can have run as root."""
    known = {*(hook.target for hook in hook_files(mode, job_type)), *site_hooks(WRAP)}
    names = sorted(name for name in os.listdir(mom_priv) if is_open_to_users(name) and name not in known)
    return [f"{mom_priv}/{name} is run as root for whoever asks by qsub -T {name.partition('.')[2]}" for name in names]
