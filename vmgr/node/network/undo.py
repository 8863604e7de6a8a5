"""Undoing what of an attempt's network outlives its agent, from the record; and what no record names any more."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vmgr.node.network import links, nft
from vmgr.node.network.claims import claim_of


def undo_network(step: dict[str, Any]) -> None:
    """Remove what a recorded step `network` names and what bears its mark; idempotent.

    Raises OSError; KeyError, TypeError or ValueError for a step that is none.
    """
    claim = claim_of(step)
    for name in claim.links:
        links.remove(name, claim.mark)
    for family, name in claim.tables:
        nft.remove(nft.Table(family, name, claim.mark))


def tables_of(spool: Path) -> list[nft.Table]:
    """The tables in the packet filter that attempts recorded in this spool have made.

    None where it cannot be asked: without libnftables, and by others than root. Look at them before the records: what
    is made later is named in a record before. Raises OSError.
    """
    return nft.of_spool(spool) if os.geteuid() == 0 and nft.is_there() else []


def stale_tables(tables: Collection[nft.Table], steps: Collection[dict[str, Any]]) -> list[nft.Table]:
    """Those of `tables` that no recorded step names."""
    claims = [claim_of(step) for step in steps if step.get("do") == "network"]
    named = {(family, name, claim.mark) for claim in claims for family, name in claim.tables}
    return [table for table in tables if tuple(table) not in named]


def signed_links(spool: Path) -> list[tuple[str, str]]:
    """The links of this namespace that attempts recorded in this spool have signed, each with its mark.

    To be asked before the records, as `tables_of`. Raises OSError.
    """
    if not any(name.startswith("vt") for _, name in socket.if_nameindex()):
        return []  # pyroute2 takes its time
    start = nft.mark_of_spool(spool)
    with links.netlink() as ip:
        signed = [(str(link.get_attr("IFLA_IFNAME")), link.get_attr("IFLA_IFALIAS")) for link in ip.get_links()]
    return [(name, str(mark)) for name, mark in signed if mark and str(mark).startswith(start)]


def stale_links(signed: Collection[tuple[str, str]], steps: Collection[dict[str, Any]]) -> list[tuple[str, str]]:
    """Those of `signed` that no recorded step names."""
    claims = [claim_of(step) for step in steps if step.get("do") == "network"]
    named = {(name, claim.mark) for claim in claims for name in claim.links}
    return [link for link in signed if link not in named]
