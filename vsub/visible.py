"""Where the user is, and whether a folder of this machine is seen in the guest."""

from __future__ import annotations

import os

from vmgr.checks import visible_in_guest
from vmgr.config import Mount
from vmgr.errors import Code, VTorqueError


def submission_directory() -> str:
    """Where the user is, by the name that the user knows it by (`$PWD`) where that is true."""
    named = os.environ.get("PWD", "")
    try:
        here = os.getcwd()
        if named.startswith("/") and os.path.samestat(os.stat(named), os.stat(".")):
            return named
    except OSError as err:
        raise VTorqueError(f"the current directory is gone: {err.strerror}", code=Code.WORKDIR) from err
    return here


def below(folder: str, path: str) -> str:
    """`path` as seen from `folder`; not normalised, for `..` behind a link is not what it seems."""
    return path if path.startswith("/") else f"{folder.rstrip('/')}/{path}" if path else folder


def is_visible(path: str, mounts: tuple[Mount, ...]) -> bool:
    """Whether a folder of this machine is seen in the guest under the same path, also behind symbolic links.

    A share whose own source is reached by a link (a home that is one) still shows what is below it.
    """
    if not visible_in_guest(path, mounts):
        return False
    real = os.path.realpath(path)
    same = [mount for mount in mounts if mount.source == mount.target]
    resolved = tuple(
        mount._replace(source=source, target=source)
        for mount in same
        for source in {mount.source, os.path.realpath(mount.source)}
    )
    return visible_in_guest(real, resolved)
