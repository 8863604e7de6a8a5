"""Whether what guests are to see of the node's file systems, and the jobs' workspaces, is there."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

from vmgr.config import Mount
from vmgr.doctor.finding import Finding, Level, Node, finder
from vmgr.errors import VTorqueError
from vmgr.images.pool import Pool

LOCAL = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "vfat"))
"""File systems that other nodes do not see."""

_find = finder("shares")
_OCTAL = re.compile(r"\\([0-7]{3})")


def check(node: Node) -> Iterator[Finding]:
    mounts, features = node.config.mounts, _features(node)
    for mount in mounts:
        yield from _nfs(mount) if mount.kind == "nfs" else judge_folder(mount)
        if features is not None and mount.kind not in features:
            image = node.config.policy["img"]["default"]
            yield _find(
                Level.WARNING, f"the default image {image} has no driver for the share {mount.name} ({mount.kind})",
                "use another kind or image; or keep the share out of policy.mounts.default",
            )  # fmt: skip
    folder = node.config.workspace.folder
    if folder is not None:
        yield from judge_workspace(folder, (node.tree.text("proc/self/mounts") or "").splitlines())
    if not mounts:
        yield _find(Level.NOTE, "guests see nothing of the node: mounts is empty", "see docs/shares.md")


def _features(node: Node) -> Optional[Sequence[str]]:
    """The kinds of shares of the default image, None where it cannot be read: the check of images tells."""
    default = node.config.policy["img"]["default"]
    try:
        return None if default is None else Pool(node.config.pool).get(default).features
    except VTorqueError:
        return None


def fixed_part(path: str) -> str:
    """What of a path is the same for all jobs: the folder before the first name in braces."""
    return path.partition("{")[0].rpartition("/")[0] or "/" if "{" in path else path


def judge_folder(mount: Mount) -> Iterator[Finding]:
    """A share of the kinds 9p and virtiofs: its folder, or of one that differs by job the fixed part."""
    name = f"the share {mount.name} ({mount.kind})"
    if mount.source.startswith("{home}") or "{workspace}" in mount.source:
        return  # each user's own, and the workspace's
    folder = fixed_part(mount.source)
    try:
        info = os.stat(folder)
    except OSError as err:
        yield _find(Level.FAILURE, f"{name}: {folder}: {err.strerror}", f"make or mount it, or take {mount.name} away")
        return
    if not stat.S_ISDIR(info.st_mode):
        yield _find(Level.FAILURE, f"{name}: {folder} is no folder", "a share is a folder")
    elif not info.st_mode & stat.S_IXOTH:
        yield _find(
            Level.WARNING, f"{name}: not all users can enter {folder} (mode {stat.S_IMODE(info.st_mode):04o})",
            "shares are served with the rights of the job's user: chmod o+x where all are meant",
        )  # fmt: skip
    else:
        yield _find(Level.OK, f"{name}: {folder} is there")


def _nfs(mount: Mount) -> Iterator[Finding]:
    server = mount.source.partition(":")[0]
    try:
        socket.getaddrinfo(server, 2049, type=socket.SOCK_STREAM)
    except OSError as err:
        yield _find(
            Level.FAILURE, f"the share {mount.name} (nfs): {server}: {err.strerror}", "is the server's name known here?"
        )
    else:
        yield _find(Level.OK, f"the share {mount.name} (nfs): {server} is known")


def file_system_of(path: str, mounts: Sequence[str]) -> Optional[str]:
    """The type of the file system that a path lies on, by the lines of /proc/self/mounts (fstab(5)); the last wins."""
    best, found = -1, None
    for line in mounts:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        at = _OCTAL.sub(lambda code: chr(int(code[1], 8)), fields[1])
        inside = at == "/" or path == at or path.startswith(f"{at}/")
        if inside and len(at) >= best:
            best, found = len(at), fields[2]
    return found


def judge_workspace(pattern: str, mounts: Sequence[str]) -> Iterator[Finding]:
    """The folder in which jobs' workspaces are made, by their users."""
    if pattern.startswith("{home}"):
        return
    folder = fixed_part(pattern)
    if not Path(folder).is_dir():
        yield _find(Level.FAILURE, f"workspace.folder: there is no folder {folder}", "make or mount it")
        return
    mode = Path(folder).stat().st_mode
    if "{user}" not in pattern and not (mode & stat.S_IWOTH and mode & stat.S_ISVTX):
        yield _find(
            Level.WARNING, f"workspace.folder: users cannot make folders in {folder} (mode {stat.S_IMODE(mode):04o})",
            f"chmod 1777 {folder}, or a folder for each user with {{user}} in the pattern",
        )  # fmt: skip
    kind = file_system_of(folder, mounts)
    if kind in LOCAL:
        yield _find(
            Level.NOTE, f"workspace.folder: {folder} lies on {kind}, which other nodes do not see",
            "jobs of several nodes need a file system that these share",
        )  # fmt: skip
    else:
        yield _find(Level.OK, f"workspace.folder: {folder} is there ({kind})")
