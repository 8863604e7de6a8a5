"""Who submits: the entry in the password database, which alone says where the home is."""

from __future__ import annotations

import grp
import os
import pwd
from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError


class Account(NamedTuple):
    """The submitting user. `group` is the name of the primary group, None where it has none."""

    name: str
    uid: int
    home: str
    group: Optional[str] = None


def account() -> Account:
    """The account of the running process. `$HOME` is not asked: root will not believe it either."""
    uid = os.geteuid()
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise VTorqueError(f"uid {uid} has no account on this machine", code=Code.ACCESS) from None
    try:
        group = grp.getgrgid(entry.pw_gid).gr_name
    except KeyError:
        group = None
    return Account(entry.pw_name, uid, entry.pw_dir, group)
