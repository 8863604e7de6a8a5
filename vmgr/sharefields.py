"""The rules that hold between the keys of one share: what its kind needs, and whom an NFS server may trust.

And those for the jobs' workspace, which is a share too.
"""

from __future__ import annotations

import re
from typing import Any

from vmgr.config import fill
from vmgr.fields import Problem, path
from vmgr.netfields import is_host

KINDS = ("9p", "virtiofs", "nfs")
KERBEROS = ("krb5", "krb5i", "krb5p")
SECURITY = (*KERBEROS, "sys")
MAX_TAG = 31
"""Longest tag that QEMU's 9p takes (`MAX_TAG_LEN` of its hw/9pfs/9p.h, with the final 0); virtiofs takes 36."""

SAMPLE = {"home": "/home/user", "user": "user", "job": "1.server", "workspace": "/workspace/1.server"}
"""What is put in for a name where a pattern is checked."""

WORKSPACE: dict[str, Any] = {
    "name": "workspace",
    "kind": "9p",
    "source": "{workspace}",
    "target": "/workspace",
    "readonly": False,
    "security": None,
    "public": False,
}
"""The share of the workspace where the site describes none."""


def check_share(share: dict[str, Any]) -> None:
    """Refuse a share whose keys do not go together. Raises Problem with the key's path in the share."""
    if share["kind"] == "nfs":
        _check_nfs(share)
    else:
        for key, unset in (("security", None), ("public", False)):
            if share[key] != unset:
                raise Problem((key,), f"means nothing for kind {share['kind']}; it belongs to kind nfs")
        if len(share["name"]) > MAX_TAG:
            raise Problem(("name",), f"at most {MAX_TAG} characters for kind {share['kind']}, whose tag it is")
        _check_path("source", share["source"])
    _check_path("target", share["target"])


def _check_nfs(share: dict[str, Any]) -> None:
    """An NFS server is told by the guest whom it serves, and in a guest its user counts as root."""
    server, _, folder = share["source"].partition(":")
    if not is_host(server) or not folder.startswith("/"):
        raise Problem(("source",), "SERVER:/PATH is needed for kind nfs, such as nfs1:/export/data")
    _check_path("source", folder)
    if share["security"] in KERBEROS:
        if share["public"]:
            raise Problem(("public",), "means nothing with Kerberos; it belongs to security: sys")
    elif not (share["security"] == "sys" and share["public"] and share["readonly"]):
        key = "kind" if share["security"] is None else "security"
        raise Problem(
            (key,),
            "refused, because the user counts as root in a guest and may claim any uid there: an NFS share needs "
            f"Kerberos (security: {', '.join(KERBEROS)}), or holds what everybody may read "
            "(security: sys, public: true, readonly: true)",
        )


def _check_path(key: str, text: str) -> None:
    """`{home}` and other names may stand in the path; they are put in for each job."""
    try:
        path(fill(text, SAMPLE))
    except ValueError as err:
        raise Problem((key,), str(err)) from None


def with_workspace(workspace: dict[str, Any], shares: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The site's shares, and one more that shows the workspace where the site has one and no share of it.

    Raises Problem.
    """
    folder = workspace["folder"]
    users = [index for index, share in enumerate(shares) if "{workspace}" in share["source"] + share["target"]]
    if folder is None:
        if workspace["wipe"]:
            raise Problem(("workspace", "wipe"), "means nothing without workspace.folder")
        if users:
            raise Problem(("mounts", users[0]), "{workspace} means nothing without workspace.folder")
        return shares
    _check_workspace(folder, wipe=workspace["wipe"])
    if users:
        return shares
    for key in ("name", "target"):
        if any(share[key] == WORKSPACE[key] for share in shares):
            raise Problem(
                ("workspace", "folder"),
                f"a share has the {key} {WORKSPACE[key]} already; give a share the source {{workspace}}",
            )
    return [*shares, WORKSPACE]


def _check_workspace(folder: str, *, wipe: bool) -> None:
    at = ("workspace", "folder")
    known = ("{home}", "{user}", "{job}")
    strange = next((name for name in re.findall(r"\{[^}]*\}?", folder) if name not in known), None)
    if strange is not None:
        raise Problem(at, f"{strange} is none of the names {', '.join(known)}")
    try:
        path(fill(folder, SAMPLE))
    except ValueError as err:
        raise Problem(at, str(err)) from None
    if wipe and "{job}" not in folder.rstrip("/").rpartition("/")[2]:
        raise Problem(
            ("workspace", "wipe"),
            "would wipe what is not this job's: {job} must stand in the last part of workspace.folder, "
            "such as /scratch/{user}/{job}",
        )
