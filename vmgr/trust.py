"""Whether a file that root is about to use could have been changed by anybody else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vmgr.errors import Code, VTorqueError


def check_trusted(path: Path) -> None:
    """Refuse `path` unless it and every directory above it belong to root and nobody else can write them.

    Symbolic links are followed component by component, and each link's own directory is checked. A directory with
    the sticky bit may be writable as long as what lies in it and is used belongs to root. Does nothing when the
    caller is not root: a user's own run harms only the user. Raises VTorqueError (VT-TRUST, or VT-CONFIG when the
    path does not exist).
    """
    if os.geteuid() != 0:
        return
    seen: set[Path] = set()
    for name in (path.absolute(), Path(os.path.realpath(path))):
        for part in (name, *name.parents):
            if part not in seen:
                seen.add(part)
                _check_one(part)


def _check_one(part: Path) -> None:
    try:
        info = part.lstat()
    except OSError as err:
        raise VTorqueError(f"cannot look at {part}: {err.strerror}", code=Code.CONFIG) from err
    if info.st_uid != 0:
        raise VTorqueError(
            f"{part} belongs to uid {info.st_uid}", code=Code.TRUST, hint=f"root uses it: chown root {part}"
        )
    if stat.S_ISLNK(info.st_mode) or (stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX):
        return
    if info.st_mode & 0o022:
        raise VTorqueError(
            f"{part} is writable by others than root (mode {stat.S_IMODE(info.st_mode):04o})",
            code=Code.TRUST,
            hint=f"root uses it: chmod go-w {part}",
        )
