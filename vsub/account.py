"""Who submits: the entry in the password database, which alone says where the home is."""

from __future__ import annotations

import os
import pwd
from typing import NamedTuple

from vmgr.errors import Code, VTorqueError


class Account(NamedTuple):
    """The submitting user."""

    name: str
    uid: int
    home: str


def account() -> Account:
    """The account of the running process. `$HOME` is not asked: root will not believe it either."""
    uid = os.geteuid()
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise VTorqueError(f"uid {uid} has no account on this machine", code=Code.ACCESS) from None
    return Account(entry.pw_name, uid, entry.pw_dir)
