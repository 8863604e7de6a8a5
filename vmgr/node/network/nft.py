"""The kernel's packet filter, through libnftables in this process: commands as JSON (libnftables-json(5)).

One call is one transaction: all of its commands hold, or none. It speaks to the network namespace of the calling
thread.

Tables outlive whoever made them. So each of ours holds an empty chain as its mark, named after the attempt that the
table belongs to: a table is removed together with its mark, in one transaction, and never mistaken for a later one of
the same name.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vmgr.node import record

LIBRARY = "libnftables.so.1"
_JSON_OUTPUT = 1 << 4

Command = dict[str, Any]

_lock = threading.Lock()


class Table(NamedTuple):
    """A marked table of the calling thread's network namespace."""

    family: str
    name: str
    mark: str


def mark_of(place: record.Place) -> str:
    """The name of the mark of an attempt: it tells the spool that the attempt is recorded in, and the attempt."""
    return f"{mark_of_spool(place.folder.parents[2])}{place.attempt}"


def mark_of_spool(spool: Path) -> str:
    """How the marks of all attempts recorded in this spool begin."""
    return f"of-{hashlib.sha256(os.fsencode(spool)).hexdigest()[:8]}-"


def is_there() -> bool:
    """Whether this machine has the library."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def run(commands: Sequence[Command]) -> list[Any]:
    """Run commands as one transaction; gives what they print. Raises OSError with the library's words."""
    library = ctypes.CDLL(LIBRARY)
    library.nft_ctx_new.restype = ctypes.c_void_p
    for function in (library.nft_ctx_get_output_buffer, library.nft_ctx_get_error_buffer):
        function.restype = ctypes.c_char_p
    text = json.dumps({"nftables": commands}).encode()
    with _lock:
        context = ctypes.c_void_p(library.nft_ctx_new(0))
        if not context:
            raise OSError("libnftables gives no context")
        try:
            library.nft_ctx_output_set_flags(context, _JSON_OUTPUT)
            library.nft_ctx_buffer_output(context)
            library.nft_ctx_buffer_error(context)
            failed = library.nft_run_cmd_from_buffer(context, text)
            output = library.nft_ctx_get_output_buffer(context)
            error = library.nft_ctx_get_error_buffer(context)
        finally:
            library.nft_ctx_free(context)
    if failed:
        raise OSError(f"packet filter: {_first_line(error)}")
    found = json.loads(output)["nftables"] if output else []
    return list(found)


def _first_line(error: bytes) -> str:
    """The library's reason; what follows repeats the command."""
    lines = error.decode("utf-8", "replace").strip().splitlines()
    return lines[0][:200] if lines else "no reason is given"


def names(family: str) -> set[str]:
    """The names of all tables of a family. Raises OSError."""
    return {item["table"]["name"] for item in run([{"list": {"tables": {"family": family}}}]) if "table" in item}


def marked() -> list[Table]:
    """The tables that bear a mark. Raises OSError."""
    chains = [item["chain"] for item in run([{"list": {"chains": None}}]) if "chain" in item]
    return [
        Table(chain["family"], chain["table"], chain["name"])
        for chain in chains
        if chain["table"].startswith("vtorque-") and chain["name"].startswith("of-")
    ]


def of_spool(spool: Path) -> list[Table]:
    """The tables that attempts recorded in this spool have made. Raises OSError."""
    return [table for table in marked() if table.mark.startswith(mark_of_spool(spool))]


def remove(table: Table) -> None:
    """Remove a table, if it is there and has this mark. Raises OSError."""
    if table not in marked():
        return
    at = {"family": table.family, "table": table.name}
    try:
        run([
            {"delete": {"chain": {**at, "name": table.mark}}},
            {"delete": {"table": {"family": table.family, "name": table.name}}},
        ])  # fmt: skip
    except OSError:
        if table in marked():
            raise
