"""Who may requeue jobs in TORQUE: its managers and operators, as `qmgr -c 'list server'` tells them.

Facts from cmds/qmgr.c, server/svr_chk_owner.c and lib/Libattr/attr_fn_acl.c of TORQUE 6.1: an attribute is a line that
begins with a tab, long lists go on in lines that begin with blanks. An entry is `user` or `user@host`; in the host `*`
stands for any text and `[1-9]` for any of these numbers, letters match in both cases; `+` before it means nothing, `-`
denies. Root of the server's own host is always both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_PART = re.compile(r"\*|\[([0-9]{1,9})-([0-9]{1,9})\]|([^*\[]+)|\[")


class Privileged(NamedTuple):
    """The server's name, and the entries of its managers and operators."""

    server: str
    entries: tuple[str, ...]


def parse_server(text: str) -> Privileged:
    """What the output of `list server` says."""
    server, entries, inside = "", [], False
    for line in text.split("\n"):
        if line.startswith("Server "):
            server = line.split(" ", 1)[1].strip().partition(":")[0]
        elif line.startswith("\t"):
            name, _, value = line.strip().partition(" = ")
            inside = name in ("managers", "operators")
            entries += value.split(",") if inside else []
        elif inside and line.startswith(" "):
            entries += line.strip().split(",")
    return Privileged(server, tuple(entry.strip() for entry in entries if entry.strip()))


def may_requeue(found: Privileged, user: str, hosts: Iterable[str]) -> bool:
    """Whether a user who comes from a host, which has several names, is privileged."""
    names = tuple(hosts)
    if user == "root" and found.server.lower() in (name.lower() for name in names):
        return True
    return any(_allows(found.entries, user, host) for host in names)


def _allows(entries: Iterable[str], user: str, host: str) -> bool:
    for entry in entries:
        name, at, pattern = entry.lstrip("+-").partition("@")
        if name == user and (not at or _matches(pattern, host)):
            return not entry.startswith("-")
    return False


def _matches(pattern: str, host: str) -> bool:
    """Whether a host is meant by the pattern of an entry."""
    parts, ranges = [], []
    for part in _PART.finditer(pattern):
        if part[1] is not None:
            parts.append("([0-9]{1,9})")
            ranges.append((int(part[1]), int(part[2])))
        else:
            parts.append(".*" if part[0] == "*" else re.escape(part[0]))
    match = re.fullmatch("".join(parts), host, re.IGNORECASE)
    return match is not None and all(low <= int(text) <= high for text, (low, high) in zip(match.groups(), ranges))
