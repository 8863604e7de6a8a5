"""Who submits: the entry in the password database, which alone says where the home is."""

from __future__ import annotations

import grp
import os
import pwd
import re
from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError
from vmgr.names import USER, USERS


class Account(NamedTuple):
    """The submitting user. `group` is the name of the primary group, None where it has none."""

    name: str
    uid: int
    home: str
    group: Optional[str] = None


def account() -> Account:
    """The account of the running process. `$HOME` is not asked: root will not believe it either.

    Raises VTorqueError (VT-ACCESS) for one that guests cannot have.
    """
    uid = os.geteuid()
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise VTorqueError(f"uid {uid} has no account on this machine", code=Code.ACCESS) from None
    if not re.fullmatch(USER, entry.pw_name):
        raise VTorqueError(
            f"a user named {entry.pw_name!r} cannot have guests", code=Code.ACCESS, hint=f"allowed are {USERS}"
        )
    try:
        group = grp.getgrgid(entry.pw_gid).gr_name
    except KeyError:
        group = None
    return Account(entry.pw_name, uid, entry.pw_dir, group)
