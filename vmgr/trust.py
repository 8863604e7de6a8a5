"""Whether a file that root is about to use could have been changed by anybody else."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Union

from vmgr.errors import Code, VTorqueError

if TYPE_CHECKING:
    from pathlib import Path

MAX_LINKS = 40


def check_trusted(path: Union[str, Path]) -> None:
    """Refuse `path` unless it and every directory above it belong to root and nobody else can write them.

    Symbolic links are followed component by component, and each link on the way is checked. A directory with
    the sticky bit may be writable as long as what lies in it and is used belongs to root. Does nothing when the
    caller is not root: a user's own run harms only the user. Raises VTorqueError (VT-TRUST, or VT-CONFIG when the
    path does not exist).
    """
    if os.geteuid() != 0:
        return
    from pathlib import Path  # a submission does without

    at = Path("/")
    _check_one(at)
    left = [*reversed(Path(path).absolute().parts[1:])]
    links = 0
    while left:
        name = left.pop()
        if name == "..":
            at = at.parent
            continue
        part = at / name
        if not stat.S_ISLNK(_check_one(part)):
            at = part
            continue
        links += 1
        if links > MAX_LINKS:
            raise VTorqueError(f"too many symbolic links lead to {path}", code=Code.CONFIG)
        target = part.readlink()
        left += reversed(target.parts)
        if target.is_absolute():
            at = Path(left.pop())


def _check_one(part: Path) -> int:
    """The mode of `part`, when it can be trusted."""
    try:
        info = part.lstat()
    except OSError as err:
        raise VTorqueError(f"cannot look at {part}: {err.strerror}", code=Code.CONFIG) from err
    if info.st_uid != 0:
        raise VTorqueError(
            f"{part} belongs to uid {info.st_uid}", code=Code.TRUST, hint=f"root uses it: chown root {part}"
        )
    harmless = stat.S_ISLNK(info.st_mode) or (stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX)
    if not harmless and info.st_mode & 0o022:
        raise VTorqueError(
            f"{part} is writable by others than root (mode {stat.S_IMODE(info.st_mode):04o})",
            code=Code.TRUST,
            hint=f"root uses it: chmod go-w {part}",
        )
    return info.st_mode
