"""Who may run a command of `vmgr`."""

from __future__ import annotations

import os

from vmgr.errors import Code, VTorqueError


def is_root() -> bool:
    return os.geteuid() == 0


def need_root(what: str) -> None:
    """Raise VTorqueError (VT-ACCESS) unless the caller is root.

    `what` names the command and what of root's it touches, as in "vmgr node reap removes root's files".
    """
    if not is_root():
        raise VTorqueError(what, code=Code.ACCESS, hint="run it as root")
