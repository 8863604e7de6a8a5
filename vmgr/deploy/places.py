"""What the front end and the nodes have alike: folders, links to a tree, and what is told of one that is checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Optional

from vmgr.deploy import files
from vmgr.deploy.apply import Outcome
from vmgr.deploy.manifest import Manifest
from vmgr.deploy.wants import FILE, FOLDER, LINK, TREE, Want
from vmgr.errors import VTorqueError
from vmgr.trust import check_trusted

LINKED = ("venv", "share", "libexec", "bin")
"""Folders of an installation that are links into its present tree."""


def folders_to(path: str) -> list[str]:
    """The folders above a path that are missing, and the path itself."""
    found: list[str] = []
    while path != "/" and not os.path.isdir(path):
        found.append(path)
        path = os.path.dirname(path)
    return found[::-1]


def folder_wants(path: str, manifest: Optional[Manifest]) -> list[Want]:
    """A folder, and what leads to it, as far as it is ours or missing."""
    ours = [each for each, entry in manifest.entries.items() if entry.kind == FOLDER] if manifest else []
    leading = [each for each in ours if f"{path}/".startswith(f"{each}/")]
    return [Want(each, FOLDER, 0o755) for each in sorted({*leading, *folders_to(path)}, key=len)]


def tree_links(prefix: str, name: str) -> list[Want]:
    """The links that make a tree the present one; the first of them does it for all others at once."""
    wants = [Want(f"{prefix}/current", LINK, target=f"trees/{name}")]
    return wants + [Want(f"{prefix}/{each}", LINK, target=f"current/{each}") for each in LINKED]


def earlier_trees(manifest: Optional[Manifest], present: str) -> tuple[Optional[str], list[str]]:
    """The tree before the present one, which programs that run may still use, and the paths of entries with it."""
    if manifest is None:
        return None, []
    facts = manifest.facts
    name = facts.get("previous") if facts.get("tree") == present else facts.get("tree")
    paths = [path for path, entry in manifest.entries.items() if entry.kind == TREE and path.endswith(f"/trees/{name}")]
    return (name, paths) if paths else (None, [])


def generated_files(prefix: str) -> list[str]:
    """What `vmgr config compile` leaves beside the configuration."""
    source = f"{prefix}/etc/vtorque/vtorque.yaml"
    return [f"{source}.compiled", f"{source}.front"]


def guest_jobs(spool: str) -> list[str]:
    """The jobs of which this node has a record."""
    try:
        return sorted(os.listdir(f"{spool}/jobs"))
    except OSError:
        return []


def judge(manifest: Manifest, outcome: Outcome, wants: Sequence[Want], toolkit: str) -> list[str]:
    """What a dry run tells of an installation that should be whole."""
    problems = []
    if manifest.state != "installed":
        problems.append("an installation was cut off: run it again")
    if manifest.toolkit != toolkit:
        problems.append(f"has version {manifest.toolkit}, not {toolkit}")
    problems += [f"{path} {_why(path, wants)}" for path in outcome.made]
    problems += outcome.kept
    problems += [f"{path} is left over" for path in outcome.removed]
    return problems


def _why(path: str, wants: Sequence[Want]) -> str:
    """What is wrong with a file that would be written."""
    seen = files.look(path)
    want = next(want for want in wants if want.path == path)
    if not seen.kind:
        return "is missing"
    if want.kind == FOLDER or (want.kind == FILE and seen.digest == want.digest):
        uid, gid = want.owner
        return f"has owner {seen.uid}:{seen.gid} and mode {seen.mode:04o}, not {uid}:{gid} and {want.mode:04o}"
    return "is not what this version makes of the configuration: run ./install.sh again"


def untrusted(paths: Sequence[str]) -> list[str]:
    """What others than root could change of these, and of what leads to them; each said once."""
    found = []
    for path in paths:
        if not os.path.lexists(path):
            continue
        try:
            check_trusted(path)
        except VTorqueError as err:
            found.append(err.message)
    return list(dict.fromkeys(found))
