"""Users of the node, as its name service knows them."""

from __future__ import annotations

import grp
import os
import pwd
import re
from typing import NamedTuple, Optional

from vmgr.errors import Code, VTorqueError

_GROUP_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")


class User(NamedTuple):
    """A user of the node, as its name service knows it. `groups` holds (name, gid) of the supplementary groups."""

    name: str
    uid: int
    gid: int
    group: str
    home: str
    shell: str
    groups: tuple[tuple[str, int], ...]

    @property
    def gids(self) -> list[int]:
        return [gid for _, gid in self.groups]


def look_up(name: str) -> User:
    """The user `name`. Raises VTorqueError (VT-NODE) when the node does not know it, or when it is root."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise VTorqueError(f"the node does not know the user {name}", code=Code.NODE) from None
    if entry.pw_uid == 0:
        raise VTorqueError("jobs of root do not run in guests", code=Code.NODE)
    gids = [gid for gid in os.getgrouplist(name, entry.pw_gid) if gid not in (0, entry.pw_gid)]
    return User(
        name=entry.pw_name,
        uid=entry.pw_uid,
        gid=entry.pw_gid,
        group=_group_name(entry.pw_gid),
        home=entry.pw_dir,
        shell=entry.pw_shell or "/bin/sh",
        groups=tuple((_group_name(gid), gid) for gid in gids),
    )


def primary_group(user: User) -> Optional[str]:
    """The name of the user's primary group exactly as the node's name service has it, None when it knows none."""
    try:
        return grp.getgrgid(user.gid).gr_name
    except KeyError:
        return None


def _group_name(gid: int) -> str:
    """The group's name, or one that every guest can have: directory services know names with blanks."""
    try:
        name = grp.getgrgid(gid).gr_name
    except KeyError:
        name = ""
    return name if _GROUP_NAME.fullmatch(name) else f"g{gid}"
