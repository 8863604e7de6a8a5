"""The rules that hold between the keys of one share: what its kind needs, and whom an NFS server may trust."""

from __future__ import annotations

from typing import Any

from vmgr.fields import Problem, path
from vmgr.netfields import is_host

KINDS = ("9p", "virtiofs", "nfs")
KERBEROS = ("krb5", "krb5i", "krb5p")
SECURITY = (*KERBEROS, "sys")
MAX_TAG = 31
"""Longest tag that QEMU's 9p takes (`MAX_TAG_LEN` of its hw/9pfs/9p.h, with the final 0); virtiofs takes 36."""


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
    """`{home}` may stand in the path; it is put in for each user."""
    where = text.replace("{home}", "/home/user")
    try:
        path(where)
    except ValueError as err:
        raise Problem((key,), str(err)) from None
